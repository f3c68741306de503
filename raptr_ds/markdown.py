"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], below: str = "---") -> list[str]:
    """Return a table as lines. below: what stands below every title but the first; ---: aligns a column right."""
    first, *lines = (f"|{''.join(map(_cell, row))}" for row in [head, *rows])
    return [first, f"|---|{f'{below}|' * (len(head) - 1)}", *lines]


def _cell(content: object) -> str:
    text = str(content).replace("|", "\\|")
    return f" {text} |" if text else " |"
