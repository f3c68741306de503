"""The depth table of a model: the one beside it if it is of the same weights and text, else measured and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raptr_ds.depth.held_out import HeldOut
from raptr_ds.depth.network import open_network
from raptr_ds.depth.removal import DepthRow, remove_greedily
from raptr_ds.depth.source import ModelSource
from raptr_ds.depth.table import TABLE, DepthTable, read_table
from raptr_ds.errors import StorageError
from raptr_ds.user_paths import PathError


def depth_table(
    source: ModelSource,
    held_out: HeldOut,
    file: Path | None = None,
    on_row: Callable[[DepthRow], None] = lambda row: None,
) -> tuple[DepthTable, str]:
    """Return the table, and a line on where it is. file: by default depth.json in the model's folder.

    A model whose folder may not be written, another user's perhaps, is measured nevertheless.
    Raises: DataError for a damaged table.
    """
    file = file or source.folder / TABLE
    found = read_table(file, source)
    if found is not None and found.held_out == held_out.to_dict():
        return found, f"found in {file}"
    with open_network(source.trained) as network:
        rows = remove_greedily(network, source, held_out, on_row=on_row)
    table = DepthTable.of(source, held_out, rows)
    try:
        table.save(file)
    except (PathError, StorageError) as error:
        return table, f"not kept: {error}"
    return table, f"written to {file}"
