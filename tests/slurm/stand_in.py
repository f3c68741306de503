"""A repository with a stand-in for pretrain.py, for tests of what the .sbatch files do around it."""

import os
import sys
from pathlib import Path

from tests.slurm.lab import SlurmLab

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ("bert_raptr.sbatch", "ul2_raptr.sbatch")


class Job:
    """A repository with a stand-in for pretrain.py, and the environment to submit its .sbatch files with."""

    def __init__(self, folder: Path, lab: SlurmLab) -> None:
        self.folder = folder
        self.lab = lab
        (folder / "raptr_ds").mkdir()
        for shared in ("slurm", "deepspeed_configs", "tools"):
            (folder / shared).symlink_to(REPOSITORY / shared)
        self.env = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAPTR_HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "RAPTR_RETRY_DELAY": "0",
        }

    def submit(self, program: str, *words: str, script: str = SCRIPTS[0], **env: str) -> int:
        """Submit a .sbatch file that runs `program`; words before the file's name are options of sbatch."""
        (self.folder / "raptr_ds" / "pretrain.py").write_text(program)
        return self.lab.submit(*words, str(REPOSITORY / "slurm" / script), env=self.env | env)
