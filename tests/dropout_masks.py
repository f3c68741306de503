"""The dropout masks of a step, as an engine makes them, on the device of the samples."""

import torch

from raptr_ds.parallel.dropout import DropoutStreams, dropout_keys


def streams_of(seed: int, step: int, sample_ids: torch.Tensor, num_layers: int = 8) -> DropoutStreams:
    """Return the masks of samples in a step of a model of at most `num_layers` layers."""
    return DropoutStreams(dropout_keys(seed, step, num_layers, sample_ids.device), sample_ids)
