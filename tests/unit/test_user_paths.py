"""What is at a path that a user names: an answer, or one error with the path and the reason."""

import errno
import fcntl
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from raptr_ds import pretrain
from raptr_ds.checkpoint.folder import checkpoints_at, checkpoints_in
from raptr_ds.config.hjson_text import read_hjson
from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.loader import are_prepared
from raptr_ds.data.manifest import Manifest
from raptr_ds.data.tokenizer import read_model_file
from raptr_ds.errors import ConfigError, Exit, StorageError
from raptr_ds.hf.export import export
from raptr_ds.lab import runner
from raptr_ds.lab.file import load_experiment
from raptr_ds.plots.curves import load_curves
from raptr_ds.prepare.working_folder import working_folder
from raptr_ds.theory.transitions import transitions_of
from raptr_ds.user_paths import PathError, check_output, claimed, exists, is_file, is_folder, write_error
from tests.unprivileged import closed

TOO_LONG = Path("/", "a" * 300)


@pytest.fixture
def closed_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file inside that this process may not enter, whoever runs the tests."""
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with closed(folder):
        yield folder


@pytest.mark.parametrize(
    "work",
    [
        lambda folder: working_folder(folder, "", print),
        lambda folder: runner.claimed(folder, print),
        lambda folder: claimed(folder, "tool", ""),
    ],
    ids=["prepare_data", "experiment", "other tools"],
)
def test_a_file_system_without_locks_is_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Path], AbstractContextManager]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # as Lustre that is mounted without flock

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(PathError, match=r"cannot be locked: Function not implemented\. Name a folder on"),
        work(tmp_path),
    ):
        pass


@pytest.mark.parametrize("ask", [exists, is_file, is_folder])
def test_each_question_names_the_path_and_the_reason(ask: Callable[[str | Path], bool], closed_folder: Path) -> None:
    with pytest.raises(PathError, match=r"closed.*Permission denied.*permission to enter") as error:
        ask(closed_folder / "run.json")
    assert error.value.exit_code == Exit.USER_ERROR
    with pytest.raises(PathError, match=r"/a+\.\.\.a+ \(301 characters\).*File name too long.*shorter"):
        ask(TOO_LONG)
    with pytest.raises(PathError, match=r"a\\0b.*NUL byte"):
        ask("a\0b")


def test_answers(tmp_path: Path) -> None:
    file, pipe, link, circle = (tmp_path / name for name in ("file", "pipe", "link", "circle"))
    file.write_text("")
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "gone")
    circle.symlink_to(circle)
    questions = (exists, is_file, is_folder)
    answers = {
        file: (True, True, False),
        tmp_path: (True, False, True),
        pipe: (True, False, False),
        Path(os.devnull): (True, False, False),
        link: (False, False, False),
        file / "below a file": (False, False, False),
    }
    for path, expected in answers.items():
        assert tuple(ask(path) for ask in questions) == expected, path
    with pytest.raises(PathError, match="circle"):
        exists(circle)


READERS: dict[str, Callable[[Path], object]] = {
    "run file": read_hjson,
    "comparison file": load_experiment,
    "data folder": Manifest.load,
    "data folders": lambda path: are_prepared({str(path): 1.0}),
    "checkpoint.load": checkpoints_at,
    "checkpoints": checkpoints_in,
    "plot": load_curves,
    "transitions": lambda path: transitions_of(path, 1, 1),
    "export": lambda path: export(path, path / "out", None, "none"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_path_raises_it(reader: str, closed_folder: Path) -> None:
    for path in (closed_folder / "run.json", TOO_LONG / "run.json"):
        with pytest.raises(PathError, match=r"cannot be used: (Permission denied|File name too long)"):
            READERS[reader](path)


@pytest.mark.parametrize(
    ("reader", "method"),
    [
        (checkpoints_at, "stat"),
        (checkpoints_at, "iterdir"),
        (checkpoints_in, "stat"),
        (checkpoints_in, "iterdir"),
        (lambda folder: read_hjson(folder / "run.json"), "read_text"),
        (Manifest.load, "read_text"),
        (lambda folder: read_model_file(folder / "run.json"), "read_bytes"),
        (lambda folder: open_indexed(folder / "run", 8), "open"),
    ],
)
def test_a_file_system_that_is_away_is_not_the_users_mistake(
    reader: Callable[[Path], object], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(Path, method, away)
    with pytest.raises(StorageError, match=r"cannot be read: Stale file handle\. Its file system is away"):
        reader(tmp_path)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, Exit.USER_ERROR),
        (errno.ENOTDIR, Exit.USER_ERROR),
        (errno.ENOSPC, Exit.STORAGE),
        (errno.EROFS, Exit.STORAGE),
        (errno.ESTALE, Exit.STORAGE),
    ],
)
def test_a_full_or_failing_disk_is_not_the_users_mistake(number: int, code: Exit) -> None:
    error = write_error("run/metrics.jsonl", OSError(number, os.strerror(number)), "Name another folder.")
    assert error.exit_code == code
    assert str(error).startswith(f"run/metrics.jsonl cannot be written: {os.strerror(number)}. ")
    assert ("Name another folder." in str(error)) == (code == Exit.USER_ERROR)


def test_a_file_to_write_is_checked_and_its_folder_made(tmp_path: Path) -> None:
    for file in (None, tmp_path / "new" / "one" / "x.json", Path("/dev/null")):
        check_output(file, "--output", "x.json")
    assert list((tmp_path / "new" / "one").iterdir()) == []
    with pytest.raises(ConfigError, match=rf"--output {tmp_path} is a folder: .*such as {tmp_path}/x.json"):
        check_output(tmp_path, "--output", "x.json")
    with pytest.raises(PathError, match="Choose another --json"):
        check_output(Path(__file__, "x.json"), "--json", "x.json")


def test_a_file_to_write_in_a_closed_folder_is_refused(closed_folder: Path) -> None:
    with pytest.raises(PathError, match="Permission denied"):
        check_output(closed_folder / "x.json", "--output", "x.json")


def test_a_run_prints_names_that_its_output_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), "latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(pretrain, "load", lambda *_: print("saved to /\u5b9f"))
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: Exit.DONE)
    assert pretrain.main(["--deepspeed_config", "run.json"]) == Exit.DONE
    assert output.buffer.getvalue() == b"saved to /\\u5b9f\n"  # type: ignore[attr-defined]
