"""Running a comparison with a stand-in for pretrain.py: order, resuming, failures, tuning, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.lab.comparison import load_comparison, read_record
from raptr_ds.lab.plan import PlannedRun
from raptr_ds.lab.report import write_report
from raptr_ds.lab.runner import REPOSITORY, LocalLauncher, claimed, command_of, current_progress, list_runs
from raptr_ds.lab.status import add_start, outcome_of, status_of

SWEEP = {"learning_rates": [1e-3, 3e-3], "seed": 9}


def test_all_runs_once_seed_by_seed_and_nothing_again(lab):
    planner = lab.planner()
    progress = lab.run(planner)
    pairs = [f"{name}, seed {seed}" for seed in (1, 2, 3) for name in ("standard", "raptr")]
    assert lab.stand_in.started == pairs
    assert progress.failed == []
    record = (lab.folder / "out" / "experiment.json").read_text()
    assert lab.run(planner).failed == []
    assert lab.stand_in.started == []
    assert (lab.folder / "out" / "experiment.json").read_text() == record


def test_a_lost_run_is_run_again_and_a_new_contestant_alone(lab):
    lab.run(lab.planner())
    shutil.rmtree(lab.folder / "out" / "runs" / "raptr" / "seed-2")
    more = [{"name": "standard"}, {"name": "raptr", "method": "raptr", "set": ["raptr_ds.path.schedule=3-4-5-6"]}]
    lab.run(lab.planner(contestants=[*more, {"name": "pld", "method": "pld"}], seeds=[1, 2]))
    assert lab.stand_in.started == ["pld, seed 1", "raptr, seed 2", "pld, seed 2"]


def test_a_stopped_run_continues_and_others_are_not_touched(lab):
    planner = lab.planner()
    lab.stand_in.stopping = {"raptr, seed 1"}
    progress = lab.run(planner)
    assert len(progress.failed) == 1
    assert "step 20 of 40, stopped by a signal" in progress.failed[0]
    (lab.folder / "out" / "runs" / "raptr" / "seed-1" / "checkpoints" / "step-00000020").mkdir(parents=True)
    listed = "\n".join(list_runs(planner))
    assert "stopped at 20, continues after 20" in listed
    lab.stand_in.stopping.clear()
    assert lab.run(planner).failed == []
    assert lab.stand_in.started == ["raptr, seed 1"]
    outcome = json.loads((lab.folder / "out" / "runs" / "raptr" / "seed-1" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["starts"]) == (0, 2)


def test_a_key_that_an_older_version_did_not_know_had_its_default(lab):
    planner = lab.planner()
    lab.run(planner)
    of_method = {run.resolved["raptr_ds"]["path"]["method"]: run for run in current_progress(planner).comparison}
    run = of_method["raptr"]
    config = run.folder / "config.json"
    values = json.loads(config.read_text())
    assert values["raptr_ds"]["path"].pop("paths_per_step") == 1
    config.write_text(json.dumps(values))
    assert status_of(run.folder, run.resolved).is_finished
    assert not status_of(run.folder, run.resolved).differences
    changed = json.loads(json.dumps(run.resolved))
    changed["raptr_ds"]["path"]["paths_per_step"] = 2
    assert status_of(run.folder, changed).differences == ("raptr_ds.path.paths_per_step=1, now 2",)


@pytest.mark.parametrize("text", ["", '{"raptr_ds": ', "[]"])
def test_a_damaged_configuration_is_a_users_error(lab, text):
    planner = lab.planner()
    lab.run(planner)
    (lab.folder / "out" / "runs" / "raptr" / "seed-2" / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"raptr/seed-2/config\.json is damaged"):
        lab.run(planner)


def test_an_outcome_is_written_whole_or_not_at_all(lab, monkeypatch):
    lab.run(lab.planner())
    folder = lab.folder / "out" / "runs" / "raptr" / "seed-2"
    before = outcome_of(folder)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("the machine is gone")))
    with pytest.raises(OSError, match="gone"):
        add_start(folder, 1, 1.0)
    assert outcome_of(folder) == before


def test_a_run_without_its_last_evaluation_is_not_finished(lab):
    planner = lab.planner()
    lab.run(planner)
    (run, *_) = current_progress(planner).comparison
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval_loss" in lines[-1]
    (run.folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert not status_of(run.folder, run.resolved).is_finished
    # A line that a crash has torn is no line.
    (run.folder / "metrics.jsonl").write_text("".join(lines)[:-3])
    assert not status_of(run.folder, run.resolved).is_finished


def test_a_failed_run_is_reported_with_its_log_and_the_others_continue(lab):
    lab.stand_in.failing = {"standard, seed 1": 3}
    progress = lab.run(lab.planner())
    assert len(lab.stand_in.started) == 6
    (failure,) = progress.failed
    assert "exit code 3" in failure
    assert "RuntimeError: out of luck" in failure


def test_every_contestant_tries_all_rates_and_takes_the_best(lab):
    progress = lab.run(lab.planner(sweep=SWEEP, seeds=[1]))
    assert lab.stand_in.started[:4] == [
        f"{name}, seed 9, learning rate {rate}" for name in ("standard", "raptr") for rate in ("0.001", "0.003")
    ]
    assert progress.rates == {"standard": 1e-3, "raptr": 1e-3}
    assert lab.stand_in.started[4:] == [f"{name}, seed 1, learning rate 0.001" for name in ("standard", "raptr")]
    record = read_record(lab.folder / "out")
    assert [one["learning_rate"] for one in record["contestants"]] == [1e-3, 1e-3]


def test_a_compared_run_that_tuning_has_made_is_not_made_again(lab):
    lab.run(lab.planner(sweep={**SWEEP, "seed": 2}))
    assert len(lab.stand_in.started) == 4 + 2 * 3 - 2


def test_a_rate_whose_run_fails_is_ignored_and_no_rate_at_all_is_reported(lab):
    lab.stand_in.failing = {"standard, seed 9, learning rate 0.001": 1}
    lab.stand_in.failing |= {f"raptr, seed 9, learning rate {rate}": 1 for rate in ("0.001", "0.003")}
    progress = lab.run(lab.planner(sweep=SWEEP, seeds=[1]))
    assert progress.rates == {"standard": 3e-3}
    assert lab.stand_in.started[4:] == ["standard, seed 1, learning rate 0.003"]
    assert any("raptr: no learning rate" in line for line in progress.failed)


def test_runs_of_another_description_are_refused_before_anything_starts(lab):
    lab.run(lab.planner())
    with pytest.raises(ConfigError, match=r"raptr_ds\.model\.hidden_size=32, now 16"):
        lab.run(lab.planner(set=["raptr_ds.model.hidden_size=16"]))
    assert lab.stand_in.started == []
    # What changes nothing that is measured may change.
    assert lab.run(lab.planner(set=["raptr_ds.checkpoint.keep=1", "raptr_ds.log.progress=none"])).failed == []
    assert lab.stand_in.started == []


def test_a_contestant_may_run_on_fewer_seeds(lab):
    few = {"name": "constant", "method": "constant", "seeds": [3, 1]}
    contestants = [{"name": "standard", "method": "standard"}, few]
    listed = "\n".join(list_runs(lab.planner(contestants=contestants, sweep=SWEEP)))
    assert "and 5 runs of standard, constant, at the learning rates that tuning chooses" in listed
    lab.run(lab.planner(contestants=contestants))
    names = ("standard", 1), ("constant", 1), ("standard", 2), ("standard", 3), ("constant", 3)
    assert lab.stand_in.started == [f"{name}, seed {seed}" for name, seed in names]
    comparison = load_comparison(lab.folder / "out")
    assert all(run.is_finished for run in comparison.runs)
    assert list(comparison.final_losses("constant")) == [1, 3]
    assert "5 of 5 runs are finished" in write_report(comparison)[0].read_text()


def test_the_list_has_steps_flops_and_states(lab):
    listed = "\n".join(list_runs(lab.planner(budget={"equal": "flops"}, sweep=SWEEP)))
    assert "| standard | full 6 layers | 40 |" in listed
    assert "| raptr | raptr 3-4-5-6 freeze | 53 |" in listed
    assert listed.count("| tuning |") == 4
    assert "and 6 runs of standard, raptr, at the learning rates that tuning chooses" in listed
    assert not (lab.folder / "out").exists()
    measured = "\n".join(list_runs(lab.planner(budget={"equal": "time"})))
    assert measured.count("| probe |") == 2


@pytest.mark.parametrize(
    ("method", "settings", "described"),
    [
        ("standard", "raptr_ds.model.num_layers=3", "full 3 layers"),
        ("standard", "raptr_ds.model.num_layers=1", "full 1 layer"),
        ("raptr", "raptr_ds.path.fixed_layers=[-1]", "raptr 3-4-5-6 fixed [-1] freeze"),
        ("raptr", "raptr_ds.path.fixed_layers=[0,-1]", "raptr 3-4-5-6 freeze"),
        ("raptr", "raptr_ds.path.full_warmup_steps=7", "raptr 3-4-5-6 after 7 full steps freeze"),
        ("constant", "raptr_ds.path.sampling=bernoulli", "constant 5 bernoulli freeze"),
    ],
)
def test_what_differs_between_contestants_is_in_the_list(lab, method, settings, described):
    contestants = [{"name": "standard", "method": "standard"}, {"name": "other", "method": method, "set": [settings]}]
    listed = "\n".join(list_runs(lab.planner(contestants=contestants)))
    assert f"| other | {described} | 40 |" in listed


def test_the_command_is_the_documented_one(lab):
    (run, *_) = current_progress(lab.planner()).comparison
    assert command_of(run, "base.json", 1)[0] == "python"
    words = command_of(run, "base.json", 4, port=12345)
    assert words[:5] == ["deepspeed", "--num_accelerators", "4", "--master_port", "12345"]
    assert words[5].endswith("raptr_ds/pretrain.py")
    assert words[6:9] == ["--deepspeed_config", "base.json", "--set"]
    assert {"raptr_ds.train.seed=1", "raptr_ds.train.steps=40", "raptr_ds.path.method=full"} <= set(words[9:])


LAUNCHER = """\
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
import raptr_ds.lab.runner as runner
child = "import os, time; print('child', os.getpid(), flush=True); time.sleep(60)"
runner.command_of = lambda run, base, processes, port: [sys.executable, "-c", child]
run = runner.PlannedRun("comparison", "a", 1, None, 1, Path(sys.argv[1]), (), {})
with runner.claimed(run.folder, print) as lock:
    runner.LocalLauncher("base.json", 1, lock)(run)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_run_outlives_the_tool(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, tmp_path], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (found := re.search(r"^child (\d+)$", _text(tmp_path / "log.txt"), re.MULTILINE)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) != 0
    with claimed(tmp_path, print):  # waits for the child, which holds the folder too
        stat = _text(Path("/proc") / found[1] / "stat")
    assert not stat or stat.rpartition(")")[2].split()[0] == "Z"


def _text(file):
    return file.read_text() if file.exists() else ""


def test_two_tools_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("raptr_ds.lab.runner._STOP_SECONDS", 0.0)
    said = []
    with claimed(tmp_path, said.append), pytest.raises(ConfigError, match="in use"), claimed(tmp_path, said.append):
        pass
    assert len(said) == 1


def test_a_local_launch_logs_and_returns_the_exit_code(tmp_path, monkeypatch):
    def command(run, base, processes, port):
        return [sys.executable, "-c", "import sys; print('hello'); print('there', file=sys.stderr); sys.exit(5)"]

    monkeypatch.setattr("raptr_ds.lab.runner.command_of", command)
    run = PlannedRun("comparison", "a", 1, None, 1, tmp_path, (), {})
    assert LocalLauncher("base.json", 1)(run) == 5
    log = (tmp_path / "log.txt").read_text()
    assert "hello\n" in log
    assert "there\n" in log
