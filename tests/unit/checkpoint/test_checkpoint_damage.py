"""Checkpoints that are not what was written: each kind of damage is seen, named, and the previous one used."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.checkpoint import read as checkpoint_read
from raptr_ds.checkpoint import write as checkpoint_write
from raptr_ds.checkpoint.folder import checkpoints_in
from raptr_ds.errors import CheckpointError, Exit, StorageError

FILE = "rank-00000.safetensors"


def flip(position: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[int(position * (len(raw) - 1))] ^= 1
        path.write_bytes(raw)

    return damage


def truncate(num_bytes: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, num_bytes if num_bytes >= 0 else path.stat().st_size + num_bytes)


def write(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


def add_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


ANY_FILE = {
    "first bit": flip(0.0),
    "early bit": flip(0.01),
    "middle bit": flip(0.5),
    "late bit": flip(0.9),
    "last bit": flip(1.0),
    "one byte less": truncate(-1),
    "half": truncate(100),
    "empty": truncate(0),
    "one byte more": add_a_byte,
    "deleted": Path.unlink,
}
TEXTS = {"no JSON": write("{"), "other JSON": write('{"step": 2}'), "a list": write("[]"), "null": write("null")}
DAMAGES = [
    *((file, name, damage) for file in (FILE, "manifest.json") for name, damage in ANY_FILE.items()),
    *(("manifest.json", name, damage) for name, damage in TEXTS.items()),
]


@pytest.mark.parametrize(("file", "damage"), [(f, d) for f, _, d in DAMAGES], ids=[f"{f}: {n}" for f, n, _ in DAMAGES])
def test_damage_is_named_and_the_previous_one_used(run: Any, file: str, damage: Callable[[Path], None]) -> None:
    run.save(1, 2)
    damaged = run.folder / "step-00000002"
    damage(damaged / file)
    with pytest.raises(CheckpointError) as caught:
        run.restore(str(damaged))
    assert caught.value.exit_code == Exit.USER_ERROR
    assert str(damaged) in str(caught.value)
    assert file in str(caught.value)
    assert run.steps() == ["2", "1"]
    assert run.restore() == 1
    assert any(str(damaged) in line and file in line for line in run.said)
    # The damaged one is out of the way: it must neither be tried again nor count as one of those that are kept.
    assert run.steps() == ["1"]
    assert run.save(2, 3) == [None, None]
    assert run.steps() == ["3", "2"]


def test_files_of_another_checkpoint_do_not_pass(run: Any) -> None:
    run.save(1, 2)
    shutil.copy(run.folder / "step-00000001" / FILE, run.folder / "step-00000002" / FILE)
    assert run.restore() == 1


def test_every_chunk_is_verified(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checkpoint_write, checkpoint_read):
        monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    run.save(1, 2)
    path = run.folder / "step-00000002" / FILE
    raw = path.read_bytes()
    manifest = checkpoint_read.read_manifest(path.parent)
    assert len(manifest.files[FILE].checksums) == -(-len(raw) // 64)
    for position in range(0, len(raw), 64):
        flipped = bytearray(raw)
        flipped[position] ^= 128
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"chunk {position // 64}"):
            run.restore(str(path.parent))
    path.write_bytes(raw)
    assert run.restore() == 2


@pytest.mark.parametrize("name", ["manifest.json", FILE])
def test_a_file_system_that_is_away_is_no_damage(run: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is set aside for it, and the run may be tried again; a bad block of a disk is damage."""
    run.save(1, 2)
    opened, code = Path.open, errno.ESTALE

    def failing(path: Path, *arguments: Any, **named: Any) -> Any:
        if (path.parent.name, path.name) == ("step-00000002", name):
            raise OSError(code, os.strerror(code))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(StorageError, match=f"{name} cannot be read: Stale file handle.*start again"):
        run.restore()
    assert run.steps() == ["2", "1"]
    code = errno.EIO
    assert run.restore() == 1


def test_nothing_good_left_stops_and_does_not_start_afresh(run: Any) -> None:
    run.save(1, 2)
    for path in checkpoints_in(run.folder):
        truncate(-1)(path / FILE)
    with pytest.raises(CheckpointError, match=r"raptr_ds\.checkpoint\.load") as caught:
        run.restore()
    for step in (1, 2):
        assert f"step-0000000{step}" in str(caught.value)
    assert run.steps() == ["2", "1"]
