"""Reading a checkpoint: all ranks together verify all of it, then each rank reads only what it needs."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from raptr_ds.checkpoint.folder import MANIFEST
from raptr_ds.checkpoint.manifest import CHUNK_BYTES, DamagedCheckpointError, Entry, Manifest, checksum
from raptr_ds.checkpoint.reshard import num_real_elements, transfers
from raptr_ds.engine.fragments import Fragment
from raptr_ds.engine.protocol import Engine
from raptr_ds.errors import CheckpointError
from raptr_ds.user_paths import read_error

_MAX_THREADS = 8


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest. Raises: DamagedCheckpointError; StorageError where its file system is away."""
    with _reading(folder / MANIFEST):
        raw = (folder / MANIFEST).read_bytes()
    return Manifest.decode(raw)


def verify_files(folder: Path, manifest: Manifest, share: int, num_shares: int) -> None:
    """Check the sizes of all files, and the checksums of every `num_shares`-th chunk beginning with chunk `share`.

    Raises: DamagedCheckpointError with the name of the first file that differs from what was written; StorageError
    where the file system is away.
    """
    chunks = []
    for name, file in sorted(manifest.files.items()):
        with _reading(folder / name):
            size = (folder / name).stat().st_size
        if size != file.size:
            raise DamagedCheckpointError(f"{name} has {size:,} bytes instead of {file.size:,}")
        chunks += [(name, number, expected) for number, expected in enumerate(file.checksums)]

    def verify(chunk: tuple[str, int, str]) -> None:
        name, number, expected = chunk
        with _reading(folder / name), (folder / name).open("rb") as stream:
            stream.seek(number * CHUNK_BYTES)
            data = stream.read(CHUNK_BYTES)
        if checksum(data) != expected:
            raise DamagedCheckpointError(f"{name} does not match its checksum (chunk {number})")

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        for _ in threads.map(verify, chunks[share::num_shares]):
            pass


def fill_engine(engine: Engine, folder: Path, manifest: Manifest) -> None:
    """Load the checkpoint into the engine, except for its working weights, without communication.

    Raises: as `fill_fragments`.
    """
    engine.create_state(manifest.kinds(), manifest.step_counts)
    fill_fragments(engine.fragments(), folder, manifest)
    engine.load_loss_scaler_state(manifest.loss_scaler)


def fill_fragments(fragments: Iterable[Fragment], folder: Path, manifest: Manifest) -> None:
    """Load the tensors of a checkpoint into `fragments`.

    Raises: CheckpointError if an element of a fragment is not in the checkpoint; DamagedCheckpointError if a file
    cannot be read.
    """
    sources: dict[str, list[Entry]] = {}
    for entry in manifest.entries:
        sources.setdefault(entry.name, []).append(entry)
    with torch.no_grad(), ExitStack() as stack, _reading(folder, "the tensors"):
        opened = cache(lambda file: stack.enter_context(safe_open(folder / file, framework="pt")))
        for fragment in fragments:
            _fill(fragment, sources.get(fragment.name, ()), folder, opened)


@contextmanager
def _reading(path: Path, what: str | None = None) -> Iterator[None]:
    """Raise DamagedCheckpointError where the block cannot read `what`, a path's name if left out, or StorageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (away := read_error(path, error)) is not None:
            raise away from error
        why = getattr(error, "strerror", None) or error
        raise DamagedCheckpointError(f"cannot read {what or path.name}: {why}") from error


def _fill(fragment: Fragment, entries: Iterable[Entry], folder: Path, opened: Callable[[str], Any]) -> None:
    """Load a fragment. opened: returns a file of the checkpoint's, open."""
    target = fragment.geometry
    filled = 0
    for entry in entries:
        if fragment.kind not in entry.keys:
            continue
        if entry.geometry.full_shape != target.full_shape:
            raise CheckpointError(
                f"{fragment.name} has shape {list(entry.geometry.full_shape)} in {folder} and "
                f"{list(target.full_shape)} in this run: it is a checkpoint of another model. Continue it with its "
                "own run file, or train this model in another folder (raptr_ds.train.save)."
            )
        for read, write in transfers(entry.geometry, target):
            tensor = opened(entry.file).get_slice(entry.keys[fragment.kind])
            box = read.of(tensor[read.first : read.end])
            write.of(fragment.data[write.first : write.end]).copy_(box)
            filled += box.numel()
    wanted = num_real_elements(target)
    if filled != wanted:
        raise CheckpointError(
            f"{folder} has {filled:,} of the {wanted:,} elements of {fragment.name} ({fragment.kind}) that a "
            "rank needs: it is a checkpoint of another model, another version of raptr_ds or an optimizer with other "
            "states. Continue it with that run's own file, optimizer.params included, or that version, or train this "
            "model in another folder (raptr_ds.train.save)."
        )
