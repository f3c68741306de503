"""Lines that a full or failing disk delays and does not lose."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raptr_ds.runtime import lines_file
from raptr_ds.runtime.lines_file import LinesFile
from raptr_ds.runtime.metrics import Metrics
from raptr_ds.runtime.progress import Progress
from raptr_ds.runtime.tensorboard_sink import TensorBoardSink


class Disk:
    """Stands for a disk: takes `room` more bytes, or fails with `number`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.number = errno.ENOSPC
        disk = self

        class Stream(lines_file.FileIO):
            def write(self, data: bytes | bytearray) -> int:  # type: ignore[override]
                if disk.room is None:
                    return super().write(data)
                if disk.room == 0:
                    raise OSError(disk.number, os.strerror(disk.number))
                taken = super().write(bytes(data)[: disk.room])
                disk.room -= taken
                return taken

        monkeypatch.setattr(lines_file, "FileIO", Stream)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_full_disk_takes_the_lines_later_and_in_order(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = LinesFile(path)
    lines.append("one\n")
    disk.room = 5
    lines.append("two\n")  # 4 of 5 bytes
    lines.append("three\n")  # the first letter
    lines.append("four\n")
    assert lines.failure == "No space left on device"
    assert path.read_text() == "one\ntwo\nt"
    disk.room = None
    lines.append("five\n")
    assert lines.failure is None
    assert path.read_text() == "one\ntwo\nthree\nfour\nfive\n"
    lines.close()


def test_what_waits_is_written_at_the_end(disk: Disk, tmp_path: Path) -> None:
    lines = LinesFile(tmp_path / "lines")
    disk.room, disk.number = 0, errno.EIO
    lines.append("one\n")
    assert lines.failure == "Input/output error"
    disk.room = None
    lines.close()
    assert (tmp_path / "lines").read_text() == "one\n"


def test_a_file_that_is_replaced_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = LinesFile(path)
    lines.append("one\n")
    lines.close()
    path.rename(tmp_path / "old")
    path.write_text("kept\n")
    lines.append("two\n")
    lines.close()
    assert path.read_text() == "kept\ntwo\n"


def test_a_line_that_a_crash_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for before, after in (("whole\n", "whole\nnew\n"), ("ha", "ha\nnew\n"), ("", "new\n")):
        path.write_text(before)
        lines = LinesFile(path)
        lines.append("new\n")
        lines.close()
        assert path.read_text() == after


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB; skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Return a file that takes all the room of a disk."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free))
    return disk / "ballast"


class Said(Progress):
    """Keeps what is printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_metrics_survive_a_full_disk(small_disk: Path) -> None:
    """All lines and all events, with a message when it begins and when it is over."""
    said = Said()
    metrics = Metrics(small_disk, num_steps=300, sinks=[TensorBoardSink(small_disk, 0)], progress=said)
    metrics.record_evaluation(1, 1.5, 4)
    ballast = fill(small_disk)
    for step in range(2, 200):
        metrics.record_evaluation(step, 1.0 + step, 4)
    assert metrics.finish_writing() == "No space left on device"
    assert len([line for line in said.lines if "cannot be written (No space left" in line]) == 1
    ballast.unlink()
    for step in range(200, 203):
        metrics.record_evaluation(step, 1.0 + step, 4)
    assert metrics.finish_writing() is None
    metrics.record_evaluation(203, 204.0, 4)
    assert [line for line in said.lines if "written again" in line]
    metrics.close()
    steps = [line.split(",")[0] for line in (small_disk / "metrics.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {step}' for step in range(1, 204)]
    assert scalars_in(small_disk / "tensorboard") == {1: 1.5, **{step: 1.0 + step for step in range(2, 204)}}


def scalars_in(folder: Path) -> dict[int, float]:
    """Return the evaluation losses that TensorBoard shows, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for file in sorted(folder.iterdir()):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        if "eval/loss_of_4_layers" in events.Tags()["scalars"]:
            found.update({event.step: event.value for event in events.Scalars("eval/loss_of_4_layers")})
    return dict(sorted(found.items()))


def test_events_after_a_rollback_are_purged(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, 0)
    for step in range(1, 6):
        sink.record({"step": step, "eval_loss": float(step), "path_length": 4})
    sink.rewind(3)
    sink.record({"step": 4, "eval_loss": 40.0, "path_length": 4})
    sink.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/loss_of_4_layers")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_rollback_on_a_full_disk_loses_no_event(small_disk: Path) -> None:
    sink = TensorBoardSink(small_disk, 0)
    ballast = fill(small_disk)
    for step in range(1, 201):
        sink.record({"step": step, "eval_loss": float(step), "path_length": 4})
    assert sink.failure == "No space left on device"
    sink.rewind(150)
    ballast.unlink()
    sink.record({"step": 151, "eval_loss": 0.5, "path_length": 4})
    sink.close()
    assert sink.failure is None
    assert scalars_in(small_disk / "tensorboard") == {**{step: float(step) for step in range(1, 151)}, 151: 0.5}
