"""What happens to the ranks of a run, besides its training."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from raptr_ds.errors import Exit
from raptr_ds.model.stage import Embedding
from raptr_ds.parallel.dropout import DropoutStreams
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.metrics_file import METRICS


@dataclass(frozen=True)
class Strike:
    """Which signal strikes which ranks: `seconds` after the run has written so many lines of metrics."""

    signal: signal.Signals
    ranks: tuple[int, ...]
    lines: int
    seconds: float

    @staticmethod
    def drawn(draw: random.Random, step: int, num_ranks: int) -> "Strike":
        """Return a strike at some moment after `step`; scripts and launchers send to all ranks, and faults to one."""
        kind = draw.choice((signal.SIGKILL, signal.SIGTERM))
        ranks = draw.choice((range(num_ranks), (draw.randrange(num_ranks),)))
        return Strike(kind, tuple(ranks), step, draw.choice((0.0, draw.uniform(0, 0.1), draw.uniform(0, 1))))

    def on(self, save: Path) -> Callable[[Launch], None]:
        """Return what each rank of a run in that folder calls before it starts."""
        return partial(_await, self, save / METRICS)

    @property
    def exit_codes(self) -> set[int]:
        """How ranks may end: the run may be over before it is struck, and a rank lose another one."""
        return {Exit.DONE, Exit.LOST_RANK, Exit.CONTINUE_LATER, -self.signal}


def _await(strike: Strike, metrics: Path, launch: Launch) -> None:
    if launch.rank in strike.ranks:
        threading.Thread(target=_hit, args=(strike, metrics), daemon=True).start()


def _hit(strike: Strike, metrics: Path) -> None:
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < strike.lines:
        time.sleep(0.002)
    time.sleep(strike.seconds)
    os.kill(os.getpid(), strike.signal)


def without_its_user(_: Launch) -> None:
    """Start a rank as a supervisor does that starts its run again."""
    os.environ["RAPTR_RESTART_COUNT"] = "1"


def overflow(one_in: int, _: Launch) -> None:
    """Make steps overflow that train on a sequence of one in so many: the same sequences in every layout."""
    forward = Embedding.forward

    def overflowing(
        self: Embedding, tokens: torch.Tensor, streams: DropoutStreams | None, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = forward(self, tokens, streams, positions)
        overflows = torch.is_grad_enabled() and bool((tokens.sum(dim=1) % one_in == 0).any())
        return (x * torch.inf if overflows else x), weight

    Embedding.forward = overflowing
