"""tools/submit.py on a real Slurm: names that a shell would run, code that is edited afterwards, containers, chains."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import data_folder, lines_of, tiny_run  # noqa: F401  (data_folder is a fixture)
from tests.slurm.lab import SlurmLab

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
NUM_STEPS = 60
NASTY = "a \"run\" 'x' $(touch ran) `touch ran`; touch ran & #[1]*?"
SECRET = "s3cr3t-of-the-environment"


def submit(lab: SlurmLab, folder: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run the tool as users do, in `folder`."""
    env = {**lab.env, "OMP_NUM_THREADS": "1", "RAPTR_RETRY_DELAY": "0", "TOKEN": SECRET}
    env["PATH"] = os.pathsep.join([*([path] if path else []), str(Path(sys.executable).parent), env["PATH"]])
    command = [sys.executable, str(REPOSITORY / "tools" / "submit.py"), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)


def jobs_of(done: subprocess.CompletedProcess[str]) -> list[int]:
    """Return the numbers of the submitted jobs."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("submitted job ")]


def printed(folder: Path) -> str:
    """Return the output of all jobs in a run's folder."""
    return "".join(path.read_text() for path in folder.glob("slurm-*.out"))


@pytest.fixture
def place(tmp_path: Path, data_folder: Path) -> Path:  # noqa: F811
    """A folder with a run file, whose data lie where a shell would not find them."""
    (tmp_path / NASTY).symlink_to(data_folder)
    run = tiny_run(data_folder, tmp_path / "run", train={"steps": NUM_STEPS}, log={"tensorboard": False})
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


def test_names_stay_names_later_edits_stay_out_and_secrets_too(lab: SlurmLab, place: Path) -> None:
    settings = [f"raptr_ds.train.save={NASTY}.run", f"raptr_ds.data.path={place / NASTY}", "raptr_ds.checkpoint.keep=1"]
    done = submit(lab, place, "run.json", "--nodes", "2", "--time", "10", "--set", *settings, "--", "--hold")
    (job,) = jobs_of(done)
    run = place / f"{NASTY}.run"
    assert "python tools/status.py" in done.stdout

    (place / "run.json").write_text("edited")  # neither this nor the clone's code reaches the job: only its copy does
    (code,) = run.glob("code-*")
    with (code / "raptr_ds" / "errors.py").open("a") as file:
        file.write("\nprint('the copied code runs', flush=True)\n")
    lab.command("scontrol", "release", str(job))
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline, (printed(run), lab.job(job))
        time.sleep(0.05)
    lab.command("scancel", "--signal=USR1", "--batch", str(job))
    end = lab.wait_for(job, seconds=PATIENCE)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), printed(run)
    assert [line["step"] for line in lines_of(run) if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert printed(run).count("the copied code runs") >= 4  # two ranks, two starts
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["job"] for event in events if event["event"] == "submit"] == [str(job)]
    assert all(event["revision"] for event in events if event["event"] == "start")

    assert list(place.rglob("ran")) == []
    texts = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert len(texts) > 100
    assert not [text for text in [done.stdout.encode(), done.stderr.encode(), *texts] if SECRET.encode() in text]


CONTAINER = """\
#!/bin/bash
[ "$SLURM_PROCID" != 0 ] || printf 'word %s\\n' "${0##*/}" "$@"
[ "$SLURM_PROCID" != 0 ] || echo "raptr_ds: ConfigError: no" >&2
exit 2
"""


def test_a_container_gets_its_words(lab: SlurmLab, place: Path) -> None:
    """The runtime is a stand-in that prints its words: none is installed here."""
    stand_in = place / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(CONTAINER)
    stand_in.chmod(0o755)
    words = ["--container", "my image.sif"]
    (job,) = jobs_of(submit(lab, place, "run.json", "--nodes", "1", *words, path=str(stand_in.parent)))
    assert lab.wait_for(job)["ExitCode"] == "2:0"
    run, got = place / "run", printed(place / "run")
    given = [line.removeprefix("word ") for line in got.splitlines() if line.startswith("word ")]
    assert given[:2] == ["apptainer", "exec"], got
    (code,) = run.glob("code-*")
    task = ["my image.sif", "python", f"{code}/raptr_ds/pretrain.py", "--deepspeed_config"]
    assert given[-5:] == [*task, f"{run}/submitted-1.json"]
    mounts = [word for word in given if f"{run}:{run}" in word.split(",")]
    assert len(mounts) == 1, given


def test_a_chain_and_an_array(lab: SlurmLab, place: Path) -> None:
    jobs = jobs_of(submit(lab, place, "run.json", "--nodes", "1", "--chain", "3", "--", "--begin=now+1hour"))
    assert len(jobs) == 3
    ended = [lab.job(job) for job in jobs]
    assert [(job["Requeue"], job["JobName"]) for job in ended] == [("0", "run")] * 3
    assert ["singleton" in job["Dependency"] for job in ended] == [False, True, True]  # nothing is before the first
    refused = submit(lab, place, "run.json", "--nodes", "1")
    assert (refused.returncode, f"job {jobs[0]}, {jobs[1]}, {jobs[2]} is in the queue" in refused.stderr) == (2, True)
    words = ["--array", "optimizer.params.lr=1e-3,2e-3", "--set", "raptr_ds.train.save=sweep", "--", "--hold"]
    (job,) = jobs_of(submit(lab, place, "run.json", "--nodes", "1", *words))
    assert lab.command("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i").split() == [
        f"{job}_{index}" for index in range(2)
    ]
    for index, rate in enumerate((1e-3, 2e-3)):
        run = place / "sweep" / f"lr={(index + 1)}e-3"
        tree = json.loads((run / "submitted-1.json").read_text())
        assert tree["optimizer"]["params"]["lr"] == rate
        assert tree["raptr_ds"]["train"]["save"] == f"sweep/lr={index + 1}e-3"
