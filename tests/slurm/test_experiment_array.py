"""A comparison's job arrays on a real Slurm: each job runs its own run, the report waits for all."""

import json
import sys
from pathlib import Path

from raptr_ds.lab.file import load_experiment
from raptr_ds.lab.plan import Planner
from raptr_ds.lab.slurm import write_jobs
from tests.slurm.lab import SlurmLab

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "out; 'touch' $(touch ran) #1"
BASE = REPOSITORY / "deepspeed_configs" / "bert_quickstart_full.json"


def test_each_job_of_the_array_runs_its_own_run(lab: SlurmLab, tmp_path: Path, monkeypatch) -> None:
    """pretrain.py and experiment.py in the jobs are stand-ins; Slurm, the batch files and training_job.sh are real."""
    monkeypatch.chdir(REPOSITORY)
    comparison = {
        "base": str(BASE),
        "contestants": [{"name": "standard"}, {"name": "raptr", "method": "raptr"}],
        "seeds": [1, 2],
        "output": str(tmp_path / NAME),
        "slurm": {"at_once": 2, "options": ["--time=5"]},
    }
    (tmp_path / "mine.json").write_text(json.dumps(comparison))
    planner = Planner(load_experiment(tmp_path / "mine.json"), 600)
    _, (file, report) = write_jobs(planner, tmp_path / "mine.json", [])
    home = tmp_path / "home"
    for folder in ("raptr_ds", "tools"):
        (home / folder).mkdir(parents=True)
    (home / "slurm").symlink_to(REPOSITORY / "slurm")
    for tool in ("supervise.py", "_command_line.py"):
        (home / "tools" / tool).symlink_to(REPOSITORY / "tools" / tool)
    (home / "deepspeed_configs").symlink_to(REPOSITORY / "deepspeed_configs")
    (home / "raptr_ds" / "pretrain.py").write_text("import sys; print('settings:', *sys.argv[3:])")
    (home / "tools" / "experiment.py").write_text("import sys; print('run of job', sys.argv[-1]); print('x=1')")
    for batch in (file, report):
        text = batch.read_text().replace(f"RAPTR_HOME={REPOSITORY}\n", f"RAPTR_HOME={home}\n")
        batch.write_text(text.replace(f"cd {REPOSITORY} ", f"cd {home} "))
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    # Not lab.submit, which says where the output goes: here the batch files do.
    array = lab.command("sbatch", "--parsable", str(file), env=env)
    after = lab.command("sbatch", "--parsable", f"--dependency=afterany:{array}", str(report), env=env)
    ended = lab.wait_for(int(after))
    outputs = sorted(path for path in file.parent.glob("*.out") if "report" not in path.name)
    assert [path.name for path in outputs] == [f"{NAME}-comparison-{number}.out" for number in range(4)]
    for number, path in enumerate(outputs):
        assert f"settings: --set run of job {number} x=1\n" in path.read_text(), path.read_text()
    assert ended["JobState"] == "COMPLETED"
    assert list(tmp_path.rglob("ran")) == []
