"""Names in the folder of checkpoints: complete ones only, newest first, whatever processes left when they died."""

import shutil
from pathlib import Path

import pytest

from raptr_ds.checkpoint.folder import (
    MANIFEST,
    checkpoints_at,
    checkpoints_in,
    outdated,
    publish,
    set_aside,
    step_folder,
    tidy,
    unfinished_folder,
)
from raptr_ds.errors import CheckpointError


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        path = step_folder(folder, step)
        path.mkdir(parents=True)
        (path / MANIFEST).write_text(str(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_newest_first_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 9, 100, 20)
    make(tmp_path, 123456789)
    unfinished_folder(tmp_path, 300).mkdir()
    (tmp_path / "step-last").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == [
        "step-123456789",
        "step-00000100",
        "step-00000020",
        "step-00000009",
    ]
    assert checkpoints_in(tmp_path / "nowhere") == []


def test_a_folder_may_be_a_run_its_checkpoints_or_one_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    make(folder, 5, 7)
    newest = step_folder(folder, 7)
    assert checkpoints_at(tmp_path / "run")[0] == newest
    assert checkpoints_at(folder)[0] == newest
    assert checkpoints_at(step_folder(folder, 5)) == [step_folder(folder, 5)]
    (newest / MANIFEST).unlink()  # still this one: it is found to be damaged later
    assert checkpoints_at(newest) == [newest]
    copied = newest.rename(tmp_path / "best")
    (copied / MANIFEST).write_text("{}")
    assert checkpoints_at(copied) == [copied]


def test_a_data_folder_is_no_checkpoint(data_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        checkpoints_at(data_folder)


@pytest.mark.parametrize(("name", "why"), [("", "no checkpoint in it"), ("typo", "no such folder")])
def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        checkpoints_at(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_dead_writers_are_tidied_up_after(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for name in (".unfinished-step-00000002", ".deleted-step-00000000", ".replaced-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_text("x")
    (tmp_path / ".replaced-step-00000004").mkdir()  # its successor never got the name
    (tmp_path / ".of-the-user").mkdir()
    done = tidy(tmp_path)
    assert names(tmp_path) == [".of-the-user", "step-00000001", "step-00000004"]
    assert (step_folder(tmp_path, 1) / MANIFEST).read_text() == "1"
    assert len(done) == 2
    assert tidy(tmp_path) == []


def test_what_cannot_be_removed_is_left_to_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1)
    for name in (".unfinished-step-00000002", ".unfinished-step-00000003"):
        (tmp_path / name).mkdir()
    remove = shutil.rmtree

    def busy(path: Path) -> None:
        if path.name.endswith("2"):
            raise OSError(16, "Device or resource busy", str(path))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    cannot, removed = tidy(tmp_path)
    assert cannot == f"{tmp_path}/.unfinished-step-00000002 cannot be removed: Device or resource busy"
    assert removed.startswith("removed ")
    assert names(tmp_path) == [".unfinished-step-00000002", "step-00000001"]


def test_only_the_newest_up_to_a_step_stay(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4, 9)
    deleted = outdated(tmp_path, 4, keep=2)
    assert sorted(path.name for path in deleted) == [".deleted-0-step-00000001", ".deleted-0-step-00000002"]
    assert [int(path.name[5:]) for path in checkpoints_in(tmp_path)] == [9, 4, 3]


def test_a_checkpoint_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    """Again and again, also where the one that was replaced before is still being deleted."""
    make(tmp_path, 3)
    for number in range(3):
        unfinished_folder(tmp_path, 3).mkdir()
        publish(unfinished_folder(tmp_path, 3), step_folder(tmp_path, 3), b"new %d" % number)
        assert (step_folder(tmp_path, 3) / MANIFEST).read_text() == f"new {number}"
        (deleted,) = outdated(tmp_path, 3, keep=1)
        assert deleted.name == f".deleted-{number}-.replaced-step-00000003"
    assert tidy(tmp_path) == []
    assert names(tmp_path) == ["step-00000003"]


def test_a_failed_replacement_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 3)
    unfinished_folder(tmp_path, 3).mkdir()

    replace_file = Path.replace

    def fail_for_folders(path: Path, target: Path) -> Path:
        if path.is_dir():
            raise OSError(28, "No space left on device")
        return replace_file(path, target)

    monkeypatch.setattr(Path, "replace", fail_for_folders)
    with pytest.raises(OSError, match="No space"):
        publish(unfinished_folder(tmp_path, 3), step_folder(tmp_path, 3), b"new")
    assert (step_folder(tmp_path, 3) / MANIFEST).read_text() == "3"


def test_an_abandoned_branch_of_the_run_is_set_aside(tmp_path: Path) -> None:
    make(tmp_path, 3, 5, 7)
    assert set_aside(tmp_path, after=3) == tmp_path / "set-aside-1"
    assert names(tmp_path) == ["set-aside-1", "step-00000003"]
    assert names(tmp_path / "set-aside-1") == ["step-00000005", "step-00000007"]
    assert set_aside(tmp_path, after=3) is None
    make(tmp_path, 5)
    assert set_aside(tmp_path, after=-1) == tmp_path / "set-aside-2"
    assert checkpoints_at(tmp_path / "set-aside-1")[0].name == "step-00000007"
