"""The errors that users see: each says what is wrong, the values, the rule, and how to fix it."""

import difflib
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path


class Exit(IntEnum):
    """Exit codes of a run; part of the contract with users."""

    DONE = 0
    FAULT = 1
    USER_ERROR = 2
    STORAGE = 74
    CONTINUE_LATER = 75
    HUNG = 76
    LOST_RANK = 77


# Launchers kill all ranks when the first one ends: those that print nothing stay so long, behind the one that prints.
FIRST_WORD_SECONDS = 2.0


class RaptrError(Exception):
    """Base of all errors that are shown to the user as a message, without a traceback.

    is_of_one_rank: not all ranks raise the same one. is_first: whether this rank then prints its own.
    """

    exit_code: Exit = Exit.FAULT
    is_of_one_rank = False
    is_first = True

    def is_printed_by(self, rank: int) -> bool:
        """Whether this rank prints the error: of one that all ranks raise, the first rank."""
        return self.is_first if self.is_of_one_rank else rank == 0


class ConfigError(RaptrError):
    """The run file, an override or the launch does not describe a valid run."""

    exit_code = Exit.USER_ERROR


class DataError(RaptrError):
    """A corpus, a tokenizer or an indexed dataset cannot be used."""

    exit_code = Exit.USER_ERROR


class CheckpointError(RaptrError):
    """A checkpoint cannot be written or read, or belongs to another model."""

    exit_code = Exit.USER_ERROR


class StorageError(RaptrError):
    """A disk is full or failing: what was to be written is not there. Started again later, the run may go on."""

    exit_code = Exit.STORAGE


class AgreementError(RaptrError):
    """Ranks do not hold the same path for a step; training on would corrupt gradients."""


class DeviceMemoryError(RaptrError):
    """A device has too little memory for the run; raised on the ranks that ran out, the first of which prints it.

    Its exit code is USER_ERROR before the first step is trained, FAULT later.
    """


class AbsentRankError(RaptrError):
    """Some ranks of the run have not started; rank 0 may be one of them."""

    is_of_one_rank = True


class LostRankError(RaptrError):
    """A connection to another rank broke: that rank ended first, whichever end a launcher reports first."""

    exit_code = Exit.LOST_RANK
    is_of_one_rank = True


class NonFiniteError(RaptrError):
    """Too many steps in a row had a loss or gradient that is not finite; the weights are those from before them."""


def refused(file: Path, problems: Sequence[str]) -> ConfigError:
    """Return the error of a file that has these problems, at least one: several are numbered, a line each."""
    if len(problems) == 1:
        return ConfigError(f"{file}: {problems[0]}")
    listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
    return ConfigError(f"{file}: {len(problems)} problems:\n{listed}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""
