"""A path: the layers that run in one step, as an immutable value that ranks can compare and send."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_HEADER = 4  # phase, length, bits of the residual scale, parts of a layer


@dataclass(frozen=True)
class Parts:
    """The parts that run of each layer: attention heads, and as many blocks of the MLP's inner features.

    number: heads of a layer. heads, blocks: for each layer of the model, 0-based, strictly increasing.
    """

    number: int
    heads: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.heads) == len(self.blocks), self
        for parts in (*self.heads, *self.blocks):
            assert all(a < b for a, b in zip((-1, *parts), (*parts, self.number), strict=True)), parts

    @property
    def work(self) -> float:
        """What these parts cost, in whole layers: heads and blocks by the share of them that runs."""
        return sum(map(len, (*self.heads, *self.blocks))) / (2 * self.number)


@dataclass(frozen=True)
class Path:
    """The active layers of one training step; every other layer is the identity.

    layers: 0-based global indices, strictly increasing. phase: 0-based index of the schedule's phase, for the record.
    residual_scale: factor on the output of each active residual branch. A path may be empty (a Bernoulli draw can be).
    parts: what runs of each layer; None for all of it.
    """

    layers: tuple[int, ...]
    num_layers: int
    phase: int = 0
    residual_scale: float = 1.0
    parts: Parts | None = None

    def __post_init__(self) -> None:
        assert self.num_layers >= 1, f"num_layers={self.num_layers}"
        assert all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False)), f"not increasing: {self.layers}"
        assert not self.layers or (self.layers[0] >= 0 and self.layers[-1] < self.num_layers), (
            f"layers {self.layers} outside 0..{self.num_layers - 1}"
        )
        assert 0.0 < self.residual_scale < float("inf"), f"residual_scale={self.residual_scale}"
        assert self.parts is None or (len(self.parts.heads) == self.length == self.num_layers), "parts of some layers"

    @classmethod
    def full(cls, num_layers: int, phase: int = 0) -> "Path":
        """Return the path through every layer, with residual scale 1."""
        return cls(tuple(range(num_layers)), num_layers, phase)

    @property
    def length(self) -> int:
        """The number of active layers."""
        return len(self.layers)

    @property
    def work(self) -> float:
        """What the layers cost, in whole layers: their number where they run whole."""
        return self.length if self.parts is None else self.parts.work

    @property
    def is_full(self) -> bool:
        """Whether every layer is active, and all of it."""
        return self.work == self.num_layers

    def is_active(self, layer: int) -> bool:
        """Say whether the layer of this 0-based global index runs."""
        return layer in self.layers

    def active_in(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Return those of `layers` (a pipeline stage's range, say) that are active, in their order."""
        active = set(self.layers)
        return tuple(layer for layer in layers if layer in active)

    def encode(self) -> np.ndarray:
        """Return the path as int64 numbers: phase, length, residual scale's bits, parts of a layer, and flags.

        Shape: (4 + num_layers,), one flag per layer, and with parts as many for each head and block of every layer
        besides. The size is one for all paths of a method, so that a broadcast needs no size beforehand.
        """
        parts = self.parts or Parts(0, (), ())
        flags = np.zeros((1 + 2 * parts.number, self.num_layers), dtype=np.int64)
        flags[0, list(self.layers)] = 1
        for first, chosen in ((1, parts.heads), (1 + parts.number, parts.blocks)):
            for layer, numbers in enumerate(chosen):
                flags[[first + number for number in numbers], layer] = 1
        scale = int(np.float64(self.residual_scale).view(np.int64))
        return np.concatenate([np.array([self.phase, self.length, scale, parts.number]), flags.ravel()])

    @classmethod
    def decode(cls, words: np.ndarray) -> "Path":
        """Return the path that `encode` wrote as `words`.

        Raises: ValueError if the words are not a path's (a damaged or foreign message).
        """
        flags = words[_HEADER:]
        if words.dtype != np.int64 or words.ndim != 1 or flags.size < 1 or not np.isin(flags, (0, 1)).all():
            raise ValueError(f"not an encoded path: {words!r}")
        number = int(words[3])
        if number < 0 or flags.size % (1 + 2 * number):
            raise ValueError(f"encoded path says {number} parts of a layer in {flags.size} flags")
        flags = flags.reshape(1 + 2 * number, -1)
        if int(words[1]) != int(flags[0].sum()):
            raise ValueError(f"encoded path says {int(words[1])} layers and flags {int(flags[0].sum())}")
        scale = float(words[2:3].view(np.float64)[0])
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"encoded path has residual scale {scale}")
        parts = None
        if number:
            heads, blocks = (
                tuple(_numbers(flags[first : first + number, layer]) for layer in range(flags.shape[1]))
                for first in (1, 1 + number)
            )
            parts = Parts(number, heads, blocks)
        return cls(_numbers(flags[0]), flags.shape[1], int(words[0]), scale, parts)

    def digest(self) -> int:
        """Return a 63-bit number for comparing paths between ranks: equal paths, and in practice only they, agree."""
        content = self.encode().astype("<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _numbers(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(flags).tolist())
