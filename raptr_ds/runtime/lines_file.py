"""A file that a run appends lines or records to as it trains: a full or failing disk delays them, and ends nothing."""

import contextlib
import os
from io import FileIO
from pathlib import Path


class LinesFile:
    """Appends lines; those that the disk does not take are kept, and written, in order, with later ones.

    A line that a crash has cut short is ended before the first one.
    failure: why lines wait in memory, None while none do.
    Raises: OSError if the file cannot be opened at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: FileIO | None = FileIO(path, "ab+")
        size = self._stream.seek(0, os.SEEK_END)
        is_torn = size > 0 and os.pread(self._stream.fileno(), 1, size - 1) != b"\n"
        self._waiting = bytearray(b"\n" if is_torn else b"")
        self.failure: str | None = None

    def append(self, line: str | bytes) -> None:
        """Hand a line, which ends with a newline, or a record to the operating system, or keep it."""
        self._waiting += line.encode() if isinstance(line, str) else line
        self._write()

    def sync(self) -> None:
        """Put all lines on the disk, as far as it takes them."""
        self._write(on_disk=True)

    def close(self) -> None:
        """Write what is waiting, as far as possible, and close the file; a later line opens it again."""
        self._write()
        self._let_go()

    def _write(self, on_disk: bool = False) -> None:
        try:
            if self._stream is None and (self._waiting or on_disk):
                self._stream = FileIO(self._path, "ab")
            while self._stream is not None and self._waiting:  # a nearly full disk takes a part of a line
                del self._waiting[: self._stream.write(self._waiting)]
            if self._stream is not None and on_disk:
                os.fsync(self._stream.fileno())
            self.failure = None
        except OSError as error:
            self.failure = error.strerror or str(error)
            self._let_go()  # and open it again: where a file system was away, handles from before are no use

    def _let_go(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
