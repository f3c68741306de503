"""The run's folder from a command line, its newest checkpoint, and its events."""

import subprocess
import sys
from pathlib import Path

import pytest

from raptr_ds.checkpoint.folder import (
    CHECKPOINTS,
    MANIFEST,
    checkpoints_in,
    set_aside,
    step_folder,
    step_of,
    unfinished_folder,
)
from raptr_ds.config.load import load_run_config
from raptr_ds.errors import ConfigError
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.events import EVENTS, read_events
from raptr_ds.runtime.run_lock import RunLock
from raptr_ds.supervise.command import Reports
from raptr_ds.supervise.policy import Cause, Ending, Failure, Limits, cause_of
from raptr_ds.supervise.record import append_event, newest_step, run_folder
from raptr_ds.supervise.supervisor import Supervised

LAUNCH = {"job": "1", "start": 0, "step": 0}
REPOSITORY = Path(__file__).resolve().parents[3]
QUICKSTART = REPOSITORY / "deepspeed_configs" / "bert_quickstart_full.json"


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--set", "raptr_ds.train.save=elsewhere"],
        ["--set", "raptr_ds.train.steps=5", "raptr_ds.train.save=two words"],
        ["--set", "raptr_ds.train.save=first", "--set", "raptr_ds.train.save=last"],
        ["--set=raptr_ds.train.save=joined"],
        ["--set", 'raptr_ds.train={"save": "inside", "steps": 4}'],
        ["--set", "raptr_ds.train.save=null"],
    ],
)
@pytest.mark.parametrize("option", [["--deepspeed_config", "{}"], ["--deepspeed_config={}"]])
@pytest.mark.parametrize("launcher", [["deepspeed", "--num_gpus", "8"], ["srun", "--nodes=2", "python"]])
def test_the_folder_is_the_one_that_the_run_itself_derives(
    launcher: list[str], option: list[str], settings: list[str]
) -> None:
    words = [*launcher, "raptr_ds/pretrain.py", *(word.format(QUICKSTART) for word in option), *settings]
    overrides = [word.removeprefix("--set=") for word in settings if word != "--set"]
    assert run_folder(words) == Path(load_run_config(QUICKSTART, overrides).train.save)


def test_without_a_save_folder_it_has_the_files_name(tmp_path: Path) -> None:
    (tmp_path / "named.json").write_text("{}")
    assert run_folder(["--deepspeed_config", str(tmp_path / "named.json")]) == Path("runs/named")


