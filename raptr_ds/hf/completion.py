"""A text continued, or its missing words filled in, as the tokens come.

Missing words are sentinels: a prompt with <extra_id_0>, <extra_id_1>, ... and the answer's spans in their places.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from raptr_ds.errors import ConfigError
from raptr_ds.hf.generation import End, Prompt, Sampling, generate
from raptr_ds.hf.load import PrefixModel
from raptr_ds.hf.text import TextStream, sentinel_ids


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
