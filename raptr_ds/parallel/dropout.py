"""Dropout as a pure function: each element's fate is a hash of where it stands, not of a generator's state.

An element is keyed by (seed, step, layer, site, sample, position, feature), all global. So the mask is the same under
every split of batch, layers and heads, on every device, and again in recomputation, with no state to save; where
tensor ranks hold different features their masks differ, where they hold copies the masks agree.
"""

from typing import NamedTuple

import torch

from raptr_ds.parallel.transfer import without_waiting
from raptr_ds.rng import stream_key

# Odd 32-bit constants of a two-round multiply-xorshift finalizer, as signed ints: torch has no unsigned arithmetic, and
# products that wrap are the point. A compiler of C++ needs a flag for that (model/compiler.py).
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)
_ROUNDS = ((16, _MIX_1), (15, _MIX_2), (16, None))

SITES = ("embedding", "attention", "attention_output", "mlp_output")
"""Where the model drops something."""

# Masks are hashed in pieces: of what fits a core's second-level cache, and elsewhere of what bounds the scratch memory.
_CPU_PIECE_ELEMENTS = 1 << 17
_PIECE_ELEMENTS = 1 << 25


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble int32 values, each to one that looks independent of its neighbours'; products wrap."""
    for bits, multiplier in _ROUNDS:
        x = x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))
        if multiplier is not None:
            x = x * multiplier
    return x


