"""A sentencepiece model that somebody else trained (T5's, Llama's), with the special tokens that it lacks."""

import itertools
from pathlib import Path

from raptr_ds.data.tokenizer import (
    ROLES,
    Tokenizer,
    is_control,
    lacks_bytes,
    missing_specials,
    open_processor,
    read_model_file,
    sentinel_name,
)
from raptr_ds.sentencepiece_model import NUM_BYTES, read_sentencepiece_model, with_pieces


def bring_tokenizer(path: str | Path, num_sentinels: int) -> tuple[Tokenizer, str]:
    """Return the tokenizer of a file, and a line on what is added to it or not, empty if it is all that is wanted.

    What is missing comes at the end of the vocabulary, so that no id changes; a piece of another type that has the name
    of a special token becomes one. A model that has sentinels keeps its number of them.
    Raises: DataError if the file cannot be read or has options that are not supported.
    """
    model, origin = read_model_file(path), str(path)
    processor = open_processor(model, origin)
    pieces = {piece.text for piece in read_sentencepiece_model(model, origin).pieces}
    own = list(itertools.takewhile(pieces.__contains__, map(sentinel_name, itertools.count())))
    specials = missing_specials(processor)
    sentinels = [name for name in own if not is_control(processor, name)]
    needs_bytes = lacks_bytes(processor)
    if not (specials or sentinels or needs_bytes):
        note = f"{origin} lacks nothing; it keeps its {len(own)} sentinels." if len(own) != num_sentinels else ""
        return Tokenizer(model, origin), note
    if not own:
        sentinels = [sentinel_name(index) for index in range(num_sentinels)]
    roles = {role: name for role, name in ROLES.items() if name in specials}
    tokenizer = Tokenizer(with_pieces(model, [*specials, *sentinels], roles, add_bytes=needs_bytes), origin)
    read_sentencepiece_model(tokenizer.model, origin)  # refuses pieces made of what has become a special token
    named = [*specials, *(sentinels if own else [])]
    parts = {
        "added at the end": [
            *(name for name in named if name not in pieces),
            *([f"{num_sentinels} sentinels"] if not own and num_sentinels else []),
            *([f"{NUM_BYTES} byte pieces"] if needs_bytes else []),
        ],
        "special tokens now, which no text produces": [
            name for name in named if name in pieces and not is_control(processor, name)
        ],
    }
    changes = "".join(f"{what}: {', '.join(names)}; " for what, names in parts.items() if names)
    return tokenizer, f"{origin} has {len(pieces):,} pieces; {changes}{tokenizer.vocab_size:,} in all."
