"""Schedules: the lengths or widths of a run's phases, by name or as numbers, and how its steps are split among them."""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag

from raptr_ds.config.section_types import OpenFraction
from raptr_ds.errors import nearest

NAMED_SCHEDULES = {
    "paper": (6, 8, 10, 12),
    "half": (2, 3, 7, 12),
    "gradual": (6, 9, 12),
    "doubling": (3, 6, 12),
}
"""Phases by name, in twelfths of the model: RaPTr's paper; half of its work (docs/results.md has what that is worth);
gradual and progressive stacking."""


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
    elif len(split) != num_phases or abs(sum(split) - 1) > 1e-6:
        yield (
            f"raptr_ds.path.split={list(split)} must have a fraction of the steps for each of the {num_phases} phases "
            f"of schedule={schedule!r}, which add up to 1; it has {len(split)}, which add up to {sum(split):.6g}. "
            "Correct it, or write uniform, proportional or power:1."
        )
