"""Missing words by sentinels: a prompt with <extra_id_0>, <extra_id_1>, ... and the answer's spans in their places."""

from collections.abc import Sequence

from raptr_ds.errors import ConfigError
from raptr_ds.hf.generation import Prompt


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
