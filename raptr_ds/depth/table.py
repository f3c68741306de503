"""depth.json: what a model loses at each depth, and what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.depth.held_out import HeldOut
from raptr_ds.depth.network import open_network
from raptr_ds.depth.removal import DepthRow, remove_greedily
from raptr_ds.depth.source import ModelSource
from raptr_ds.errors import ConfigError, DataError, StorageError
from raptr_ds.json_text import parse_json
from raptr_ds.user_paths import PathError, is_file, write_error

TABLE = "depth.json"


@dataclass(frozen=True)
class DepthTable:
    """Greedy removal from the whole model down to one layer.

    label: the model's name. step: of its checkpoint. digest: of its weights. held_out: see HeldOut.to_dict.
    rows: the whole model first.
    """

    label: str
    step: int
    digest: str
    held_out: dict[str, Any]
    rows: tuple[DepthRow, ...]

    def row(self, depth: int) -> DepthRow:
        """Return the row of a depth, 1 up to the model's layers."""
        return self.rows[len(self.rows) - depth]

    def save(self, file: Path) -> None:
        """Write the table. Raises: PathError or StorageError if the disk does not take it."""
        content = {**asdict(self), "rows": [{"depth": row.depth, **asdict(row)} for row in self.rows]}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise write_error(file, error, "Give your user permission to write there.") from error


def depth_table(
    source: ModelSource,
    held_out: HeldOut,
    file: Path | None = None,
    on_row: Callable[[DepthRow], None] = lambda row: None,
) -> tuple[DepthTable, str]:
    """Return the table of a model, read if it is of the same text, else measured, and a line on where it is.

    file: by default depth.json in the model's folder. A model whose folder may not be written, another user's perhaps,
    is measured nevertheless. Raises: DataError for a damaged table.
    """
    file = file or source.folder / TABLE
    found, text = read_table(file, source), held_out.to_dict()
    if found is not None and found.held_out == text:
        return found, f"found in {file}"
    with open_network(source.trained) as network:
        rows = remove_greedily(network, source, held_out, on_row=on_row)
    table = DepthTable(source.label, source.trained.step, source.digest, text, tuple(rows))
    try:
        table.save(file)
    except (PathError, StorageError) as error:
        return table, f"not kept: {error}"
    return table, f"written to {file}"


def read_table(file: Path, source: ModelSource) -> DepthTable | None:
    """Return the table in a file; None if there is none, or it is of other weights.

    Raises: DataError if it cannot be read.
    """
    if not is_file(file):
        return None
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        rows = tuple(
            DepthRow(
                tuple(map(int, row["layers"])), *(float(row[key]) for key in ("residual_scale", "loss", "exit_loss"))
            )
            for row in content["rows"]
        )
        table = DepthTable(
            str(content["label"]), int(content["step"]), str(content["digest"]), dict(content["held_out"]), rows
        )
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}. Check its permissions.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is no table of depths ({type(error).__name__}: {error}). Remove it.") from error
    if table.digest != source.digest:
        return None
    whole = tuple(range(source.num_layers))
    depths = [row.depth for row in table.rows]
    if depths != list(range(source.num_layers, 0, -1)) or not all(set(row.layers) <= set(whole) for row in table.rows):
        raise DataError(f"{file} is no table of all depths of {source.num_layers} layers. Remove it.")
    return replace(table, label=source.label)


def check_comparable(sources: Sequence[ModelSource], texts: Sequence[HeldOut]) -> None:
    """Check that losses of several models are of the same predictions. Raises: ConfigError if one's are not."""
    first, text = sources[0], texts[0].to_dict()
    for source, held_out in zip(sources[1:], texts[1:], strict=True):
        other_text = held_out.to_dict()
        differing = [key for key in text if text[key] != other_text[key]]
        here, there = ({key: one[key] for key in differing} for one in (text, other_text))
        for what, one, other, text_helps in (
            ("architectures", first.trained.model.architecture, source.trained.model.architecture, False),
            ("tokenizers", first.tokenizer.digest, source.tokenizer.digest, False),
            ("sequence lengths", first.trained.model.seq_length, source.trained.model.seq_length, False),
            ("held-out text", here, there, "objective" not in differing),
        ):
            if one != other:
                fix = "Give both the same text with --data FOLDER, or draw" if text_helps else "Draw"
                raise ConfigError(
                    f"{first.label} and {source.label} have different {what} ({one} and {other}): their losses do not "
                    f"compare. {fix} them one by one."
                )
