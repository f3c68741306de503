"""A path: the layers that run in one step, as an immutable value that ranks can compare and send."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_HEADER = 3  # phase, length, bits of the residual scale


@dataclass(frozen=True)
class Path:
    """The active layers of one training step; every other layer is the identity.

    layers: 0-based global indices, strictly increasing. phase: 0-based index of the schedule's phase, for the record.
    residual_scale: factor on the output of each active residual branch. A path may be empty (a Bernoulli draw can be).
    """

    layers: tuple[int, ...]
    num_layers: int
    phase: int = 0
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.num_layers >= 1, f"num_layers={self.num_layers}"
        assert all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False)), f"not increasing: {self.layers}"
        assert not self.layers or (self.layers[0] >= 0 and self.layers[-1] < self.num_layers), (
            f"layers {self.layers} outside 0..{self.num_layers - 1}"
        )
        assert 0.0 < self.residual_scale < float("inf"), f"residual_scale={self.residual_scale}"

    @classmethod
    def full(cls, num_layers: int, phase: int = 0) -> "Path":
        """Return the path through every layer, with residual scale 1."""
        return cls(tuple(range(num_layers)), num_layers, phase)

    @property
    def length(self) -> int:
        """The number of active layers."""
        return len(self.layers)

    @property
    def is_full(self) -> bool:
        """Whether every layer is active."""
        return self.length == self.num_layers

    def is_active(self, layer: int) -> bool:
        """Say whether the layer of this 0-based global index runs."""
        return layer in self.layers

    def active_in(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Return those of `layers` (a pipeline stage's range, say) that are active, in their order."""
        active = set(self.layers)
        return tuple(layer for layer in layers if layer in active)

    def encode(self) -> np.ndarray:
        """Return the path as int64 numbers: phase, length, residual scale's bits, one flag per layer.

        Shape: (3 + num_layers,). The size depends on num_layers alone, so that a broadcast needs no size beforehand.
        """
        words = np.zeros(encoded_size(self.num_layers), dtype=np.int64)
        words[0], words[1] = self.phase, self.length
        words[2] = np.float64(self.residual_scale).view(np.int64)
        words[_HEADER + np.array(self.layers, dtype=np.int64)] = 1
        return words

    @classmethod
    def decode(cls, words: np.ndarray) -> "Path":
        """Return the path that `encode` wrote as `words`.

        Raises: ValueError if the words are not a path's (a damaged or foreign message).
        """
        flags = words[_HEADER:]
        if words.dtype != np.int64 or words.ndim != 1 or flags.size < 1 or not np.isin(flags, (0, 1)).all():
            raise ValueError(f"not an encoded path: {words!r}")
        if int(words[1]) != int(flags.sum()):
            raise ValueError(f"encoded path says {int(words[1])} layers and flags {int(flags.sum())}")
        scale = float(words[2:3].view(np.float64)[0])
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"encoded path has residual scale {scale}")
        return cls(tuple(np.flatnonzero(flags).tolist()), flags.size, int(words[0]), scale)

    def digest(self) -> int:
        """Return a 63-bit number for comparing paths between ranks: equal paths, and in practice only they, agree."""
        content = self.encode().astype("<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def encoded_size(num_layers: int) -> int:
    """Return how many int64 numbers `Path.encode` gives for a model of this depth."""
    return _HEADER + num_layers
