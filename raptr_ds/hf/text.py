"""Between text and tokens around generation: prompts with their mode, and text as its tokens come.

Missing words are sentinels: a prompt with <extra_id_0>, <extra_id_1>, ... and the answer's spans in their places.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, takewhile

from transformers import PreTrainedTokenizerFast

from raptr_ds.data.tokenizer import MODES, sentinel_name
from raptr_ds.errors import ConfigError
from raptr_ds.hf.generation import End, Prompt, Sampling, generate
from raptr_ds.hf.load import PrefixModel

_INCOMPLETE = "\ufffd"  # what bytes decode to that are the beginning of a character


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, text: str, mode: str | None) -> list[int]:
    """Return the ids of a text behind a mode token; a text that begins with a mode keeps its own.

    Raises: ConfigError if the tokenizer has no such mode, or UTF-8 cannot represent the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt's character {error.start}, {text[error.start]!r}, is none in UTF-8.") from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    modes = mode_ids(tokenizer)
    if mode is None or (tokens and tokens[0] in modes.values()):
        return tokens
    if mode not in modes:
        raise ConfigError(f"the model's tokenizer has no mode {mode}; it has {', '.join(modes) or 'none'}.")
    return [modes[mode], *tokens]


def mode_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of the mode tokens that a tokenizer has, by name."""
    vocabulary = tokenizer.get_vocab()
    return {mode: vocabulary[mode] for mode in MODES if mode in vocabulary}


def sentinel_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids of <extra_id_0>, <extra_id_1>, ..., up to the first that a tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    names = takewhile(vocabulary.__contains__, map(sentinel_name, count()))
    return [vocabulary[name] for name in names]


class TextStream:
    """The text of a growing list of tokens, piece by piece; a character whose bytes are not all there yet waits."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int] = ()) -> None:
        """before: tokens that the list begins with and whose text is known."""
        self._tokenizer = tokenizer
        self._shown = self._decode(before)

    def update(self, tokens: Sequence[int], is_complete: bool = False) -> str:
        """Return what has been added to the text. tokens: all of them."""
        text = self._decode(tokens)
        if not is_complete:
            text = text.rstrip(_INCOMPLETE)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, self._shown, strict=False)))
        # A byte of no character makes _INCOMPLETE of each byte beside it, of those of characters shown already, too.
        spoilt = len(self._shown[kept:].encode())
        if text[kept : kept + spoilt] != _INCOMPLETE * spoilt:
            return ""
        self._shown = text
        return text[kept + spoilt :]

    def _decode(self, tokens: Sequence[int]) -> str:
        modes = mode_ids(self._tokenizer).values()
        shown = list(tokens[1:] if tokens and tokens[0] in modes else tokens)
        return str(self._tokenizer.decode(shown))


def infilling_prompt(tokens: Sequence[int], sentinels: Sequence[int]) -> Prompt:
    """Return the prompt whose continuation fills the sentinels in `tokens`: all of these are its prefix.

    Behind the prefix stands the first sentinel, by which every answer of pretraining begins.
    sentinels: the ids of <extra_id_0>, <extra_id_1>, ...
    Raises: ConfigError unless they are in the tokens once each, in order, from the first on.
    """
    found = [token for token in tokens if token in set(sentinels)]
    if not found:
        raise ConfigError(
            "the prompt has no missing words: write <extra_id_0>, <extra_id_1>, ... in their places, as in 'The "
            "<extra_id_0> sat on the <extra_id_1>.'"
        )
    if found != list(sentinels[: len(found)]):
        names = ", ".join(f"<extra_id_{list(sentinels).index(token)}>" for token in found)
        raise ConfigError(f"the prompt's missing words are {names}: number them 0, 1, 2, ... in order, each once.")
    return Prompt([*tokens, sentinels[0]], prefix_length=len(tokens))


def filled(tokens: Sequence[int], answer: Sequence[int], sentinels: Sequence[int], is_complete: bool) -> list[int]:
    """Return the tokens with each sentinel replaced by its span.

    answer: what follows the prompt of `infilling_prompt`. Of spans with the same sentinel the first counts, and those
    of sentinels that are not in the tokens are left out. A sentinel without a span stays; unless the answer is
    complete, the tokens end with the span that is being written.
    """
    names = set(sentinels)
    spans: dict[int, list[int]] = {sentinels[0]: []}
    current: list[int] | None = spans[sentinels[0]]
    for token in answer:
        if token in names:
            current = None if token in spans else spans.setdefault(token, [])
        elif current is not None:
            current.append(token)
    result: list[int] = []
    for token in tokens:
        if token not in names:
            result.append(token)
        elif token in spans:
            result.extend(spans[token])
            if spans[token] is current and not is_complete:
                break
        elif is_complete:
            result.append(token)
        else:
            break
    return result


def complete(
    loaded: PrefixModel,
    tokens: Sequence[int],
    write: Callable[[str], None],
    *,
    fills: bool,
    max_new_tokens: int,
    sampling: Sampling,
    prefix_length: int | None = None,
) -> End:
    """Write what follows some tokens, piece by piece as it comes, and return why it ends.

    fills: write the text of the tokens itself, with its sentinels filled in. prefix_length: as `Prompt` has it.
    Raises: ConfigError as `infilling_prompt` and `generate` do, or if no token ends a text.
    """
    tokenizer, end_id = loaded.tokenizer, loaded.tokenizer.eos_token_id
    if not isinstance(end_id, int):
        raise ConfigError("the model's tokenizer has no token that ends a text (eos_token).")
    sentinels = sentinel_ids(tokenizer)
    prompt = infilling_prompt(tokens, sentinels) if fills else Prompt(tokens)
    if prefix_length is not None:
        prompt = replace(prompt, prefix_length=prefix_length)
    text, new = TextStream(tokenizer, () if fills else tokens), []

    def show(is_complete: bool) -> None:
        whole = filled(tokens, new, sentinels, is_complete) if fills else [*tokens, *new]
        write(text.update(whole, is_complete))

    def take(_: int, token: int) -> None:
        new.append(token)
        show(is_complete=False)

    (done,) = generate(loaded.model, [prompt], max_new_tokens, end_id, sampling, take)
    show(is_complete=True)
    return done.end
