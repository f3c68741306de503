"""The command lines of prepare_data.py and train_tokenizer.py: what is refused, before anything is read or written."""

import argparse
import gzip
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from raptr_ds.config.overrides import apply_overrides
from raptr_ds.errors import Exit, RaptrError
from raptr_ds.prepare.tokenizer_training import TokenizerSettings
from tests.made_up_text import made_up_text

TOOLS = Path(__file__).parents[3] / "tools"
TOO_LONG = "a" * 300


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with text in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(TOOLS)
    (tmp_path / "text.txt").write_text(made_up_text(0, 100))
    return tmp_path


def refusal(tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message with which a command ends, and check that it has the exit code of a user's error."""
    module: ModuleType = importlib.import_module(tool)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises((SystemExit, RaptrError)) as caught:
        module.main()
    if isinstance(caught.value, RaptrError):
        assert caught.value.exit_code == Exit.USER_ERROR
        return str(caught.value)
    assert caught.value.code == Exit.USER_ERROR
    return capsys.readouterr().err


NUMBERS = {
    "--vocab-size 0": "--vocab-size 0 leaves no room for text: .* take 522. Raise",
    "--vocab-size -1": "--vocab-size -1 leaves no room",
    "--vocab-size 522": "--vocab-size 522 leaves no room",
    "--vocab-size 99999999999": "more than ids can number",
    "--sentinels -1": "--sentinels -1 must be at least 0",
    "--tokenizer-sample-bytes 0": "--tokenizer-sample-bytes 0 must be at least 1",
    "--tokenizer-sample-bytes -5": "--tokenizer-sample-bytes -5 must be at least 1",
}
SOURCES = {
    "--input=": "argument --input: the value is empty",
    "--dataset=": "argument --dataset: the value is empty",
    "--dataset-config en": "describe a dataset. Name it with --dataset",
    "--dataset-split test": "describe a dataset. Name it with --dataset",
    "--input none": "none does not exist",
    f"--input {TOO_LONG}": "cannot be used: File name too long",
    "--input -": "a pipe or device",
    "--input /dev/null": "a pipe or device",
}


@pytest.mark.parametrize(("options", "message"), [*NUMBERS.items(), *SOURCES.items()])
@pytest.mark.parametrize("tool", ["prepare_data", "train_tokenizer"])
def test_both_commands_refuse(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    options: str,
    message: str,
) -> None:
    given = ["--input", "text.txt", "--output", "out", *options.split()]
    assert re.search(message, refusal(tool, monkeypatch, capsys, *given))
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--workers 0", "--workers: '0' must be a whole number, 1 to"),
        ("--workers -2", "--workers: '-2' must be a whole number"),
        ("--tokenizer=", "argument --tokenizer: the value is empty"),
        ("--tokenizer t.model --vocab-size 0", "--vocab-size is for training a tokenizer"),
        ("--tokenizer t.model --model-type bpe", "--model-type is for training a tokenizer"),
        ("--tokenizer t.model --tokenizer-sample-bytes 9", "--tokenizer-sample-bytes is for training a tokenizer"),
        ("--validation-fraction nan", "--validation-fraction nan must lie between 0 and 1"),
        ("--output=", "argument --output: the value is empty"),
        ("--output text.txt", "text.txt cannot be written"),
        (f"--output {TOO_LONG}", "cannot be used: File name too long"),
        (f"--overwrite --output {TOO_LONG}/x", "cannot be used: File name too long"),
    ],
)
def test_prepare_data_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    given = ["--input", "text.txt", "--output", "out", *options.split()]
    assert re.search(message, refusal("prepare_data", monkeypatch, capsys, *given))
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("tool", ["prepare_data", "train_tokenizer"])
def test_no_more_workers_than_processors_that_may_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    """A job has a few of a large machine's."""
    module: ModuleType = importlib.import_module(tool)
    found: list[int] = []

    def stop(arguments: argparse.Namespace, workers: int, console: object) -> None:
        found.append(workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "corpus_sources", stop)
    monkeypatch.setattr(sys, "argv", [tool, "--input", "text.txt", "--output", "out"])
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with pytest.raises(KeyboardInterrupt):
            module.main()
    finally:
        os.sched_setaffinity(0, allowed)
    assert found == [1]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "argument --output: the value is empty"),
        (".", "is a folder: name a file in it, such as tokenizer.model"),
        ("text.txt/a.model", "text.txt/a.model cannot be written"),
        (TOO_LONG, "cannot be used: File name too long"),
    ],
)
def test_train_tokenizer_refuses_an_output_before_it_trains(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    monkeypatch.setattr("raptr_ds.prepare.tokenizer_training._train", lambda *arguments: pytest.fail("it trained"))
    given = ["--input", "text.txt", f"--output={output}"]
    assert re.search(message, refusal("train_tokenizer", monkeypatch, capsys, *given))


def test_an_option_that_is_given_again_adds_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    parser = argparse.ArgumentParser()
    importlib.import_module("prepare_data").add_corpus_arguments(parser)
    given = parser.parse_args(["--input", "a", "b", "--corpus", "film-reviews", "--input", "c", "--corpus", "embedded"])
    assert given.input == [Path("a"), Path("b"), Path("c")]
    assert given.corpus == ["film-reviews", "embedded"]


def test_a_pipe_is_refused_with_what_to_do(folder: Path) -> None:
    """`--input <(zcat ...)`: the shell gives the command a path such as /dev/fd/63."""
    (folder / "text.txt.gz").write_bytes(gzip.compress((folder / "text.txt").read_bytes()))
    command = f"{sys.executable} {TOOLS}/prepare_data.py --input <(zcat text.txt.gz) --output out"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == Exit.USER_ERROR
    assert "Write its content to a file" in done.stderr
    assert "does not exist" not in done.stderr


def test_the_printed_setting_leads_to_a_folder_named_by_a_number(folder: Path) -> None:
    command = [sys.executable, TOOLS / "prepare_data.py", "--input", ".", "--output", "2024", "--sentinels", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    words = shlex.split(done.stdout.splitlines()[-1].removeprefix("train on it with --set "))
    assert apply_overrides({}, words)[0] == {"raptr_ds": {"data": {"path": "2024"}}}


def test_names_that_are_not_utf8_are_read_written_and_printed(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (folder / f"{name}.txt").write_text(made_up_text(1, 100))
    command = [sys.executable, TOOLS / "prepare_data.py", "--input", ".", "--output", name, "--sentinels", "8"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"data.path=caf\\udce9" in done.stdout
    assert (folder / name / "manifest.json").exists()


def test_without_a_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    importlib.import_module("prepare_data").add_corpus_arguments(argparse.ArgumentParser())


def test_no_sentinels_are_a_choice() -> None:
    assert TokenizerSettings(num_sentinels=0).smallest_vocab_size < TokenizerSettings().smallest_vocab_size
