"""The learning rate of a step as a pure function: DeepSpeed's schedules, by its names and parameters, and two more.

DeepSpeed's scheduler is late: its first two steps have the warm-up's minimum, by default 0, and train nothing. Here
warm-up counts the current step and decay the steps before it, so that no step has rate 0.
"""

import math
from collections.abc import Mapping
from typing import Any


def learning_rate_at(scheduler: Mapping[str, Any] | None, base: float, step: int) -> float:
    """Return the learning rate of `step` (0-based).

    scheduler: {type, params} of the run file, every parameter filled in; None keeps `base`, the optimizer's rate.
    """
    if scheduler is None:
        return base
    kind, params = scheduler["type"], scheduler["params"]
    warmup_steps = params["warmup_num_steps"]
    if kind == "WarmupCosineLR":
        low, high = base * params["warmup_min_ratio"], base
    else:
        low, high = params["warmup_min_lr"], params["warmup_max_lr"]
    if step < warmup_steps:
        return low + (high - low) * _warmup(step + 1, warmup_steps, params["warmup_type"])
    if kind == "WarmupLR":
        return high
    if kind == "WarmupInverseSqrtLR":
        return high * math.sqrt(max(1, warmup_steps) / max(1, step))
    total = params["total_num_steps"]
    if kind == "WarmupStableDecayLR":
        decay_steps = params["decay_num_steps"]
        done = (step - (total - decay_steps)) / max(1, decay_steps)
        end = params["decay_min_lr"]
        return end + (high - end) * _decay(min(1.0, max(0.0, done)), params["decay_type"])
    done = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    if kind == "WarmupDecayLR":
        return high * (1.0 - done)
    end = params["cos_min_ratio"]
    return high * (end + (1.0 - end) * _decay(done, "cosine"))


def _warmup(count: int, steps: int, shape: str) -> float:
    if shape == "linear":
        return count / steps
    return min(1.0, math.log(count + 1) / math.log(max(2, steps)))


def _decay(done: float, shape: str) -> float:
    """Return how much of the decay is left after the part `done` (0..1) of its steps; sqrt: Haegele et al. 2024."""
    if shape == "linear":
        return 1.0 - done
    if shape == "sqrt":
        return 1.0 - math.sqrt(done)
    return 0.5 * (1.0 + math.cos(math.pi * done))
