"""Schedules: the lengths or widths of a run's phases, by name or as numbers, and how its steps are split among them."""

import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from raptr_ds.config.section_types import OpenFraction
from raptr_ds.errors import nearest

NAMED_SCHEDULES = {
    "paper": (6, 8, 10, 12),
    "half": (2, 3, 7, 12),
    "late": (3, 3, 3, 3, 12),
    "one_expansion": (0, 0, 0, 0, 12),
    "gradual": (6, 9, 12),
    "doubling": (3, 6, 12),
}
"""Phases by name, in twelfths of the model, 0 for one layer: RaPTr's paper; half of its work, paths that stay short
until the last fifth, and one layer until then (docs/results.md has what these are worth); gradual and progressive
stacking."""


def named_schedule(name: str, num_parts: int, least: int = 1) -> tuple[int, ...]:
    """Return the phases of a named schedule for a model of num_parts layers, or for layers of num_parts heads.

    Rounded half up, and at least `least`: `paper` gives 6-8-10-12 for 12 layers, 12-16-20-24 for 24.
    """
    return tuple(min(num_parts, max(least, 1, (num_parts * share + 6) // 12)) for share in NAMED_SCHEDULES[name])


def _schedule_text(value: Any) -> Any:
    """Let a single phase be written as a bare number: `--set raptr_ds.path.schedule=12`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Schedule = Annotated[str, BeforeValidator(_schedule_text)]


Split = Annotated[
    Annotated[str, Tag("preset")] | Annotated[tuple[OpenFraction, ...], Field(strict=False), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "preset"),
]


def read_schedule(schedule: str | None, may_begin_empty: bool = False) -> tuple[int, ...]:
    """Return the numbers of a schedule's phases; nothing if it cannot be read. may_begin_empty: with a phase of 0."""
    first = r"(0|[1-9]\d{0,8})" if may_begin_empty else r"[1-9]\d{0,8}"
    is_readable = re.fullmatch(first + r"(-[1-9]\d{0,8})*", schedule or "")
    return tuple(int(part) for part in (schedule or "").split("-")) if is_readable else ()


def broken_schedule(key: str, text: str | None, lengths: tuple[int, ...], most: int, parts: str) -> Iterator[str]:
    """Yield a message for each rule that a schedule of up to `most` layers or heads breaks."""
    schedule = f"raptr_ds.path.{key}={text!r}"
    if not lengths:
        yield (
            f"{schedule} must be path lengths, whole numbers from 1, joined by '-', one for each phase, or "
            f"{' or '.join(map(repr, NAMED_SCHEDULES))}. Write it as '6-8-10-12', or remove it: one is derived."
        )
        return
    if max(lengths) > most or lengths[-1] != most:
        size = "num_layers" if parts == "layers" else "num_attention_heads"
        wrong = (
            f"asks for more than the model has: {max(lengths)} {parts}"
            if max(lengths) > most
            else f"must end with the full model, not at {lengths[-1]} {parts}"
        )
        yield (
            f"{schedule} {wrong}; raptr_ds.model.{size}={most}. End it with {most} and keep the other phases at "
            "most that, or remove it: one for the model is derived."
        )
    if list(lengths) != sorted(lengths):
        yield (
            f"{schedule} shrinks from one phase to the next; path lengths must grow or stay. Write "
            f"{'-'.join(map(str, sorted(lengths)))!r}, or use method 'pld' to drop more with time."
        )


def numbers_of(name: str, num_parts: int, least: int) -> str:
    """Return a named schedule in numbers, as it is written in a run file."""
    return "-".join(map(str, named_schedule(name, num_parts, least)))


def broken_split(split: str | tuple[float, ...], schedule: str | None, num_phases: int) -> Iterator[str]:
    """Yield a message if a split cannot be read or does not fit a schedule of so many phases."""
    if isinstance(split, str):
        if split not in ("uniform", "proportional") and not re.fullmatch(r"power:\d{1,2}(\.\d{1,9})?", split):
            guess = nearest(split, ["uniform", "proportional", "power:1"]) or "."
            yield (
                f"raptr_ds.path.split={split!r} must be uniform, proportional, power:A with a number A, as power:1, "
                f"or a list of fractions of the steps, as [0.8, 0.2]{guess}"
            )
        elif split.startswith("power:") and float(split[6:]) * math.log10(num_phases) > 300:
            yield (
                f"raptr_ds.path.split={split!r} is too high a power for {num_phases} phases: {num_phases} to this "
                "power is beyond floating point. Lower it, or write fewer phases."
            )
    elif len(split) != num_phases or abs(sum(split) - 1) > 1e-6:
        yield (
            f"raptr_ds.path.split={list(split)} must have a fraction of the steps for each of the {num_phases} phases "
            f"of schedule={schedule!r}, which add up to 1; it has {len(split)}, which add up to {sum(split):.6g}. "
            "Correct it, or write uniform, proportional or power:1."
        )


def idle_phases(
    schedule: str | None, split: str | tuple[float, ...], lengths: Sequence[int], counts: Sequence[int]
) -> Iterator[str]:
    """Yield a line if phases have no steps. lengths, counts: of each phase, its schedule's number and its steps."""
    idle = [str(length) for length, count in zip(lengths, counts, strict=True) if not count]
    if idle:
        yield (
            f"raptr_ds.path.schedule={schedule!r} with split={split!r}: of its {sum(counts)} steps none is in the "
            f"phase of {' or '.join(idle)}. Train for more steps, or change split, unless you mean that."
        )


def steps_of_phases(lengths: Sequence[int], num_steps: int, split: str | Sequence[float]) -> list[int]:
    """Return the number of steps of each phase; may be 0.

    The R steps are divided by weights: 1 for each phase (uniform), its path length (proportional: a phase of twice the
    length gets twice the steps), its number from 1 to a power (power:A), or its own of `split`. Phase s ends after
    R * (w_0 + ... + w_s) / (w_0 + ... + w_last) steps, rounded to the nearest whole step, halves up; rounding the
    cumulative sums, not the parts, covers all steps exactly.
    """
    weights = _weights(lengths, split)
    total = sum(weights)
    # Exact arithmetic, free of rounding errors at any number of steps.
    ends = [math.floor(num_steps * weight / total + Fraction(1, 2)) for weight in accumulate(weights)]
    return [end - start for start, end in pairwise((0, *ends))]


def _weights(lengths: Sequence[int], split: str | Sequence[float]) -> list[Fraction]:
    if not isinstance(split, str):
        return [Fraction(str(share)) for share in split]  # as it is written: 0.8 is four fifths
    kind, _, power = split.partition(":")
    if kind == "power":
        return [Fraction(number ** float(power)) for number in range(1, len(lengths) + 1)]
    return [Fraction(length if kind == "proportional" else 1) for length in lengths]
