"""Running a part of a test as a user who may not do everything, whoever runs the tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534


@contextmanager
def closed(folder: Path, mode: int = 0) -> Iterator[Path]:
    """Give a folder these permissions for the time of the block, and this process, if it is root's, another user's."""
    folder.chmod(mode)
    is_root = os.getuid() == 0
    if is_root:
        os.seteuid(_NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)
