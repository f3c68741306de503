"""The copy of the code that a submitted job runs, so that later edits of the clone do not reach it."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from raptr_ds.errors import ConfigError
from raptr_ds.runtime.events import REVISION_FILE, code_revision
from raptr_ds.user_paths import write_error

REPOSITORY = Path(__file__).resolve().parents[2]
_PARTS = ("raptr_ds", "tools", "slurm")


def code_files(repository: Path = REPOSITORY) -> list[Path]:
    """Return the files that a job runs, relative to the repository: in a clone, all that git does not ignore."""
    words = [
        "git",
        "-C",
        str(repository),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *_PARTS,
    ]
    try:
        listed = subprocess.run(words, capture_output=True, timeout=60, check=True).stdout
        found = [Path(os.fsdecode(name)) for name in listed.split(b"\0") if name]
    except (OSError, subprocess.SubprocessError):
        found = []
    if not found:  # no clone, or one inside another repository that ignores it
        every = (path.relative_to(repository) for part in _PARTS for path in (repository / part).rglob("*"))
        found = [path for path in every if "__pycache__" not in path.parts]
    return sorted(path for path in set(found) if (repository / path).is_file())


def copy_code(folder: Path, repository: Path = REPOSITORY) -> Path:
    """Copy the code to folder/code-DIGEST, unless it is there, and return this.

    Raises: ConfigError outside a repository with the batch scripts; PathError or StorageError.
    """
    files = code_files(repository)
    if Path("slurm/training_job.sh") not in files:
        raise ConfigError(
            f"{repository} has no slurm/training_job.sh. Run tools/submit.py of a clone of the repository."
        )
    digest = hashlib.sha256()
    for file in files:
        content = (repository / file).read_bytes()
        digest.update(f"{len(bytes(file))} {len(content)} ".encode() + bytes(file) + content)
    target = folder / f"code-{digest.hexdigest()[:12]}"
    if target.is_dir():
        return target
    try:
        aside = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
        try:
            copy = aside / "code"  # with the umask's permissions, which the folder around it has not
            for file in files:
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(repository / file, copy / file)
            (copy / REVISION_FILE).write_text(f"{code_revision() or 'unknown'}\n", encoding="utf-8")
            copy.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if not target.is_dir():  # else another submission was faster
            raise write_error(target, error, "Set raptr_ds.train.save to a folder that you may write.") from error
    return target


def free_number(folder: Path) -> int:
    """Return the number of the next submission in a folder, from 1."""
    names = [path.stem.removeprefix("submitted-") for path in folder.glob("submitted-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0) + 1
