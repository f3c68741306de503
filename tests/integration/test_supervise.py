"""tools/supervise.py over real processes: what is tried again, how signals pass, and a real run that loses a rank."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raptr_ds.runtime.signals import LONG_WORK_SECONDS
from raptr_ds.supervise.status import status_of
from tests.integration.conftest import ENV, PATIENCE, REPOSITORY, forked, lines_of, tiny_run, torchrun_command
from tests.integration.test_kills import TIMES, _num_lines, _tree

SUPERVISE = [sys.executable, "tools/supervise.py"]
# Counts its tries in a file and ends with the next of the codes that it was given; 9 kills itself. -1 is the 0 of a
# launcher whose run has not come to its end, and -2 the 2 of a Python without its file.
CODES = """\
import os, pathlib, sys
from raptr_ds.supervise.record import append_event
tried = pathlib.Path(sys.argv[1])
number = len(tried.read_text()) if tried.exists() else 0
with tried.open("a") as stream:
    stream.write(os.environ["RAPTR_RESTART_COUNT"])  # by which a run knows that it continues its own checkpoints
assert os.environ["RAPTR_SUPERVISOR"].endswith(f":{os.getppid()}")  # and by which it knows them
code = int(sys.argv[2 + number])
if code == 9:
    os.kill(os.getpid(), 9)
if code == 0:
    append_event(tried.parent, "end", exit_code=0)
if code == -2:
    print("python: can't open file 'pretrain.py'", file=sys.stderr)
