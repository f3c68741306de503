"""Stop signals in real processes: flags, forced exits, lost launchers, forks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}

WORKER = """
import ctypes, os, sys, time
from raptr_ds.runtime.signals import StopSignals
mode = sys.argv[1]
with StopSignals(watch_launcher=mode != "by hand", grace_seconds=1.0, poll_seconds=0.05) as stop:
    print("ready", os.getpid(), flush=True)
    if mode == "hang":
        mutex = ctypes.create_string_buffer(64)  # zeros are an initialized mutex; locking it twice hangs for good
        lock = ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex), lock(mutex)
    end = time.monotonic() + 20
    while time.monotonic() < end and not (stop.requested and mode != "stubborn"):
        stop.progressed()
        time.sleep(0.02)
    print("stopped by", stop.reason, flush=True)
sys.exit(75 if stop.requested else 0)
"""


def start(mode, **options):
    command = [sys.executable, "-c", WORKER, mode]
    worker = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, **options)
    assert worker.stdout is not None
    assert worker.stdout.readline().startswith("ready")
    return worker


def ends(process, seconds=8.0):
    """Wait until a process that may not be our child is gone; say whether it went."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_sets_the_flag_and_the_worker_chooses_its_exit_code(number):
    # Under nohup the tests themselves ignore SIGHUP, and what they start inherits that.
    worker = start("loop", preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    worker.send_signal(number)
    output, _ = worker.communicate(timeout=10)
    assert output == f"stopped by {number.name}\n"
    assert worker.returncode == 75


def test_an_ignored_hangup_stays_ignored():
    worker = start("loop", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    worker.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert worker.poll() is None
    worker.terminate()
    output, _ = worker.communicate(timeout=10)
    assert output == "stopped by SIGTERM\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_hanging_worker_but_not_an_immediate_repeat(number):
    # The worker's main thread hangs in C code, as in a collective: Python runs no handler there.
    worker = start("hang", stderr=subprocess.PIPE)
    worker.send_signal(number)
    time.sleep(0.2)
    worker.send_signal(number)
    other = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
    worker.send_signal(other)
    worker.send_signal(signal.SIGUSR1)
    time.sleep(2.2)
    worker.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert worker.poll() is None
    worker.send_signal(number)
    _, errors = worker.communicate(timeout=5)
    assert worker.returncode == 128 + number
    assert f"second {number.name}" in errors


LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait()
"""


def launch(mode):
    """Start a launcher with one worker below it; return the launcher, its output and the worker's process number."""
    command = [sys.executable, "-c", LAUNCHER, WORKER, mode]
    launcher = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert launcher.stdout is not None
    ready = launcher.stdout.readline().split()
    assert ready[0] == "ready"
    return launcher, int(ready[1])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_stops_by_itself_when_its_launcher_is_gone(number):
    launcher, worker = launch("loop")
    launcher.send_signal(number)
    launcher.wait(timeout=5)
    assert ends(worker)
    assert launcher.communicate(timeout=5)[0] == "stopped by launcher gone\n"


def test_an_orphan_that_hangs_ends_itself_after_the_grace_period():
    launcher, worker = launch("hang")
    launcher.kill()
    launcher.wait(timeout=5)
    assert not ends(worker, seconds=0.6)
    assert ends(worker)
    assert "no progress" in launcher.communicate(timeout=5)[0]


def test_an_orphan_that_makes_progress_may_go_on():
    launcher, worker = launch("stubborn")
    launcher.kill()
    launcher.wait(timeout=5)
    try:
        assert not ends(worker, seconds=2.5)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_worker_started_by_hand_outlives_its_shell():
    launcher, worker = launch("by hand")
    launcher.kill()
    launcher.wait(timeout=5)
    assert not ends(worker, seconds=1.0)
    os.kill(worker, signal.SIGTERM)
    assert ends(worker)
    assert launcher.communicate(timeout=5)[0] == "stopped by SIGTERM\n"


def test_deepspeeds_two_launcher_processes_are_both_watched(tmp_path):
    # `deepspeed` starts deepspeed.launcher.launch, which starts the worker; killing the first leaves the second alive.
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "launch.py").write_text(LAUNCHER)
    outer = tmp_path / "bin_deepspeed"
    middle = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", WORKER, "loop"]
    outer.write_text(f"import subprocess\nsubprocess.Popen({middle!r}).wait()\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, str(outer)]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    worker = int(launcher.stdout.readline().split()[1])
    launcher.terminate()
    launcher.wait(timeout=5)
    assert ends(worker)
    assert launcher.stdout.read() == "stopped by launcher gone\n"


FORKER = """
import multiprocessing, os, signal, time
from raptr_ds.runtime.signals import StopSignals
with StopSignals(poll_seconds=0.05) as stop:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(5)
    time.sleep(0.2)
    print(child.exitcode, stop.requested)
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


def test_signals_to_a_forked_child_are_its_own_and_handlers_are_put_back():
    run = subprocess.run([sys.executable, "-c", FORKER], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert run.stdout == f"{-signal.SIGTERM} False\nTrue\n"


def test_the_allowed_time_follows_slow_steps(monkeypatch):
    from raptr_ds.runtime.signals import StopSignals

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopSignals(grace_seconds=20.0)
    stop.progressed()
    assert stop._allowed_seconds == 20.0
    now[0] += 30
    stop.progressed()
    assert stop._allowed_seconds == 60.0
    stop.progressed(allow_seconds=600)
    assert stop._allowed_seconds == 600.0
    now[0] += 1
    stop.progressed()
    assert stop._allowed_seconds == 20.0
