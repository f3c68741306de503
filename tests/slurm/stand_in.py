"""A repository with a stand-in for pretrain.py, for tests of what the .sbatch files do around it."""

import os
import sys
from pathlib import Path

from tests.slurm.lab import SlurmLab

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ("bert_raptr.sbatch", "ul2_raptr.sbatch")

# Runs the program beside it, and where that ends well records so as a run does, by its first rank. Without the package:
# importing it takes longer than tasks wait for each other here.
_RUNNER = """\
import json, os, pathlib, runpy, sys
def record():
    if os.environ.get("SLURM_PROCID") == "0":
        save = dict(word.partition("=")[::2] for word in sys.argv).get("raptr_ds.train.save")
        file = pathlib.Path(sys.argv[sys.argv.index("--deepspeed_config") + 1])
        with pathlib.Path(save or f"runs/{file.stem}", "events.jsonl").open("a") as events:
            events.write(json.dumps({"event": "end", "exit_code": 0}) + "\\n")
try:
    runpy.run_path(str(pathlib.Path(__file__).with_name("program.py")), run_name="__main__")
except SystemExit as end:
    if not end.code:
        record()
    raise
record()
"""


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
        self.write(program)
        return self.lab.submit(*words, str(REPOSITORY / "slurm" / script), env=self.env | env)

    def write(self, program: str) -> None:
        """Have the tasks run `program`."""
        (self.folder / "raptr_ds" / "pretrain.py").write_text(_RUNNER)
        (self.folder / "raptr_ds" / "program.py").write_text(program)
