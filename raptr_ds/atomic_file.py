"""Files that are replaced at once: a crash leaves the old content or the new, never a part of either."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under another name in the same folder, put it on the disk, and rename it to `path`.

    Text is written as UTF-8. A file NAME.new that a crash has left is overwritten. Raises: OSError.
    """
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)
    with aside.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
