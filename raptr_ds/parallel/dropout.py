"""Dropout as a pure function: each element's fate is a hash of where it stands, not of a generator's state.

An element is keyed by (seed, step, layer, site, sample, position, feature), all global. So the mask is the same under
every split of batch, layers and heads, on every device, and again in recomputation, with no state to save; where
tensor ranks hold different features their masks differ, where they hold copies the masks agree.
"""

from dataclasses import dataclass

import torch

from raptr_ds.rng import stream_key

# Odd 32-bit constants of a two-round multiply-xorshift finalizer, as signed ints: torch has no unsigned arithmetic.
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble int32 values, each to one that looks independent of its neighbours'; products wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


def _to_int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


@dataclass(frozen=True)
class DropoutStreams:
    """The dropout masks of one micro batch in one step.

    Shapes: sample_ids (b,) int64, the samples' places in the global batch.
    """

    seed: int
    step: int
    sample_ids: torch.Tensor

    def keep_mask(
        self, rate: float, layer: int, site: str, num_positions: int, features: torch.Tensor
    ) -> torch.Tensor:
        """Return which elements to keep, bool (b, T, F).

        Shapes: features (F,) int64, global indices of this rank's features. Units: rate, the share dropped.
        """
        key = stream_key(self.seed, "dropout", self.step, layer, site)
        device = features.device
        positions = torch.arange(num_positions, device=device, dtype=torch.int32)
        samples = _mix(self.sample_ids.to(device=device, dtype=torch.int32) + _to_int32(key))
        rows = _mix((samples[:, None] + positions[None, :] * _GOLDEN) ^ _to_int32(key >> 32))
        columns = _mix(features.to(torch.int32) * _GOLDEN + 1)
        threshold = round((1.0 - rate) * (1 << 31))
        bits = _mix(rows[:, :, None] ^ columns[None, None, :]) & 0x7FFFFFFF
        return bits < threshold if threshold < 1 << 31 else torch.ones_like(bits, dtype=torch.bool)


def dropout(
    x: torch.Tensor,
    rate: float,
    streams: DropoutStreams | None,
    layer: int,
    site: str,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Drop elements of x and scale the rest by 1 / (1 - rate); the identity without streams (evaluation).

    Shapes: x (b, T, F); features (F,) global feature indices, by default all of them in order.
    """
    if streams is None or rate == 0.0:
        return x
    if features is None:
        features = torch.arange(x.shape[-1], device=x.device)
    keep = streams.keep_mask(rate, layer, site, x.shape[1], features)
    return x * keep * (1.0 / (1.0 - rate))


def attention_dropout(
    probabilities: torch.Tensor, rate: float, streams: DropoutStreams | None, layer: int, first_head: int
) -> torch.Tensor:
    """Drop attention probabilities, each head by its global index.

    Shapes: probabilities (b, heads, T, T), this rank's heads, the first of which is head `first_head` of the model.
    """
    if streams is None or rate == 0.0:
        return probabilities
    batch, heads, queries, keys = probabilities.shape
    head_ids = torch.arange(first_head, first_head + heads, device=probabilities.device)
    features = (head_ids[:, None] * keys + torch.arange(keys, device=probabilities.device)).flatten()
    keep = streams.keep_mask(rate, layer, "attention", queries, features)
    keep = keep.view(batch, queries, heads, keys).transpose(1, 2)
    return probabilities * keep * (1.0 / (1.0 - rate))
