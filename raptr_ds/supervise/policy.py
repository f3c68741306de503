"""Whether a run that ended is tried again, and after how long: pure functions of how it ended and what it achieved."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from raptr_ds.errors import Exit

KILLED = 128 + signal.SIGKILL
_STORAGE_PATIENCE = 20  # a full disk is emptied by people: such a delay is this much longer
_GROWTH = 4  # each delay without progress to the one before
_MOST_GROWTHS = 20  # more would not be a number: a delay of 15 s is 500,000 years long by then


class Cause(StrEnum):
    """Why a try of the run ended."""

    DONE = "done"
    MISTAKE = "mistake"
    STOPPED = "stopped"
    PORT = "port taken"
    OCCUPIED = "folder in use"
    STORAGE = "storage"
    HUNG = "hung"
    FAULT = "fault"


@dataclass(frozen=True)
class Failure:
    """A task that a launcher reported as failed. node: None if not one alone; code: None after a signal."""

    node: str | None
    code: int | None
    text: str


@dataclass(frozen=True)
class Ending:
    """How one try ended.

    code: the launcher's. failures: the tasks that it reported as failed, in this order. port_taken, folder_in_use,
    no_script: what was printed on the way (command.py, Reports).
    """

    code: int
    failures: Sequence[Failure] = ()
    stop_requested: bool = False
    port_taken: bool = False
    folder_in_use: bool = False
    no_script: bool = False


@dataclass(frozen=True)
class Start:
    """One start of a job: its number in the job, from 0, and the step of the newest checkpoint that it found."""

    number: int
    step: int


@dataclass(frozen=True)
class Limits:
    """How often, and how soon, a run is tried again without progress."""

    max_retries: int = 3
    delay_seconds: float = 15.0


@dataclass(frozen=True)
class Decision:
    """What follows: another try after `delay_seconds`, or the end. why: a sentence for people."""

    retry: bool
    why: str
    delay_seconds: float = 0.0


def cause_of(ending: Ending) -> Cause:
    """Return why a try ended.

    The launcher's own code is no more than the largest of all tasks', or 1 whatever they were (torchrun), so that of
    the task that failed first comes before it. A Python that cannot open its file, since the file system is away,
    ends with USER_ERROR as well, and has made no mistake.
    """
    culprit = first_by_itself(ending)
    codes = [ending.code] if culprit is None or culprit.code is None else [culprit.code, ending.code]
    if ending.code == Exit.DONE:
        return Cause.DONE
    if Exit.USER_ERROR in codes and not ending.no_script:
        return Cause.OCCUPIED if ending.folder_in_use else Cause.MISTAKE
    if Exit.CONTINUE_LATER in codes or (ending.stop_requested and ending.code > 128):
        return Cause.STOPPED  # by a signal even: it met tasks that were still starting, and the last checkpoint stands
    if ending.port_taken:
        return Cause.PORT
    return Cause.STORAGE if Exit.STORAGE in codes else Cause.HUNG if Exit.HUNG in codes else Cause.FAULT


def failed_node(ending: Ending, cause: Cause) -> str | None:
    """Return the node to blame for a failed try, None if it is not one alone.

    It is that of the first task that failed by itself. Tasks that lost another may be reported before it; of a hung run
    those that noticed leave first, and what is killed after them did not move.
    """
    if cause in (Cause.DONE, Cause.STOPPED, Cause.OCCUPIED):
        return None
    if cause is not Cause.HUNG:
        culprit = first_by_itself(ending)
        return culprit and culprit.node
    nodes = {failure.node for failure in ending.failures if failure.code not in (Exit.HUNG, Exit.LOST_RANK)}
    return nodes.pop() if len(nodes) == 1 else None


def first_by_itself(ending: Ending) -> Failure | None:
    """Return the first reported task that did not fail only because it lost another one, None if there is none."""
    return next((failure for failure in ending.failures if failure.code != Exit.LOST_RANK), None)


def starts_without_progress(starts: Sequence[Start], number: int, step: int, first: int = 0) -> int:
    """Return how many starts up to `number`, the newest, have left the run without a newer checkpoint.

    starts: those on record, oldest first; one that could not be written down counts as one without progress.
    step: of the newest checkpoint now. first: the start to count from.
    """
    known = [start for start in starts if first <= start.number <= number]
    after = [*(start.step for start in known[1:]), step]
    advanced = [start.number for start, then in zip(known, after, strict=False) if then > start.step]
    return number - max(advanced, default=first - 1)


def decide(cause: Cause, fruitless: int, limits: Limits) -> Decision:
    """Return what follows a try that ended for `cause`.

    fruitless: starts without progress, this one included (`starts_without_progress`).
    """
    if cause is Cause.DONE:
        return Decision(False, "done")
    if cause is Cause.MISTAKE:
        return Decision(False, "the run file or its data is wrong, see the message above: not tried again")
    if fruitless > limits.max_retries:
        starts = "1 start" if fruitless == 1 else f"{fruitless} starts"
        hint = " The time limit may be too short: see docs/slurm.md." if cause is Cause.STOPPED else ""
        return Decision(
            False,
            f"{_WORDS[cause]}: not tried again, since {starts} brought no new checkpoint "
            f"(RAPTR_MAX_RETRIES={limits.max_retries}).{hint}",
        )
    if cause is Cause.STOPPED or fruitless == 0:
        return Decision(True, _WORDS[cause])
    patience = _STORAGE_PATIENCE if cause is Cause.STORAGE else 1
    delay = limits.delay_seconds * patience * _GROWTH ** min(fruitless - 1, _MOST_GROWTHS)
    return Decision(True, f"{_WORDS[cause]}, retry {fruitless} of {limits.max_retries} without progress", delay)


_WORDS = {
    Cause.STOPPED: "stopped with a checkpoint",
    Cause.PORT: "the port at which the ranks meet was taken",
    Cause.OCCUPIED: "another process still works in the run's folder",
    Cause.STORAGE: "a checkpoint or a needed file could not be written",
    Cause.HUNG: "a rank did not move",
    Cause.FAULT: "a fault ended the step",
}