@pytest.mark.parametrize("text", ["{", "[]", '{"raptr_ds": 3}', '{"raptr_ds": {"train": []}}', None])
def test_a_run_file_that_the_run_will_refuse_shows_no_folder(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert run_folder(["python", "pretrain.py", "--deepspeed_config", str(tmp_path / "run.json")]) is None


@pytest.mark.parametrize("words", [[], ["true"], ["pretrain.py", "--set", "raptr_ds.train.save=x"]])
def test_a_command_without_a_run_file_shows_no_folder(words: list[str]) -> None:
    assert run_folder(words) is None


def test_the_newest_step_is_that_of_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_step(None) == newest_step(tmp_path) == 0
    folder = tmp_path / CHECKPOINTS
    for step in (9, 10, 123456789):
        step_folder(folder, step).mkdir(parents=True)
        (step_folder(folder, step) / MANIFEST).touch()
    unfinished_folder(folder, 10**9).mkdir()
    (unfinished_folder(folder, 10**9) / MANIFEST).touch()
    assert newest_step(tmp_path) == step_of(checkpoints_in(folder)[0]) == 123456789
    set_aside(folder, 100)
    step_folder(folder, 11).mkdir()  # without a manifest
    assert newest_step(tmp_path) == 10


def test_events_survive_torn_lines_and_other_writers(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert append_event(folder, "launch", start=0, step=0, job="1") is None
    with (folder / EVENTS).open("a") as file:
        file.write('{"event": "saved", "step": 3}\n[1]\n"x"\n' + "[" * 100_000 + '\n{"time": "2026-')
    assert append_event(folder, "restart", job="1") is None
    assert [event["event"] for event in read_events(folder)] == ["launch", "saved", "restart"]


@pytest.mark.parametrize("where", ["file", "nul\0", "x" * 300])
def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / where
    assert "cannot be" in (append_event(folder, "launch") or "")
    assert read_events(folder) == []
    assert newest_step(folder) == 0


def test_a_job_that_was_given_up_and_started_again_has_all_its_retries(tmp_path: Path) -> None:
    for start in range(3):  # each its own process, as under Slurm
        run = Supervised(tmp_path, "7", Limits(max_retries=2))
        assert run.begin(start).retry
        assert run.judge(start, Ending(1))[1].retry == (start < 2)
    for start in (3, 4):
        run = Supervised(tmp_path, "7", Limits(max_retries=2))
        assert run.begin(start).retry
        assert run.judge(start, Ending(1))[1].retry


def test_starts_that_nobody_judged_are_not_repeated_for_ever(tmp_path: Path) -> None:
    assert [Supervised(tmp_path, "7", Limits(max_retries=2)).begin(start).retry for start in range(4)] == [
        True,
        True,
        True,
        False,
    ]


def test_other_jobs_do_not_count(tmp_path: Path) -> None:
    for job in "abcdef":
        run = Supervised(tmp_path, job, Limits(max_retries=1))
        assert run.begin(0).retry
        assert run.judge(0, Ending(1))[1].retry


def test_it_starts_without_the_libraries_of_training() -> None:
    show = "import sys, raptr_ds.supervise.slurm; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", show], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("events", "code"),
    [
        ([("launch", LAUNCH), ("start", {}), ("end", {"exit_code": 0})], 0),
        ([("launch", LAUNCH), ("start", {})], 137),
        ([("launch", LAUNCH)], 137),  # its tasks were gone before they could write
        ([("launch", LAUNCH), ("end", {"exit_code": 75})], 137),
        ([("launch", LAUNCH), ("end", {"exit_code": 0}), ("launch", LAUNCH)], 137),  # that of another start
        ([("launch", LAUNCH | {"job": "2"}), ("start", {})], 0),  # our own could not be written
        ([], 0),
    ],
)
def test_a_launchers_0_counts_if_the_run_recorded_its_end(
    tmp_path: Path, events: list[tuple[str, dict[str, object]]], code: int
) -> None:
    for name, fields in events:
        append_event(tmp_path, name, **fields)
    run = Supervised(tmp_path, "1", Limits())
    assert run.confirmed(Ending(0)) == Ending(code)
    assert run.confirmed(Ending(0, stop_requested=True)) == Ending(code, stop_requested=True)
    assert run.confirmed(Ending(75)) == Ending(75)


@pytest.mark.parametrize(
    ("events", "counts"), [(["launch"], True), (["start", "launch"], True), (["launch", "start"], False)]
)
def test_a_port_is_not_to_blame_once_the_ranks_have_met(tmp_path: Path, events: list[str], counts: bool) -> None:
    for name in events:
        append_event(tmp_path, name, **(LAUNCH if name == "launch" else {}))
    ending = Supervised(tmp_path, "1", Limits()).confirmed(Ending(1, port_taken=True))
    assert (cause_of(ending) is Cause.PORT) == counts


@pytest.mark.parametrize(("start", "retry"), [(0, False), (1, True)])
def test_a_folder_that_the_try_before_has_not_left_yet_is_waited_for(tmp_path: Path, start: int, retry: bool) -> None:
    launch = Launch(0, 0, 1, "127.0.0.1", 1, "none")
    held = RunLock(tmp_path, launch)
    with pytest.raises(ConfigError) as refusal:
        RunLock(tmp_path, launch)
    held.release()
    reports = Reports()
    reports.read(f"raptr_ds: ConfigError: {refusal.value}")
    run = Supervised(tmp_path, "1", Limits(delay_seconds=7))
    for number in range(start + 1):
        run.begin(number)
    cause, decision = run.judge(start, Ending(2, [Failure("node1", 2, "")], folder_in_use=reports.folder_in_use))
    assert (cause, decision.retry) == (Cause.OCCUPIED if retry else Cause.MISTAKE, retry)
    assert decision.delay_seconds == (7 * 4 if retry else 0)
    assert "node1" not in run.failed_nodes | Supervised(tmp_path, "1", Limits()).failed_nodes


def test_without_a_folder_the_launchers_code_counts() -> None:
    assert Supervised(None, "1", Limits()).confirmed(Ending(0)) == Ending(0)
