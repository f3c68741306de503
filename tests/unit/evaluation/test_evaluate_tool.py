"""tools/evaluate.py: a table and JSON from runs, checkpoints and exported folders, and bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.evaluation.run import Outcome, run_tasks
from raptr_ds.parallel.groups import ProcessGroups
from tests.exported_runs import Tool, is_refused, model_of, run_folder
from tests.small_tasks import words


def results_of(tool: Tool, model: Path, task_files: Path, *options: object) -> tuple[dict, str]:
    """Return what --output holds, and what was printed."""
    output = task_files.parent / "out.json"
    done = tool("evaluate.py", model, "--task-files", task_files, "--output", output, *options)
    assert done.code == 0, done
    return json.loads(output.read_text()), done.printed


def test_a_table_and_json(run: Path, task_files: Path, tool: Tool) -> None:
    found, printed = results_of(tool, run, task_files, "--tasks", "boolq,cb,nq_open", "--limit", 5)
    assert found["model"] == str(run)
    assert set(found["results"]) == {"boolq", "cb", "nq_open"}
    boolq = found["results"]["boolq"]
    assert set(boolq) == {"shots", "acc", "acc_stderr", "bits_per_byte", "bits_per_byte_stderr"}
    assert boolq["shots"] == 0
    assert f"{boolq['acc']:.4f} ± {boolq['acc_stderr']:.4f}" in printed
    assert found["results"]["cb"]["f1_stderr"] is None  # the harness has none for this average over classes
    assert found["tasks"]["boolq"] | {"higher_is_better": None} == {
        "documents": 5,
        "of": 9,
        "version": 2.0,
        "examples_from": None,
        "truncated": 3,
        "higher_is_better": None,
    }
    for word in ("boolq", "nq_open", "exact_match ↑", "bits_per_byte ↓", "prefix"):
        assert word in printed
    assert "causal" not in printed


def test_the_models_name_is_printed_as_it_is(exported: Path, task_files: Path, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "a[b]:x:").symlink_to(exported)
    _, printed = results_of(tool, tmp_path / "a[b]:x:", task_files, "--tasks", "cb", "--limit", 1)
    assert "a[b]:x:" in "".join(printed.split())


def test_every_kind_of_folder_gives_the_same(run: Path, exported: Path, task_files: Path, tool: Tool) -> None:
    step = run / "checkpoints" / "step-00000003"
    options = ("--tasks", "boolq,nq_open", "--local_rank=0")  # which the deepspeed launcher adds
    every = [results_of(tool, at, task_files, *options)[0]["results"] for at in (run, step, exported)]
    assert every[0] == every[1] == every[2]


def test_examples_causal_scores_and_notes(run: Path, task_files: Path, tool: Tool) -> None:
    options = ("--tasks", "boolq,cb", "--shots", "0,2", "--causal", "--mode", "NLG", "--batch-size", 3)
    found, printed = results_of(tool, run, task_files, *options)
    assert list(found["results"]) == ["boolq@0", "cb@0", "boolq@2", "cb@2"]
    for entry in found["results"].values():
        assert entry["bits_per_byte"] != entry["bits_per_byte_causal"]
    assert found["results"]["boolq@0"]["bits_per_byte"] != found["results"]["boolq@2"]["bits_per_byte"]
    assert [found["tasks"][f"{name}@2"]["examples_from"] for name in ("boolq", "cb")] == ["train", "validation"]
    assert "cb: examples are other documents of its validation split" in printed
    assert "boolq: examples" not in printed
    assert found["tasks"]["boolq@2"]["truncated"] > 0
    assert "boolq, 2 shots: " in printed
    assert "lost their beginning" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tasks", "boolq,copa,wic"), ["has no files of copa, wic", "--tasks copa", "--tasks boolq"]),
        (("--tasks", "boolq", "--shots", "6"), ["boolq has 6 documents to take examples from"]),
        (("--tasks", "boolq", "--output", f"{__file__}/out.json"), ["out.json cannot be written", "another --output"]),
        (("--tasks", "boolq", "--output", "."), ["--output . is a folder", "results.json"]),
        (("--tasks", "boolq", "--device", "cuda:77"), ["--device cuda:77 cannot be used"]),
        (("--tasks", "boolq", "--device", "abc"), ["--device abc cannot be used"]),
    ],
)
def test_tasks_that_cannot_be_run(
    run: Path, task_files: Path, tool: Tool, options: tuple[str, ...], words: list[str]
) -> None:
    assert is_refused(tool("evaluate.py", run, "--task-files", task_files, *options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give MODEL and --tasks, or --fetch FOLDER"),
        (("--tasks", ","), "name at least one task"),
        (("--tasks", "boolq", "--shots", "0,x"), "'x' must be a whole number"),
        (("--tasks", "boolq", "--shots", "-1"), "'-1' must be a whole number, 0 to"),
        (("--tasks", "boolq", "--limit", "0"), "'0' must be a whole number, 1 to"),
        (("--tasks", "boolq", "--fetch", "x"), "--fetch needs no MODEL"),
    ],
)
def test_options_that_are_none(run: Path, tool: Tool, options: tuple[str, ...], words: str) -> None:
    done = tool("evaluate.py", run, *options)
    assert done.code == 2
    assert words in done.error


def test_finished_tasks_are_shown_where_a_later_one_is_refused(
    run: Path, task_files: Path, tool: Tool, tmp_path: Path
) -> None:
    """A choice is longer than the model takes; a gold answer may be."""
    folder, long = tmp_path / "files", " ".join(words(3))
    shutil.copytree(task_files, folder)
    for task, row in (
        ("nq_open", {"question": "who", "answer": [long]}),
        ("copa", {"premise": "It fell.", "choice1": "a", "choice2": long, "question": "cause", "idx": 0, "label": 0}),
    ):
        (folder / task).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row] * 2), folder / task / "validation.parquet")
    output = tmp_path / "out.json"
    options = ("--task-files", folder, "--output", output)
    done = tool("evaluate.py", run, "--tasks", "boolq,nq_open,copa,cb", *options)
    assert done.code == 2
    assert done.error.splitlines()[-1].startswith("error: task copa: a continuation has 150 tokens")
    assert "boolq" in done.printed
    results = json.loads(output.read_text())["results"]
    assert set(results) == {"boolq", "nq_open"}
    assert set(results["nq_open"]) == {"shots", "exact_match", "exact_match_stderr"}
    assert tool("evaluate.py", run, "--tasks", "boolq,copa", "--shots", "0,1", *options).code == 2
    assert set(json.loads(output.read_text())["results"]) == {"boolq@0"}
    output.unlink()
    assert tool("evaluate.py", run, "--tasks", "copa", *options).code == 2
    assert not output.exists()


def test_finished_tasks_are_shown_where_a_later_one_is_interrupted(
    run: Path, task_files: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Iterator[Outcome]:
        yield next(run_tasks(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr("raptr_ds.evaluation.run.run_tasks", interrupted)
    output = tmp_path / "out.json"
    done = tool("evaluate.py", run, "--tasks", "boolq,cb", "--task-files", task_files, "--output", output)
    assert done.code == 130
    assert done.error.endswith("interrupted\n")
    assert "boolq" in done.printed
    assert set(json.loads(output.read_text())["results"]) == {"boolq"}


def test_a_check_needs_no_model(task_files: Path, tool: Tool) -> None:
    done = tool("evaluate.py", "--check", "--tasks", "boolq,cb", "--task-files", task_files)
    assert (done.code, done.error, done.printed) == (0, "", "can be evaluated: boolq, cb\n")
    assert is_refused(tool("evaluate.py", "--check", "--tasks", "bolq", "--task-files", task_files), "bolq", "boolq")
    assert is_refused(tool("evaluate.py", "--check", "--tasks", "wic", "--task-files", task_files), "wic", "--fetch")
    assert is_refused(tool("evaluate.py", "--check", "--tasks", "boolq", "--task-files", "gone"), "gone")


def test_folders_that_are_no_model(run: Path, exported: Path, task_files: Path, tool: Tool, tmp_path: Path) -> None:
    def refused(model: Path, *words: object) -> bool:
        return is_refused(tool("evaluate.py", model, "--tasks", "boolq", "--task-files", task_files), *words)

    without = tmp_path / "without"
    shutil.copytree(exported, without)
    for file in without.glob("tokenizer*"):
        file.unlink()
    assert refused(without, "has no tokenizer")
    assert refused(tmp_path / "nothing", "there is no such folder")
    done = tool("evaluate.py", run, "--tasks", "boolq", "--task-files", tmp_path / "nothing")
    assert is_refused(done, "--task-files", "--fetch FOLDER makes one")
    (tmp_path / "file").write_text("")
    done = tool("evaluate.py", "--fetch", tmp_path / "file", "--tasks", "boolq")
    assert is_refused(done, f"--fetch {tmp_path / 'file'} is a file")


def test_bert_is_for_fine_tuning(
    groups: ProcessGroups, tokenizer: Tokenizer, task_files: Path, tool: Tool, tmp_path: Path
) -> None:
    run_folder(tmp_path / "run", groups, model_of("bert", tokenizer.vocab_size), tokenizer)
    assert tool("export_hf.py", tmp_path / "run", tmp_path / "exported").code == 0
    for folder in ("run", "exported"):
        done = tool("evaluate.py", tmp_path / folder, "--tasks", "boolq", "--task-files", task_files)
        assert is_refused(done, "fine-tuned: tools/finetune.py")
