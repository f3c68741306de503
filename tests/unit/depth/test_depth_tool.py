"""tools/depth.py: tables and pictures of runs, checkpoints and exported folders; what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from raptr_ds.depth.held_out import read_held_out
from raptr_ds.depth.source import open_model
from raptr_ds.depth.table import depth_table, read_table
from raptr_ds.errors import DataError
from tests.depth_runs import MakeRun
from tests.exported_runs import Tool, is_refused

PNG = b"\x89PNG\r\n"


def test_one_model(make_run: MakeRun, tool: Tool) -> None:
    source, _ = make_run("bert", "one")
    done = tool("depth.py", source.folder, "--sequences", 8)
    assert done.code == 0, done.error
    table = read_table(source.folder / "depth.json", source)
    assert table is not None
    assert [table.row(depth).depth for depth in range(1, 6)] == [1, 2, 3, 4, 5]
    for row in table.rows:
        assert f"{row.loss:.4f}" in done.printed
        assert f"{row.exit_loss:.4f}" in done.printed
    assert "written to" in done.printed
    assert (source.folder / "depth.png").read_bytes().startswith(PNG)
    again = tool("depth.py", source.folder, "--sequences", 8)
    assert "found in" in again.printed
    assert f"{table.rows[0].loss:.4f}" in again.printed
    other = tool("depth.py", source.folder, "--sequences", 9)
    assert "written to" in other.printed


def test_several_models_in_one_picture(make_run: MakeRun, tool: Tool, tmp_path: Path) -> None:
    runs = [make_run("bert", name, path={"method": method})[0] for name, method in (("a", "raptr"), ("b", "full"))]
    done = tool("depth.py", *(run.folder for run in runs), "--sequences", 4)
    assert done.code == 0, done.error
    assert (runs[0].folder / "depth_comparison.png").read_bytes().startswith(PNG)
    assert all((run.folder / "depth.json").is_file() for run in runs)
    step = runs[0].folder / "checkpoints" / "step-00000003"
    done = tool("depth.py", runs[0].folder, step, "--sequences", 4, "--output", tmp_path / "new" / "c.png")
    assert done.code == 0, done.error
    assert "a, step 3" in done.printed
    assert (tmp_path / "new" / "c.png").is_file()


def test_names_are_printed_as_they_are(make_run: MakeRun, tool: Tool) -> None:
    """Neither brackets nor colons nor dollars in a run's name mean anything."""
    source, _ = make_run("bert", "a[half]:x:$_{$")
    done = tool("depth.py", source.folder, "--sequences", 2)
    assert done.code == 0, done.error
    assert "a[half]:x:$_{$" in done.printed.split("layers")[0]


def test_an_exported_folder_has_the_same_losses(make_run: MakeRun, tool: Tool, data_folder: Path) -> None:
    source, _ = make_run("ul2")
    out = source.folder.parent / "out"
    assert tool("export_hf.py", source.folder, out, "--tokenizer", source.tokenizer.origin).code == 0
    held_out = read_held_out(source, num_sequences=4)
    ours, _ = depth_table(source, held_out)
    exported = open_model(out)
    theirs, _ = depth_table(exported, read_held_out(exported, data_folder, num_sequences=4))
    assert exported.digest == source.digest
    assert theirs.rows == ours.rows
    assert is_refused(tool("depth.py", out), "does not record the data", "--data")


def test_models_that_do_not_compare(make_run: MakeRun, tool: Tool) -> None:
    bert, ul2, other = (
        make_run("bert", "a")[0],
        make_run("ul2", "b")[0],
        make_run("bert", "c", objective={"mask_rate": 0.5})[0],
    )
    assert is_refused(tool("depth.py", bert.folder, ul2.folder), "different architectures", "compare. Draw them")
    refused = tool("depth.py", bert.folder, other.folder)
    assert is_refused(refused, "different held-out text", "0.5", "compare. Draw them")
    assert "corpus" not in refused.error  # which is the same


