"""One rank's part of a checkpoint: copied to host memory while training waits, then written by a thread."""

import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raptr_ds.checkpoint.manifest import CHUNK_BYTES, Entry, TensorFile, checksum, file_name
from raptr_ds.engine.fragments import Fragment, Geometry

_ELEMENT_BYTES = 4
_HEADER_ALIGNMENT = 64


class Snapshot:
    """A copy in host memory of the fragments that this rank writes, as the content of one safetensors file.

    The memory is kept from one snapshot to the next: fresh pages would make the copy several times slower.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], None] | None = None
        self.entries: list[Entry] = []
        self.content = memoryview(b"")
        """The whole file; empty if this rank has nothing to write."""

    def take(self, fragments: Iterable[Fragment], rank: int) -> None:
        """Copy the fragments as fp32, which represents every state of the engines exactly."""
        fragments = list(fragments)
        numels = [fragment.data.numel() for fragment in fragments]
        header = _header(numels)
        on_gpu = any(fragment.data.is_cuda for fragment in fragments)
        size = len(header) + _ELEMENT_BYTES * sum(numels)
        self._reserve(size, on_gpu)
        self._buffer[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        data = self._buffer[len(header) : size].view(torch.float32)
        for fragment, target in zip(fragments, data.split(numels), strict=True):
            target.copy_(fragment.data, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        self.content = self._buffer[:size].numpy().data if fragments else memoryview(b"")
        keys: dict[tuple[str, Geometry], dict[str, str]] = {}
        for number, fragment in enumerate(fragments):
            keys.setdefault((fragment.name, fragment.geometry), {})[fragment.kind] = str(number)
        self.entries = [Entry(name, at, "F32", file_name(rank), kinds) for (name, at), kinds in keys.items()]

    def _reserve(self, size: int, on_gpu: bool) -> None:
        """Make the buffer at least `size` bytes large, pinned if the fragments are on a GPU."""
        if self._buffer.numel() >= size:
            return
        if self._unpin is not None:
            self._unpin()
        self._buffer = torch.empty(size, dtype=torch.uint8)
        self._unpin = pinned(self._buffer) if on_gpu else None


def _header(numels: list[int]) -> bytes:
    """Return the header of a safetensors file of 1-D fp32 tensors, named by running numbers, one behind the other."""
    described: dict[str, dict[str, object]] = {}
    end = 0
    for number, numel in enumerate(numels):
        begin, end = end, end + numel * _ELEMENT_BYTES
        described[str(number)] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-(len(text) + 8) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def pinned(buffer: torch.Tensor) -> Callable[[], None]:
    """Pin a CPU tensor's memory, so that a GPU copies to it directly; return the function that unpins it.

    Call that before the memory is freed. torch's own pinned memory comes in powers of two: for 12 GB of weights and
    moments it would pin 16.
    """
    runtime: Any = torch.cuda.cudart()
    address = buffer.data_ptr()
    torch.cuda.check_error(runtime.cudaHostRegister(address, buffer.nbytes, 0))
    return lambda: torch.cuda.check_error(runtime.cudaHostUnregister(address))


def write_tensor_file(path: Path, content: memoryview, stop: threading.Event) -> TensorFile:
    """Write a file to the disk and return its size and checksums. Raises: OSError; _Abandoned if `stop` is set."""
    checksums = []
    with path.open("wb", buffering=0) as stream:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            checksums.append(checksum(chunk))
            while chunk:
                if stop.is_set():
                    raise _Abandoned
                chunk = chunk[stream.write(chunk) :]  # a full disk shows as a short write first
        os.fsync(stream.fileno())
    return TensorFile(len(content), tuple(checksums))


class _Abandoned(Exception):  # noqa: N818 - not an error: the run ends without this checkpoint
    """`Writer.abandon` was called."""


@dataclass
class RankWrite:
    """What one rank has written. failure: an error message or None; is_fault: it is a bug here, not a disk's fault."""

    seconds: float = 0.0
    failure: str | None = "a writer ended before it had begun"
    is_fault: bool = True
    file: TensorFile | None = None
    entries: list[Entry] = field(default_factory=list)
    step_counts: dict[str, float] = field(default_factory=dict)


class Writer:
    """A thread that writes one snapshot. It takes part in no collective, so it cannot make other ranks wait."""

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
            if self._snapshot.content:
                self.outcome.file = write_tensor_file(self._path, self._snapshot.content, self._stop)
            self.outcome.failure, self.outcome.is_fault = None, False
        except OSError as error:
            self.outcome.failure = f"rank {self._rank} cannot write {self._path}: {error.strerror or error}"
            self.outcome.is_fault = False
        except Exception:
            self.outcome.failure = f"rank {self._rank}, writing {self._path}:\n{traceback.format_exc()}"
        self.outcome.seconds = time.perf_counter() - begin

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Stop writing as soon as possible, and return when the thread has ended."""
        self._stop.set()
        self._thread.join()