def _mix_in_place(x: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
    """Scramble x; `shifted` is room for as many values. The masks make torch's signed shift an unsigned one."""
    for bits, multiplier in _ROUNDS:
        torch.bitwise_right_shift(x, bits, out=shifted)
        x ^= shifted.bitwise_and_((1 << (32 - bits)) - 1)
        if multiplier is not None:
            x *= multiplier
    return x


def keep_threshold(rate: float) -> int:
    """Return below which number 31 bits of hash keep an element."""
    return round((1.0 - rate) * (1 << 31))


def dropout_keys(seed: int, step: int, num_layers: int, device: torch.device) -> torch.Tensor:
    """Return the keys of a step's masks, (num_layers + 1, sites, 2) int32 on the device: the embedding's, the layers'.

    Made once a step, and copied to a GPU without waiting for it.
    """
    layers = range(-1, num_layers)
    keys = torch.tensor([[[stream_key(seed, "dropout", step, layer, site)] for site in SITES] for layer in layers])
    return without_waiting(keys.view(torch.int32), device)  # a key's lower half comes first


class DropoutStreams:
    """The dropout masks of one micro batch in one step."""

    def __init__(self, keys: torch.Tensor, sample_ids: torch.Tensor) -> None:
        """keys: the step's, by `dropout_keys`; sample_ids: (b,) the samples' places in the run, on the same device."""
        self.keys, self.sample_ids = keys, sample_ids.to(torch.int32)

    def of_layer(self, layer: int) -> "LayerDropout":
        """Return the masks of one layer; layers are global indices, the embedding is -1."""
        return LayerDropout(self.sample_ids, self.keys[layer + 1])


class LayerDropout(NamedTuple):
    """The dropout masks of one layer. Layer and step are values of tensors, so that a compiled block serves them all.

    Shapes: sample_ids (b,) int32; keys (sites, 2) int32; both on the model's device.
    """

    sample_ids: torch.Tensor
    keys: torch.Tensor

    def row_and_column_hashes(
        self, site: str, num_positions: int, features: torch.Tensor, first_position: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hashes of rows (b, T) and columns (as features), int32; an element's hash is that of their xor.

        first_position: of T positions, where they are a part of a sequence.
        """
        low, high = self.keys[SITES.index(site)].unbind()
        positions = torch.arange(
            first_position, first_position + num_positions, device=features.device, dtype=torch.int32
        )
        rows = _mix((_mix(self.sample_ids + low)[:, None] + positions[None, :] * _GOLDEN) ^ high)
        return rows, _mix(features.to(torch.int32) * _GOLDEN + 1)

    def keep_mask(
        self, rate: float, site: str, num_positions: int, features: torch.Tensor, first_position: int = 0
    ) -> torch.Tensor:
        """Return which elements to keep, bool (b, G, T, F / G) for features (G, F / G) and (b, T, F) for (F,).

        Shapes: features (F,) or (G, F / G) int64, global indices of this rank's features. Units: rate, the share
        dropped. first_position: of the T positions, where they are a part of a sequence.
        """
        rows, columns = self.row_and_column_hashes(site, num_positions, features, first_position)
        threshold = keep_threshold(rate)
        if features.ndim == 1:
            return _keep(rows[:, :, None], columns[None, None, :], threshold)
        pairs = (len(rows), len(features))
        rows = rows[:, None].expand(*pairs, -1).flatten(0, 1)
        columns = columns[None].expand(*pairs, -1).flatten(0, 1)
        return _keep(rows[:, :, None], columns[:, None, :], threshold).unflatten(0, pairs)


def _keep(rows: torch.Tensor, columns: torch.Tensor, threshold: int) -> torch.Tensor:
    """Return whether the hash of each row and column is below threshold / 2^31, bool (n, R, C).

    Shapes: rows (n, R, 1), columns (n or 1, 1, C), int32. Worked off in pieces that stay in a core's cache; a compiler
    makes one pass of the plain formula.
    """
    if torch.compiler.is_compiling():
        return (_mix(rows ^ columns) & 0x7FFFFFFF) < threshold
    count, height, width = rows.shape[0], rows.shape[1], columns.shape[2]
    keep = torch.empty(count, height, width, dtype=torch.bool, device=rows.device)
    if threshold >= 1 << 31:
        return keep.fill_(True)
    piece = _CPU_PIECE_ELEMENTS * torch.get_num_threads() if rows.device.type == "cpu" else _PIECE_ELEMENTS
    high = min(height, max(1, piece // width))
    deep = min(count, max(1, piece // (high * width)))
    buffers = torch.empty(2, deep, high, width, dtype=torch.int32, device=rows.device)
    for first in range(0, count, deep):
        here = slice(first, min(first + deep, count))
        for top in range(0, height, high):
            lines = slice(top, min(top + high, height))
            bits, shifted = buffers[:, : here.stop - first, : lines.stop - top]
            torch.bitwise_xor(rows[here, lines], columns[here] if len(columns) > 1 else columns, out=bits)
            _mix_in_place(bits, shifted).bitwise_and_(0x7FFFFFFF)
            torch.lt(bits, threshold, out=keep[here, lines])
    return keep


def dropout(
    x: torch.Tensor,
    rate: float,
    layer: LayerDropout | None,
    site: str,
    first_position: int = 0,
) -> torch.Tensor:
    """Drop elements of x and scale the rest by 1 / (1 - rate); the identity without a layer's masks (evaluation).

    Shapes: x (b, T, F). first_position: of the T positions, where they are a part of a sequence.
    """
    if layer is None or rate == 0.0:
        return x
    keep = layer.keep_mask(rate, site, x.shape[1], torch.arange(x.shape[-1], device=x.device), first_position)
    return torch.where(keep, x * (1.0 / (1.0 - rate)), 0.0)


def attention_keep_mask(rate: float, layer: LayerDropout, num_positions: int, *, heads: torch.Tensor) -> torch.Tensor:
    """Return which attention probabilities to keep, bool (b, heads, T, T), each head by its global index.

    Shapes: heads (heads,) int64, global indices of those that run here. The kept ones are to be multiplied by
    1 / (1 - rate).
    """
    return layer.keep_mask(rate, "attention", num_positions, _attention_features(num_positions, heads))


def attention_hashes(
    layer: LayerDropout, num_positions: int, *, heads: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same before its last step: hashes of the queries (b, T) and of the heads' keys (heads, T), int32."""
    return layer.row_and_column_hashes("attention", num_positions, _attention_features(num_positions, heads))


def _attention_features(num_positions: int, heads: torch.Tensor) -> torch.Tensor:
    return heads[:, None] * num_positions + torch.arange(num_positions, device=heads.device)