def test_a_table_of_other_weights_does_not_count(make_run: MakeRun) -> None:
    source, _ = make_run("bert", "a")
    depth_table(source, read_held_out(source, num_sequences=4))
    file = source.folder / "depth.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "digest": "0" * 32}))
    assert read_table(file, source) is None
    assert depth_table(source, read_held_out(source, num_sequences=4))[1] == f"written to {file}"
    for damaged in (
        "{",
        "[]",
        json.dumps({**content, "rows": content["rows"][1:]}),
        json.dumps({**content, "rows": 3}),
    ):
        file.write_text(damaged)
        with pytest.raises(DataError, match="Remove it"):
            read_table(file, source)


def test_a_table_of_other_text_does_not_count_wherever_it_lies(
    make_run: MakeRun, data_folder: Path, tmp_path: Path
) -> None:
    source, _ = make_run("bert", objective={"mask_rate": 0.15})
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(data_folder, folder)
    table, _ = depth_table(source, read_held_out(source, first, 4))
    assert depth_table(source, read_held_out(source, second, 4)) == (table, f"found in {source.folder / 'depth.json'}")
    for file in second.glob("train.*"):
        file.unlink()
    assert depth_table(source, read_held_out(source, second, 4))[0] == table, "it is not read"
    tokens = np.fromfile(first / "validation.bin", np.uint16)
    is_text = tokens >= tokens.max() // 2  # special tokens and ends of documents stay
    tokens[is_text] = np.roll(tokens[is_text], 1)
    tokens.tofile(first / "validation.bin")
    other, where = depth_table(source, read_held_out(source, first, 4))
    assert where == f"written to {source.folder / 'depth.json'}"
    assert other.held_out["num_predictions"] == table.held_out["num_predictions"]
    assert other.rows[0].loss != table.rows[0].loss


def test_a_table_that_cannot_be_kept_is_measured_nevertheless(make_run: MakeRun) -> None:
    source, _ = make_run("bert")
    inside_a_file = source.folder / "config.json" / "depth.json"
    table, where = depth_table(source, read_held_out(source, num_sequences=4), inside_a_file)
    assert len(table.rows) == 5
    assert where.startswith("not kept: ")


def test_mistakes(make_run: MakeRun, tool: Tool, tmp_path: Path) -> None:
    source, _ = make_run("bert")
    config = source.folder / "config.json"
    assert is_refused(tool("depth.py", tmp_path / "nothing"), "there is no such folder")
    done = tool("depth.py", source.folder, "--sequences", 0)
    assert done.code == 2
    assert "--sequences: '0' must be a whole number" in done.error
    (tmp_path / "folder.png").mkdir()
    for name, why in (("folder.png", "is a folder"), ("depth.xyz", "ends in"), ("depth", "ends in")):
        assert is_refused(
            tool("depth.py", source.folder, "--output", tmp_path / name), f"--output {tmp_path / name}", why
        )
    assert not (source.folder / "depth.json").exists()
    assert is_refused(tool("depth.py", source.folder, "--data", tmp_path / "no"), "does not exist", "--data")
    config.write_text(json.dumps({"raptr_ds": {"data": {"path": "gone"}}}))
    done = tool("depth.py", source.folder, "--tokenizer", source.tokenizer.origin)
    assert is_refused(done, "gone does not exist", "--data FOLDER")
    config.write_text(json.dumps({"raptr_ds": {"data": {"path": "x"}, "objective": {"mask_rate": "much"}}}))
    done = tool("depth.py", source.folder, "--tokenizer", source.tokenizer.origin)
    assert is_refused(done, "damaged", "mask_rate")
    config.unlink()
    assert is_refused(tool("depth.py", source.folder), "--tokenizer FILE")
    done = tool("depth.py", source.folder, "--tokenizer", source.tokenizer.origin)
    assert is_refused(done, "does not record the data", "--data FOLDER")
