"""A node that loses its power: the job comes back by itself, and nobody takes it for cancelled."""

import json
from pathlib import Path

from tests.slurm.lab import SlurmLab
from tests.slurm.stand_in import Job

# Waits in its first start, and ends well in a later one.
WAITING = """\
import os, time
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
print(f"task {os.environ['SLURM_PROCID']} start {start}", flush=True)
time.sleep(0 if start else 300)
"""


def _events(folder: Path) -> list[str]:
    lines = (folder / "runs" / "bert_base_raptr" / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def test_a_lost_node_puts_the_job_back(lab: SlurmLab, job: Job) -> None:
    number = job.submit(WAITING)
    for rank in range(2):
        lab.wait_for_output(number, f"task {rank} start 0")
    lab.kill_node(2)
    lab.wait_for(number, "PENDING", "COMPLETING", seconds=60)  # Slurm takes the node for gone after 10 s
    lab.start_node(2)
    lab.wait_for_output(number, "task 1 start 1", seconds=60, final=())
    ended = lab.wait_for(number, seconds=60)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), lab.output(number)
    assert "not requeued" not in lab.output(number)
    assert _events(job.folder)[-2:] == ["end", "done"]
