"""The batch files of a comparison, run by bash with stand-ins for Slurm's commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.lab.comparison import load_comparison, write_record
from raptr_ds.lab.slurm import settings_of, submit, write_jobs

REPOSITORY = Path(__file__).parents[3]
SWEEP = {"learning_rates": [1e-3, 3e-3], "seed": 9}
SLURM = {"nodes": 2, "at_once": 3, "options": ["--time=1:00:00", "--partition=short"]}
# srun prints the words of its command, one a line, and then does what a run does at its end.
RECORD = "import sys; from raptr_ds.supervise.record import *; append_event(run_folder(sys.argv), 'end', exit_code=0)"
STAND_INS = {
    "srun": 'echo "lead $RAPTR_SIGNAL_LEAD" >&2; printf "%s\\n" "$@"; '
    f'PYTHONPATH={REPOSITORY} {sys.executable} -c "{RECORD}" "$@"',
    "scontrol": '[ "$1" = show ] && [ "$2" = hostnames ] && echo node1',
    "sbatch": 'echo "$@" >>"$SUBMITTED"; wc -l <"$SUBMITTED"',
}


def write(lab, **changes):
    planner = lab.planner(processes=4, slurm=SLURM, set=["train_batch_size=8"], **changes)
    return planner, write_jobs(planner, lab.file, [])[1]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment with stand-ins for Slurm's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    return {**os.environ, **job, "PATH": path, "SLURM_NTASKS_PER_NODE": "2", "RAPTR_VENV": sys.prefix}


def test_the_files_say_what_sbatch_needs(lab):
    _, jobs = write(lab, sweep=SWEEP)
    assert [file.name for file in jobs] == ["tuning.sbatch", "comparison.sbatch", "report.sbatch"]
    text = jobs[1].read_text()
    options = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert {"--nodes=2", "--ntasks-per-node=2", "--array=4,5,6,7,8,9%3", "--time=1:00:00", "--requeue"} <= set(options)
    # sbatch reads its options up to the first command.
    assert text.index("export") > text.rindex("#SBATCH")
    assert "--array=0,1,2,3%3" in jobs[0].read_text()
    for file in jobs:
        assert subprocess.run(["bash", "-n", file], check=False).returncode == 0


def test_only_what_is_not_finished_is_submitted_and_numbers_stay(lab):
    planner = lab.planner()
    lab.stand_in.failing = {"raptr, seed 2": 1}
    lab.run(planner)
    _, jobs = write_jobs(planner, lab.file, [])
    assert [file.name for file in jobs] == ["comparison.sbatch", "report.sbatch"]
    assert "#SBATCH --array=3\n" in jobs[0].read_text()
    assert "raptr_ds.train.seed=2" in settings_of(planner, 3)


def test_a_tuned_run_learns_its_rate_when_it_starts(lab):
    planner = lab.planner(sweep=SWEEP, seeds=[1])
    with pytest.raises(ConfigError, match="no tuning run of its contestant is finished"):
        settings_of(planner, 4)
    lab.stand_in.failing = {"standard, seed 9, learning rate 0.001": 1}
    lab.run(planner)
    assert "optimizer.params.lr=0.003" in settings_of(planner, 4)
    assert "optimizer.params.lr=0.001" in settings_of(planner, 5)


def test_measured_time_is_measured_first(lab):
    planner = lab.planner(budget={"equal": "time"})
    progress, jobs = write_jobs(planner, lab.file, [])
    assert [file.name for file in jobs] == ["probe.sbatch"]
    write_record(planner, progress, "mine", None)
    with pytest.raises(DataError, match=r"has nothing to report: the step times .* are not measured yet"):
        load_comparison(planner.output)
    assert "raptr_ds.train.steps=40" in settings_of(planner, 1)


def test_jobs_start_one_after_another(lab, stand_ins, tmp_path, monkeypatch):
    submitted = tmp_path / "submitted"
    submitted.touch()
    monkeypatch.setenv("PATH", stand_ins["PATH"])
    monkeypatch.setenv("SUBMITTED", str(submitted))
    _, jobs = write(lab, sweep=SWEEP)
    lines = submit(jobs, os.environ)
    assert [line.split()[-1] for line in lines] == ["1", "2", "3"]
    words = [line.split() for line in submitted.read_text().splitlines()]
    assert [line[1] for line in words[1:]] == ["--dependency=afterany:1", "--dependency=afterany:2"]
    assert [line[-1] for line in words] == [str(file) for file in jobs]
    assert submit(jobs, os.environ, only_write=True) == [f"wrote {file}" for file in jobs]


def test_a_job_of_the_array_runs_its_run_by_srun(lab, stand_ins):
    """The real batch file, training_job.sh and experiment.py; srun is a stand-in that shows what it was given."""
    vocabulary = "raptr_ds.model.vocab_size=600"
    slurm = {**SLURM, "options": ["--signal=B:USR1@600"]}
    planner = lab.planner(processes=4, slurm=slurm, set=["train_batch_size=8", vocabulary])
    _, (file, _) = write_jobs(planner, lab.file, [])
    # experiment.py in the job looks for the data's vocabulary: let it find a folder that needs no preparing.
    ask = REPOSITORY / "tools" / "experiment.py"
    text = file.read_text()
    assert f"{sys.executable} tools/experiment.py {lab.file}" in text
    stub = lab.folder / "ask.py"
    code = "import sys; sys.argv[0] = sys.path[0] = {0!r}; sys.path.insert(0, {1!r}); import experiment; "
    code += "experiment.Planner = lambda e, v=None, P=experiment.Planner: P(e, 600); experiment.main()"
    stub.write_text(code.format(str(ask), str(ask.parent)))
    file.write_text(text.replace("tools/experiment.py", str(stub)))
    env = {**stand_ins, "SLURM_ARRAY_TASK_ID": "3"}
    command = ["bash", file]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=lab.folder, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "lead 600\n" in done.stderr  # of two lines sbatch takes the later one
    words = done.stdout.splitlines()
    assert words[:2] == ["--nodes=2", "--ntasks-per-node=2"]
    start = words.index("python")
    assert words[start + 1 : start + 3] == ["raptr_ds/pretrain.py", "--deepspeed_config"]
    assert (REPOSITORY / words[start + 3]).resolve() == (lab.folder / "base.json").resolve()
    assert words[start + 4] == "--set"
    assert words[start + 5 :] == settings_of(planner, 3)
    assert "raptr_ds.train.seed=2" in words
    assert "raptr_ds.path.schedule=3-4-5-6" in words


def test_elsewhere_than_in_the_repository_it_is_refused(lab, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="works from the repository"):
        write_jobs(lab.planner(), lab.file, [])
