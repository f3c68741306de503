"""Slurm's time limits, and whether one leaves a start of a run enough time before the signal to save."""

import re

from raptr_ds.errors import ConfigError

_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?|(?P<plain>[\d:]+))")


def limit_seconds(time: str) -> int | None:
    """Return a time limit as sbatch takes it in seconds; None for none: UNLIMITED or 0. Raises: ConfigError."""
    if time.upper() in {"UNLIMITED", "INFINITE"}:
        return None
    match = _TIME.fullmatch(time)
    numbers = match["plain"].split(":") if match and match["plain"] else []
    if match is None or not all(numbers) or len(numbers) > 3:
        raise ConfigError(
            f"--time {time!r} is not a time limit. Slurm takes MINUTES, HOURS:MINUTES:SECONDS, DAYS-HOURS and "
            "DAYS-HOURS:MINUTES:SECONDS: --time 2-0 for two days."
        )
    if not numbers:
        days, hours, minutes, seconds = (int(match[part] or 0) for part in ("days", "hours", "minutes", "seconds"))
    else:
        days = 0
        hours, minutes, seconds = ([0, *map(int, numbers), 0] if len(numbers) < 3 else list(map(int, numbers)))[:3]
    return (((days * 24 + hours) * 60 + minutes) * 60 + seconds) or None


def short_limit(limit: int, lead: int) -> str | None:
    """Return what is wrong with a limit that is hardly longer than the signal's lead, both in seconds; else None."""
    if limit > 2 * lead:
        return None
    return (
        f"the time limit is {limit} s, and the signal to save comes {lead} s before its end, so that a start trains "
        f"{max(0, limit - lead)} s at most. Give --time={-(-10 * lead // 60)} (minutes) or more, or a shorter lead "
        f"that one step and one save fit into: {max(1, limit // 5)} s (--signal-lead of tools/submit.py, "
        "--signal=B:USR1@SECONDS of sbatch)."
    )
