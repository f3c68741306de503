"""Faults at random for as long as one likes: a supervised run must come out as the run that nobody disturbed.

python -m tests.soak --minutes 60 --seed 1 [--steps N] [--output FOLDER]     (or: make soak)

Trains a tiny run of two ranks twice: undisturbed, and under tools/supervise.py while a seeded list of faults strikes:
kill -9 of a rank or of the launcher, in training and in start-up; a rank or the launcher stopped (SIGSTOP) until the
watchdog ends the run; a signal to stop; a full disk (where a file system can be mounted). Where the time is over, the
rest is trained without faults. Ends with the tally of faults, the comparison of the metrics, and the memory of the
undisturbed run's processes over its steps; exit code 1 if a line differs. It is no test of pytest: it takes hours.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration.conftest import ENV, REPOSITORY, lines_of, tiny_run, torchrun_command
from tests.integration.test_kills import TIMES, _tree

WATCHDOG_SECONDS = 10.0
DISK_BYTES = 64 << 20


class Disturbed:
    """The supervised run, started again by us when a request to stop has ended the supervision too."""

    def __init__(self, run: Path, save: Path, log: Path) -> None:
        self.run, self.save, self.log = run, save, log
        self.process, self.was_asked_to_stop = self._start(), False

    def ask_to_stop(self, number: signal.Signals) -> bool:
        """Send the supervision a signal, which it passes on."""
        self.was_asked_to_stop = True
        self.process.send_signal(number)
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "tools/supervise.py", "--", *torchrun_command(self.run)]
        env = {**ENV, "RAPTR_RETRY_DELAY": "1", "RAPTR_MAX_RETRIES": "6"}
        with self.log.open("ab") as log:
            return subprocess.Popen(words, cwd=REPOSITORY, env=env, stdout=log, stderr=log, start_new_session=True)

    def is_done(self) -> bool:
        """Return whether the run is trained. Raises: RuntimeError if its supervision has given up."""
        code = self.process.poll()
        if code and self.was_asked_to_stop:  # whatever the launcher made of it
            self.was_asked_to_stop = False
            self.process = self._start()
        elif code is not None and code != 0:
            raise RuntimeError(f"the supervision ended with {code}: see {self.log}")
        return code == 0

    def ranks(self) -> list[int]:
        """Return the training processes; none while they start."""
        return [process for process in _tree(self.process.pid) if b"--deepspeed_config" in _words_of(process)[2:4]]

    def launcher(self) -> list[int]:
        """Return torchrun's process."""
        return [process for process in _tree(self.process.pid) if any(b"torchrun" in w for w in _words_of(process)[:2])]


def _words_of(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _send(processes: list[int], number: signal.Signals, draw: random.Random) -> bool:
    if not processes:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(draw.choice(processes), number)
        return True
    return False


def _fill(save: Path, draw: random.Random) -> bool:
    ballast = save / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))
    time.sleep(draw.uniform(1, 8))
    with contextlib.suppress(OSError):
        ballast.unlink()
    return True


def _faults(disturbed: Disturbed, has_disk: bool) -> dict[str, Callable[[random.Random], bool]]:
    faults: dict[str, Callable[[random.Random], bool]] = {
        "kill -9 a rank": lambda draw: _send(disturbed.ranks(), signal.SIGKILL, draw),
        "kill -9 the launcher": lambda draw: _send(disturbed.launcher(), signal.SIGKILL, draw),
        "stop a rank for ever": lambda draw: _send(disturbed.ranks(), signal.SIGSTOP, draw),
        "ask to stop (SIGUSR1)": lambda _: disturbed.ask_to_stop(signal.SIGUSR1),
        "ask to stop (SIGTERM)": lambda _: disturbed.ask_to_stop(signal.SIGTERM),
    }
    if has_disk:
        faults["fill the disk"] = lambda draw: _fill(disturbed.save, draw)
    return faults


