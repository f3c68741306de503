"""The only source of randomness: streams keyed by the run's seed and what they are for."""

import hashlib

import numpy as np

Key = int | str


def stream_key(seed: int, *keys: Key) -> int:
    """Return a 63-bit key, a pure function of `seed` and `keys`, to seed other generators.

    Keys of different types or different grouping give different results: each is written with its type and length.
    """
    digest = hashlib.blake2b(digest_size=8)
    for key in (seed, *keys):
        text = f"{type(key).__name__}:{key}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def stream(seed: int, *keys: Key) -> np.random.Generator:
    """Return a fresh generator, a pure function of `seed` and `keys`: the same on every rank and layout."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, *keys)))