sys.exit(2 if code == -2 else max(code, 0))
"""


def _supervise(folder: Path, *codes: int, **env: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """Supervise a command that ends with these codes, one try after another; return how it ended and the tries."""
    (folder / "codes.py").write_text(CODES)
    words = [*SUPERVISE, "--folder", str(folder), "--", sys.executable, str(folder / "codes.py"), str(folder / "tried")]
    done = subprocess.run(
        [*words, *map(str, codes)],
        cwd=REPOSITORY,
        env={**ENV, "RAPTR_RETRY_DELAY": "0", "PYTHONPATH": str(REPOSITORY), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, len((folder / "tried").read_text()) if (folder / "tried").exists() else 0


@pytest.mark.parametrize(
    ("codes", "code", "tries"),
    [
        ([0], 0, 1),
        ([1, 9, 0], 0, 3),
        ([75, 75, 0], 0, 3),
        ([2, 0], 2, 1),
        ([1, 2, 0], 2, 2),
        ([-2, 0], 0, 2),
        ([1, 1, 1, 1, 0], 1, 4),
        ([9, 9, 9, 9, 0], 137, 4),
        ([74, 76, 0], 0, 3),
        ([-1, 0], 0, 2),
        ([0, -1], 0, 1),
        ([-1, -1, -1, -1], 137, 4),
    ],
)
def test_codes_lead_to_tries(tmp_path: Path, codes: list[int], code: int, tries: int) -> None:
    done, tried = _supervise(tmp_path, *codes)
    assert (done.returncode, tried) == (code, tries), done.stderr
    assert (tmp_path / "tried").read_text() == "0123"[:tries]
    ended = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (ended["event"], ended["code"]) == ("give_up" if code else "done", code)
    assert ended["why"] in done.stderr


@pytest.mark.parametrize("is_disk_full", [True, False])
def test_a_standard_error_that_takes_nothing_ends_nothing(tmp_path: Path, is_disk_full: bool) -> None:
    # More than a pipe holds: nobody would leave if it were not read on.
    program = f"import sys\nsys.stderr.write('x' * 300_000)\nsys.argv[1:1] = [{str(tmp_path / 'tried')!r}]\n{CODES}"
    (tmp_path / "noisy.py").write_text(program)
    words = [*SUPERVISE, "--folder", str(tmp_path), "--", sys.executable, str(tmp_path / "noisy.py"), "1", "0"]
    reader, writer = os.pipe()
    os.close(reader)
    env = {**ENV, "RAPTR_RETRY_DELAY": "0", "PYTHONPATH": str(REPOSITORY)}
    with open("/dev/full", "wb") as full, open(writer, "wb") as unread:  # noqa: PTH123
        stderr = full if is_disk_full else unread
        done = subprocess.run(words, cwd=REPOSITORY, env=env, stderr=stderr, timeout=60, check=False)
    assert (done.returncode, (tmp_path / "tried").read_text()) == (0, "01")
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == ["launch", "restart", "launch", "end", "done"]


def test_torchrun_hides_no_mistake(tmp_path: Path) -> None:
    # Its own code is 1 whatever the ranks' was; the other rank is killed for it.
    program = (
        "import os, sys, time\ntime.sleep(60 * int(os.environ['RANK']))\n"
        "print('raptr_ds: ConfigError: no', file=sys.stderr)\nsys.exit(2)\n"
    )
    (tmp_path / "ranks.py").write_text(program)
    words = [*SUPERVISE, "--folder", str(tmp_path), "--", "torchrun", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*words, str(tmp_path / "ranks.py")], cwd=REPOSITORY, env=ENV, capture_output=True, timeout=60, check=False
    )
    assert b"the run file or its data is wrong" in done.stderr, done.stderr
    assert done.returncode == 1


def test_the_number_of_retries_is_a_variable(tmp_path: Path) -> None:
    assert _supervise(tmp_path, 1, 1, 0, RAPTR_MAX_RETRIES="1")[1] == 2


@pytest.mark.parametrize("value", ["many", "-1", "nan", "inf"])
@pytest.mark.parametrize("variable", ["RAPTR_MAX_RETRIES", "RAPTR_RETRY_DELAY"])
def test_variables_that_are_no_numbers_are_mistakes(tmp_path: Path, variable: str, value: str) -> None:
    done, tries = _supervise(tmp_path, 0, **{variable: value})
    assert (done.returncode, tries) == (2, 0)
    assert f"{variable}={value!r} must be a number" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_command_whose_folder_is_unknown_is_refused() -> None:
    done = subprocess.run(
        [*SUPERVISE, "--", "true"], cwd=REPOSITORY, env=ENV, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--folder" in done.stderr


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    words = [*SUPERVISE, "--folder", str(tmp_path), "--", "no-such-launcher"]
    env = {**ENV, "RAPTR_MAX_RETRIES": "0"}
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "no-such-launcher cannot be started: No such file or directory" in done.stderr


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_signals_are_passed_on_and_end_the_tries(tmp_path: Path, name: str) -> None:
    program = (
        "import signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(50)\n"
    )
    heard = ["env", "--default-signal=HUP"]  # under nohup the tests ignore it, and so would what they start
    words = [*heard, *SUPERVISE, "--folder", str(tmp_path), "--", sys.executable, "-c", program]
    with subprocess.Popen(words, cwd=REPOSITORY, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 75, errors
    assert f"{name}: passed on to the command" in errors.decode()
    assert status_of(tmp_path).state == "stopped"


def test_a_request_to_stop_during_a_delay_ends_the_tries(tmp_path: Path) -> None:
    words = [*SUPERVISE, "--folder", str(tmp_path), "--", "false"]
    with subprocess.Popen(words, cwd=REPOSITORY, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "next try in 15 s" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
    assert status_of(tmp_path).state == "stopped"


def test_a_supervisor_of_the_same_number_counts_its_own_tries(tmp_path: Path) -> None:
    # As in a container, which gives each supervisor the same host name and number.
    program = (
        "import os, runpy, sys\n"
        "os.getpid = lambda: 7\n"
        f"sys.argv = ['tools/supervise.py', '--folder', {str(tmp_path)!r}, '--', 'false']\n"
        "sys.path.insert(0, 'tools')\n"
        "runpy.run_path('tools/supervise.py', run_name='__main__')\n"
    )
    env = {**ENV, "RAPTR_MAX_RETRIES": "1", "RAPTR_RETRY_DELAY": "0"}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == 2 * ["launch", "restart", "launch", "give_up"]


def test_processes_that_outlive_the_launcher_end_before_the_next_try(tmp_path: Path) -> None:
    # As a run whose launcher is killed: its ranks save, in sessions of their own, and have as long as they allow it.
    program = (
        "import pathlib, subprocess, sys, time\n"
        f"saved = pathlib.Path({str(tmp_path / 'saved')!r})\n"
        "from raptr_ds.supervise.record import append_event\n"
        f"if saved.exists():\n    append_event(saved.parent, 'end', exit_code=0)\n    sys.exit(0)\n"
        "late = f'import pathlib, time; time.sleep(3); pathlib.Path({str(saved)!r}).touch()'\n"
        "subprocess.Popen([sys.executable, '-c', late], start_new_session=True, stderr=subprocess.DEVNULL)\n"
        "sys.exit(1)\n"
    )
    words = [*SUPERVISE, "--folder", str(tmp_path), "--", sys.executable, "-c", program]
    env = {**ENV, "RAPTR_MAX_RETRIES": "1", "RAPTR_RETRY_DELAY": "0"}
    done = subprocess.run(words, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert f"outlive the command: 1, which get {LONG_WORK_SECONDS:g} s to save and leave" in done.stderr
    assert "killed" not in done.stderr


def test_a_signal_reaches_the_processes_that_are_waited_for_and_ends_the_tries(tmp_path: Path) -> None:
    program = (
        "import signal, subprocess, sys\n"
        "wait = 'import signal; signal.signal(15, lambda *_: print(\"left\", flush=True) or exit(1)); signal.pause()'\n"
        "subprocess.Popen([sys.executable, '-c', wait], start_new_session=True)\n"
        "sys.exit(1)\n"
    )
    words = [*SUPERVISE, "--folder", str(tmp_path), "--", sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=REPOSITORY, env=ENV, stdout=pipe, stderr=pipe, text=True) as supervisor:
        assert supervisor.stderr is not None
        for line in supervisor.stderr:
            if "outlive the command" in line:
                break
        supervisor.send_signal(signal.SIGTERM)
        printed, errors = supervisor.communicate(timeout=30)
    assert printed == "left\n"
    assert "start again to continue from the last checkpoint" in errors
    assert ": try 1," not in errors


def _with_orphans(commands: str, ending: str) -> str:
    """Return what a supervisor prints that adopts the shell's background commands, then runs a line of Python."""
    program = (
        "import subprocess, time\n"
        "from raptr_ds.supervise.command import StopRequests, adopt_orphans, end_orphans\n"
        "stops = StopRequests()\n"
        "adopt_orphans()\n"
        f"subprocess.run(['bash', '-c', {commands!r}])\n"
        f"{ending}\n"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=REPOSITORY, env=ENV, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_that_do_not_end_are_killed() -> None:
    printed = _with_orphans(
        "setsid sleep 300 & setsid sleep 300 &", "print(end_orphans(0.2, stops), end_orphans(0, stops))"
    )
    assert printed == "2 0\n"


def test_a_stopped_process_is_continued_so_that_it_can_save_and_leave() -> None:
    stopped = "setsid bash -c 'kill -STOP $$; echo saved' &"
    assert _with_orphans(stopped, "time.sleep(0.5); print(end_orphans(20, stops))") == "saved\n0\n"


def test_a_number_of_retries_that_is_not_whole_is_a_mistake(tmp_path: Path) -> None:
    done, tries = _supervise(tmp_path, 0, RAPTR_MAX_RETRIES="2.5")
    assert (done.returncode, tries) == (2, 0)
    assert "RAPTR_MAX_RETRIES=2.5 must be a whole number" in done.stderr


def _rank_of(launcher: int, rank: int) -> int:
    """Return the process of a rank below torchrun."""
    for process in _tree(launcher):
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return process
    raise AssertionError("no such rank")


@pytest.mark.slow
def test_a_run_that_loses_a_rank_ends_as_the_run_that_lost_none(data_folder: Path, tmp_path: Path) -> None:
    saves = [tmp_path / "whole", tmp_path / "killed"]
    sections = {"train": {"steps": 60}, "checkpoint": {"interval": 3}}
    for save in saves:
        save.with_suffix(".json").write_text(json.dumps(tiny_run(data_folder, save, **sections)))
    done = forked(saves[0].with_suffix(".json"), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    words = [*SUPERVISE, "--", *torchrun_command(saves[1].with_suffix(".json"))]
    log = tmp_path / "log"
    env = {**ENV, "RAPTR_MAX_RETRIES": "0"}
    with (
        log.open("wb") as output,
        subprocess.Popen(words, cwd=REPOSITORY, env=env, stdout=output, stderr=output) as process,
    ):
        deadline = time.monotonic() + PATIENCE
        while _num_lines(saves[1]) < 10:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        os.kill(_rank_of(process.pid, 1), signal.SIGKILL)
        assert process.wait(PATIENCE) == 0, log.read_text()
    assert "a fault ended the step" in log.read_text()
    expected, found = lines_of(saves[0]), lines_of(saves[1])
    assert len(found) > 60
    for one, other in zip(expected, found, strict=True):  # floats are written with all their digits
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