def _disturb(disturbed: Disturbed, minutes: float, draw: random.Random, has_disk: bool) -> Counter[str]:
    """Strike until the time is over, then let the run come to its end; return what struck how often."""
    struck: Counter[str] = Counter()
    faults = _faults(disturbed, has_disk)
    end = time.monotonic() + 60 * minutes
    while not disturbed.is_done():
        time.sleep(draw.uniform(0.5, 12))
        if time.monotonic() < end and disturbed.process.poll() is None:
            name = draw.choice(sorted(faults))
            if faults[name](draw):
                struck[name] += 1
    return struck


def _undisturbed(run: Path, save: Path, num_steps: int) -> list[tuple[int, float]]:
    """Train the run to its end; return (step, resident MB of its ranks together) along the way."""
    process = subprocess.Popen(torchrun_command(run), cwd=REPOSITORY, env=ENV, stdout=subprocess.DEVNULL)
    memory: list[tuple[int, float]] = []
    while process.poll() is None:
        time.sleep(0.5)
        step = sum("loss" in line for line in _whole_lines(save))
        ranks = [one for one in _tree(process.pid) if b"--deepspeed_config" in _words_of(one)[2:4]]
        if step >= (len(memory) + 1) * num_steps // 10 - num_steps // 20 and len(ranks) == 2:
            memory.append((step, sum(map(_resident_megabytes, ranks))))
    if process.returncode:
        raise RuntimeError(f"the undisturbed run ended with {process.returncode}")
    return memory


def _whole_lines(save: Path) -> list[dict[str, Any]]:
    try:
        return lines_of(save)
    except ValueError:  # a line is being written
        return []


def _resident_megabytes(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def _mount(folder: Path) -> bool:
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _differences(whole: Path, disturbed: Path) -> list[str]:
    """Return the lines of metrics.jsonl that differ in more than their times."""
    expected, found = (
        [{k: v for k, v in line.items() if k not in TIMES | {"failed_saves"}} for line in lines_of(save)]
        for save in (whole, disturbed)
    )
    wrong = [f"{one} became {other}" for one, other in zip(expected, found, strict=False) if one != other]
    return wrong + ([f"{len(expected)} lines became {len(found)}"] if len(expected) != len(found) else [])


def main() -> int:
    """Parse the command line, train twice and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long faults strike (default 60)")
    parser.add_argument("--seed", type=int, default=1, help="of the faults and their times (default 1)")
    parser.add_argument("--steps", type=int, default=10_000, help="of the run (default 10,000)")
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="must not exist (default runs/soak)")
    options = parser.parse_args()
    output: Path = options.output.absolute()
    output.mkdir(parents=True)
    disk = output / "disk"
    has_disk = _mount(disk)
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": options.steps, "watchdog_seconds": WATCHDOG_SECONDS},
        "checkpoint": {"interval": 100},
        "eval": {"interval": 500},
        "path": {"schedule": "2-3-4"},
    }
    runs = {}
    for name, save in (("whole", output / "whole"), ("disturbed", disk / "run")):
        runs[name] = output / f"{name}.json"
        runs[name].write_text(json.dumps(tiny_run(options.data.absolute(), save, **sections)))
    try:
        memory = _undisturbed(runs["whole"], output / "whole", options.steps)
        begin, disturbed = time.monotonic(), Disturbed(runs["disturbed"], disk / "run", output / "log.txt")
        struck = _disturb(disturbed, options.minutes, random.Random(options.seed), has_disk)
        wrong = _differences(output / "whole", disk / "run")
        events = Counter(
            event["event"] for event in map(json.loads, (disk / "run" / "events.jsonl").read_text().splitlines())
        )
        minutes = (time.monotonic() - begin) / 60
        print(f"{options.steps:,} steps, seed {options.seed}, {minutes:.0f} minutes until the disturbed run was done")
        for name, count in sorted(struck.items()):
            print(f"  {count:4d} x {name}")
        print("events: " + ", ".join(f"{count} {name}" for name, count in sorted(events.items())))
        print("memory of both ranks: " + ", ".join(f"step {step:,} {size:.0f} MB" for step, size in memory))
        print(f"metrics: {f'{len(wrong)} lines differ; the first: {wrong[0]}' if wrong else 'equal in every line'}")
        return int(bool(wrong))
    finally:
        if has_disk:
            subprocess.run(["umount", "-l", str(disk)], check=False)


if __name__ == "__main__":
    sys.exit(main())
