"""Between text and tokens around generation: prompts with their mode, and text as its tokens come."""

from collections.abc import Sequence
from itertools import count, takewhile

from transformers import PreTrainedTokenizerFast

from raptr_ds.data.tokenizer import MODES, sentinel_name
from raptr_ds.errors import ConfigError

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
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

    def _decode(self, tokens: Sequence[int]) -> str:
        modes = mode_ids(self._tokenizer).values()
        shown = list(tokens[1:] if tokens and tokens[0] in modes else tokens)
        return str(self._tokenizer.decode(shown))
