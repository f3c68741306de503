"""The depth table of a model: the one beside it if it is of the same weights and text, else measured and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raptr_ds.depth.held_out import HeldOut
from raptr_ds.depth.network import open_network
from raptr_ds.depth.removal import DepthRow, remove_greedily
from raptr_ds.depth.source import ModelSource
from raptr_ds.depth.table import TABLE, DepthTable, read_table


def depth_table(
    source: ModelSource,
    held_out: HeldOut,
    file: Path | None = None,
    on_row: Callable[[DepthRow], None] = lambda row: None,
) -> tuple[DepthTable, bool]:
    """Return the table, and whether it was there. file: by default depth.json in the model's folder.

    Raises: DataError for a damaged table, PathError or StorageError if it cannot be written.
    """
    file = file or source.folder / TABLE
    found = read_table(file, source)
    if found is not None and found.held_out == held_out.to_dict():
        return found, True
    with open_network(source.trained) as network:
        rows = remove_greedily(network, source, held_out, on_row=on_row)
    table = DepthTable.of(source, held_out, rows)
    table.save(file)
    return table, False
