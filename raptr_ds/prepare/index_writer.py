"""The .idx of tokens that are appended to a .bin: megatron-core's format, as raptr_ds/data/indexed.py reads it.

It is written here rather than by megatron's builder so that an interrupted preparation can resume by truncating the
.bin, and to avoid seven seconds of imports; the tests compare both byte by byte.
"""

from pathlib import Path

import numpy as np

from raptr_ds.data.indexed import DTYPES, HEADER, MAGIC, VERSION

_LARGEST_UINT16_VOCAB = 65500


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype for this vocabulary, the same as megatron-core chooses."""
    return np.dtype(np.uint16 if vocab_size < _LARGEST_UINT16_VOCAB else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the .idx of documents of these lengths in tokens (num_documents,), each one sequence."""
    lengths = np.asarray(lengths, np.int32)
    offsets = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1] * np.int64(dtype.itemsize), out=offsets[1:])
    boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(boundaries)))
        for array in (lengths, offsets, boundaries):
            stream.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
