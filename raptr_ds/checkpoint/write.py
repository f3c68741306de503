"""One rank's part of a checkpoint: copied to host memory while training waits, written by a thread beside it."""

import hashlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raptr_ds.checkpoint.manifest import CHUNK_BYTES, Entry, TensorFile, file_name
from raptr_ds.checkpoint.reshard import Geometry
from raptr_ds.engine.fragments import Fragment

_ELEMENT_BYTES = 4
_HEADER_ALIGNMENT = 64


class Snapshot:
    """A copy in host memory of the fragments that this rank writes, as the content of one safetensors file.

    The memory is kept from one snapshot to the next: fresh pages would make the copy several times slower.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._unpin = _nothing
        self.entries: list[Entry] = []
        self.header = b""
        self.numel = 0

    def take(self, fragments: Iterable[Fragment], rank: int) -> None:
        """Copy the fragments; all are kept as fp32, which holds every state the engines have exactly."""
        fragments = list(fragments)
        self.numel = sum(fragment.data.numel() for fragment in fragments)
        on_gpu = any(fragment.data.is_cuda for fragment in fragments)
        if self._buffer.numel() < self.numel:
            self._unpin()
            self._buffer = torch.empty(self.numel, dtype=torch.float32)
            self._unpin = pinned(self._buffer) if on_gpu else _nothing
        header: dict[str, dict[str, object]] = {}
        keys: dict[tuple[str, Geometry], dict[str, str]] = {}
        position = 0
        for number, fragment in enumerate(fragments):
            numel = fragment.data.numel()
            self._buffer.narrow(0, position, numel).copy_(fragment.data, non_blocking=True)
            offsets = [position * _ELEMENT_BYTES, (position + numel) * _ELEMENT_BYTES]
            header[str(number)] = {"dtype": "F32", "shape": [numel], "data_offsets": offsets}
            keys.setdefault((fragment.name, geometry_of(fragment)), {})[fragment.kind] = str(number)
            position += numel
        if on_gpu:
            torch.cuda.synchronize()
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.entries = [Entry(name, at, "F32", file_name(rank), kinds) for (name, at), kinds in keys.items()]

    def content(self) -> Iterable[memoryview]:
        """Yield the file's bytes in pieces."""
        yield memoryview(self.header)
        data = self._buffer.narrow(0, 0, self.numel).numpy().view(np.uint8).data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def _nothing() -> None:
    pass


def pinned(buffer: torch.Tensor) -> Callable[[], None]:
    """Lock a CPU tensor's memory, so that a GPU copies to it directly; return what unlocks it, to be called before
    the memory is freed.

    torch's own pinned memory comes in powers of two: of 12 GB of weights and moments it would lock 16.
    """
    runtime: Any = torch.cuda.cudart()
    address = buffer.data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, buffer.nbytes, 0))
    return lambda: torch.cuda.check_error(runtime.cudaHostUnregister(address))


def geometry_of(fragment: Fragment) -> Geometry:
    """Return where a fragment's elements lie in the full tensor."""
    shard = fragment.shard
    return Geometry(
        full_shape=tuple(shard.full_shape),
        dim=shard.dim,
        start=shard.start,
        size=shard.size,
        local_shape=tuple(fragment.local_shape),
        offset=fragment.offset,
        numel=fragment.data.numel(),
    )


class _ChunkSums:
    """Checksums of a stream of bytes, one for each CHUNK_BYTES of it."""

    def __init__(self) -> None:
        self._sums: list[str] = []
        self._current, self._room = hashlib.sha256(), CHUNK_BYTES

    def update(self, data: memoryview) -> None:
        while len(data) >= self._room:
            self._current.update(data[: self._room])
            self._sums.append(self._current.hexdigest())
            data = data[self._room :]
            self._current, self._room = hashlib.sha256(), CHUNK_BYTES
        self._current.update(data)
        self._room -= len(data)

    def all(self) -> tuple[str, ...]:
        return (*self._sums, self._current.hexdigest()) if self._room < CHUNK_BYTES else tuple(self._sums)


def write_tensor_file(path: Path, content: Iterable[memoryview], stop: threading.Event) -> TensorFile:
    """Write a file to the disk and return its size and checksums. Raises: OSError; _Abandoned if `stop` is set."""
    sums, size = _ChunkSums(), 0
    with path.open("wb", buffering=0) as stream:
        for piece in content:
            sums.update(piece)
            size += len(piece)
            while piece:
                if stop.is_set():
                    raise _Abandoned
                piece = piece[stream.write(piece) :]  # noqa: PLW2901 - a full disk shows as a short write first
        os.fsync(stream.fileno())
    return TensorFile(size, sums.all())


class _Abandoned(Exception):  # noqa: N818 - not an error: the run ends without this checkpoint
    """The rank closes without waiting for the write."""


@dataclass
class RankWrite:
    """What one rank's writer has to tell the others. failure: for people; is_fault: a defect of ours, not of a disk."""

    seconds: float = 0.0
    num_bytes: int = 0
    failure: str | None = "a writer ended before it had begun"
    is_fault: bool = True
    file: TensorFile | None = None
    entries: list[Entry] = field(default_factory=list)
    step_counts: dict[str, float] = field(default_factory=dict)


class Writer:
    """A thread that writes one snapshot; it communicates with nobody, so it can hang nobody."""

    def __init__(self, snapshot: Snapshot, folder: Path, rank: int, step_counts: dict[str, float]) -> None:
        self.outcome = RankWrite(entries=snapshot.entries, step_counts=step_counts)
        self._snapshot, self._path, self._rank = snapshot, folder / file_name(rank), rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        begin = time.perf_counter()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._snapshot.numel:
                self.outcome.file = write_tensor_file(self._path, self._snapshot.content(), self._stop)
                self.outcome.num_bytes = self.outcome.file.size
            self.outcome.failure, self.outcome.is_fault = None, False
        except OSError as error:
            self.outcome.failure = f"rank {self._rank} cannot write {self._path}: {error.strerror or error}"
            self.outcome.is_fault = False
        except Exception:
            self.outcome.failure = f"rank {self._rank}, writing {self._path}:\n{traceback.format_exc()}"
        self.outcome.seconds = time.perf_counter() - begin

    @property
    def is_done(self) -> bool:
        """Whether nothing is written any more."""
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Stop writing as soon as possible and return then."""
        self._stop.set()
        self._thread.join()
