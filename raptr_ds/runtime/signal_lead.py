"""Whether the time between the signal to stop and the time limit is long enough, by what the run measures of itself."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

_MARGIN = 1.5  # later phases have longer paths, and a file system has worse days
_LEAST_SECONDS = 30


@dataclass(frozen=True)
class ShortLead:
    """A lead that is too short, in seconds. needed: by measurement; write: what to ask for."""

    lead: float
    needed: float
    write: int

    def __str__(self) -> str:
        """Return a warning that names the number to write."""
        return (
            f"warning: the signal to stop comes {self.lead:g} s before the time limit, but a checkpoint is on the "
            f"disk only {self.needed:.1f} s after a signal, as measured: two steps, a batch of an evaluation, a save "
            f"that is under way and one more. Submit with tools/submit.py --signal-lead {self.write}, or with sbatch "
            f"--signal=B:USR1@{self.write} and RAPTR_SIGNAL_LEAD={self.write}."
        )


class SignalLead:
    """Collects what steps, evaluations and saves take, and compares it with the lead, once.

    seconds: the lead; None if nobody sends a signal before a time limit, and then nothing is compared.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._lead = seconds
        self._steps: deque[float] = deque(maxlen=50)
        self._evaluation_batch = self._save = 0.0

    def step_done(self, seconds: float) -> None:
        """Take note of a step. The first ones compile: the median of the last fifty counts."""
        self._steps.append(seconds)

    def evaluated(self, seconds: float, num_batches: int) -> None:
        """Take note of an evaluation, which a stop leaves after a batch."""
        self._evaluation_batch = max(self._evaluation_batch, seconds / num_batches)

    def saved(self, seconds: float) -> None:
        """Take note of a checkpoint, from the last step before it until it is on the disk."""
        self._save = max(self._save, seconds)

    def shortage(self) -> ShortLead | None:
        """Return what is wrong with the lead, the first time that this is known; else None."""
        if self._lead is None or not self._steps or not self._save:
            return None
        # A stop is noticed up to a step late, and the checkpoint from before may still be on its way to the disk.
        needed = 2 * median(self._steps) + self._evaluation_batch + 2 * self._save
        if needed <= self._lead:
            return None
        lead, self._lead = self._lead, None
        return ShortLead(lead, needed, max(_LEAST_SECONDS, 10 * math.ceil(_MARGIN * needed / 10)))
