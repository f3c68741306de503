"""Whether two data folders hold the same tokens: a digest of what is in them, whenever and wherever they were made."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from raptr_ds.data.indexed import reading

_BLOCK_BYTES = 1 << 14
_MAX_BLOCKS = 512


def corpus_digest(folders: Mapping[str, float], splits: Sequence[str] = ("train", "validation")) -> str:
    """Return the hexadecimal digest of a run's data: its folders' tokens, their weights and their order.

    Of each file its size and at most 512 blocks of 16 KiB, spread evenly, the first and the last among them: all of a
    file up to 8 MiB. Raises: DataError if a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder, weight in folders.items():
        digest.update(f"{float(weight)!r};".encode())
        for name in (f"{split}.{kind}" for split in splits for kind in ("idx", "bin")):
            path = Path(folder, name)
            with reading(path, "Check its permissions and its disk."), path.open("rb") as stream:
                size = stream.seek(0, 2)
                digest.update(f"{name}:{size};".encode())
                count = -(-size // _BLOCK_BYTES)
                for number in range(min(count, _MAX_BLOCKS)):
                    block = number if count <= _MAX_BLOCKS else number * (count - 1) // (_MAX_BLOCKS - 1)
                    stream.seek(block * _BLOCK_BYTES)
                    digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
