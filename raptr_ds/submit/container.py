"""The words that run a task's command in a container: of Apptainer, of enroot, or of pyxis (options of srun)."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raptr_ds.errors import ConfigError

RUNTIMES = ("apptainer", "enroot", "pyxis")
# enroot hands over what is named. These are set in every step; SLURM_RESTART_COUNT by the batch file.
_NEEDED = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"),
    *("SLURM_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", "RAPTR_SIGNAL_LEAD"),
)
_PASSED_ON = re.compile(r"(NCCL|TORCH|PYTORCH|GLOO|UCX|FI|TRITON)_\w+")


@dataclass(frozen=True)
class ContainerWords:
    """step: options of srun. task: what stands before python in a task's command."""

    step: tuple[str, ...] = ()
    task: tuple[str, ...] = ()


def container_words(
    image: str, runtime: str, folders: Sequence[Path], *, has_gpus: bool, home: Path, env: Mapping[str, str]
) -> ContainerWords:
    """Return the words for an image; `folders` are seen in it under their own paths, and `home` is the working folder.

    env: of the submission; NCCL's, torch's and the network libraries' variables are named to enroot.
    Raises: ConfigError for a folder whose name no runtime can be given.
    """
    places = list(dict.fromkeys(str(Path(os.path.abspath(folder))) for folder in (home, *folders)))  # noqa: PTH100
    for place in places:
        if re.search(r"[,:\s\\]", place):
            raise ConfigError(
                f"{place!r} cannot be mounted in a container: {runtime} separates mounts by commas, colons and spaces. "
                "Rename the folder, or reach it by a link with another name."
            )
    if image.startswith("-"):
        raise ConfigError(f"--container {image!r} is no image: it begins with a dash. Write ./{image}.")
    mounts = [f"{place}:{place}" for place in places]
    if runtime == "pyxis":
        options = (
            f"--container-image={image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={home}",
        )
        return ContainerWords(step=options)
    if runtime == "apptainer":
        gpus = ("--nv",) if has_gpus else ()
        return ContainerWords(task=("apptainer", "exec", *gpus, "--bind", ",".join(mounts), "--pwd", str(home), image))
    names = [*_NEEDED, *(name for name in sorted(env) if _PASSED_ON.fullmatch(name))]
    words = [word for mount in mounts for word in ("--mount", mount)] + [
        word for name in names for word in ("--env", name)
    ]
    return ContainerWords(task=("enroot", "start", *words, image))
