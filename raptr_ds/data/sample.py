"""One sample, before it is put into a batch: what every objective returns."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Tokens and what is predicted from them.

    Shapes: tokens (length,) int64, length <= seq_length; positions (n,) int64, increasing, where the model predicts;
    targets (n,) int64, what it should say there. prefix_length: how many leading positions are seen in both directions.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    prefix_length: int


@dataclass(frozen=True)
class PackedSample:
    """Several samples in one sequence, one after the other; none sees another. At least one."""

    parts: tuple[Sample, ...]
