"""Faults at random for as long as one likes: a run started again must come out as the run that nobody disturbed.

python -m tests.soak --minutes 60 --seed 1 [--slurm] [--steps N] [--output FOLDER]     (or: make soak)

Trains a tiny run of two ranks twice: undisturbed, and under tools/supervise.py, or with --slurm as a job on a real
Slurm of three logical nodes, while a seeded list of faults strikes, in training and in start-up: kill -9 of a rank, of
the launcher, of the batch script or of the supervisor; a rank stopped (SIGSTOP) until the watchdog ends the run;
requests to stop; a node or Slurm's controller that is gone for a while; a full disk (where a file system can be
mounted). When the time is over, the rest is trained without faults. Ends with the tally of faults, the comparison of
the metrics, and the memory of the undisturbed run's processes over its steps; exit code 1 if a line differs. It is no
test of pytest: it takes hours.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.integration.conftest import ENV, REPOSITORY, lines_of, tiny_run, torchrun_command
from tests.integration.test_kills import TIMES, _tree
from tests.processes import is_rank, resident_megabytes
from tests.soak.cluster import Clustered
from tests.soak.faults import Disturbed
from tests.soak.supervised import Supervised

WATCHDOG_SECONDS = 10.0
DISK_BYTES = 64 << 20
NUM_MEASURED = 20  # how often memory is read


def _disturb(disturbed: Disturbed, minutes: float, draw: random.Random, has_disk: bool) -> Counter[str]:
    """Strike until the time is over, then let the run come to its end; return what struck how often."""
    struck: Counter[str] = Counter()
    faults = disturbed.faults(has_disk)
    end = time.monotonic() + 60 * minutes
    while not disturbed.is_done():
        time.sleep(draw.uniform(0.5, disturbed.longest_pause))
        if time.monotonic() < end and not disturbed.is_done():
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
        ranks = [one for one in _tree(process.pid) if is_rank(one)]
        if step >= (2 * len(memory) + 1) * num_steps // (2 * NUM_MEASURED) and len(ranks) == 2:
            memory.append((step, sum(map(resident_megabytes, ranks))))
    if process.returncode:
        raise RuntimeError(f"the undisturbed run ended with {process.returncode}")
    return memory


def _whole_lines(save: Path) -> list[dict[str, Any]]:
    try:
        return lines_of(save)
    except ValueError:  # a line is being written
        return []


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
    parser.add_argument("--slurm", action="store_true", help="on a Slurm of three logical nodes (needs root)")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), help="must not exist (default runs/soak)")
    options = parser.parse_args()
    output: Path = options.output.absolute()
    output.mkdir(parents=True)
    disk = output / "disk"
    has_disk = _mount(disk)
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": options.steps},
        "checkpoint": {"interval": 100},
        "eval": {"interval": 500},
        "path": {"schedule": "2-3-4"},
    }
    runs = {}
    for name, save in (("whole", output / "whole"), ("disturbed", disk / "run")):
        if name == "disturbed":  # in the other a busy machine is no fault
            sections["train"]["watchdog_seconds"] = WATCHDOG_SECONDS
        runs[name] = output / f"{name}.json"
        runs[name].write_text(json.dumps(tiny_run(options.data.absolute(), save, **sections)))
    try:
        memory = _undisturbed(runs["whole"], output / "whole", options.steps)
        begin, save = time.monotonic(), disk / "run"
        disturbed = (Clustered if options.slurm else Supervised)(runs["disturbed"], save, output / "log.txt")
        try:
            struck = _disturb(disturbed, options.minutes, random.Random(options.seed), has_disk)
        finally:
            disturbed.close()
        wrong = _differences(output / "whole", save)
        events = Counter(event["event"] for event in map(json.loads, (save / "events.jsonl").read_text().splitlines()))
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
