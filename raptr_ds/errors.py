"""The errors that users meet: each says what is wrong, the values, the rule and the mend."""

import difflib
from collections.abc import Iterable
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of a run; part of the contract with users."""

    DONE = 0
    FAULT = 1
    USER_ERROR = 2
    CONTINUE_LATER = 75


class RaptrError(Exception):
    """Base of all errors that carry a message for a person; is_told_by_all: every rank prints it, not rank 0 alone."""

    exit_code = Exit.FAULT
    is_told_by_all = False


class ConfigError(RaptrError):
    """The run file, an override or the launch does not make a valid run."""

    exit_code = Exit.USER_ERROR


class DataError(RaptrError):
    """A corpus, a tokenizer or an indexed dataset cannot be used."""

    exit_code = Exit.USER_ERROR


class CheckpointError(RaptrError):
    """A checkpoint cannot be written, read or belongs to another model."""

    exit_code = Exit.USER_ERROR


class AgreementError(RaptrError):
    """Ranks do not hold the same path for a step; training on would corrupt gradients."""


class AbsentRankError(RaptrError):
    """Some ranks of the run have not come; rank 0 may be one of them."""

    is_told_by_all = True


class NonFiniteError(RaptrError):
    """Too many steps in a row had a loss or gradient that is not finite; no weight has moved since before them."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""
