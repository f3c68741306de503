"""Comparisons without training: a stand-in for pretrain.py that writes what a run leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.lab.comparison import session_of, write_record
from raptr_ds.lab.file import load_experiment
from raptr_ds.lab.plan import PlannedRun, Planner
from raptr_ds.lab.runner import ComparisonProgress, run_comparison
from raptr_ds.paths.cost import step_flops
from raptr_ds.runtime.method import path_method_of

VOCAB_SIZE = 600
# What a method adds to the loss; seeds add the same to all methods.
HANDICAPS = {"full": 0.0, "raptr": 0.05, "constant": 0.2, "pld": 0.3}
BASE = {
    "train_batch_size": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "raptr_ds": {
        "model": {
            "architecture": "bert",
            "num_layers": 6,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "seq_length": 32,
        },
        "data": {"path": "nowhere"},
        "train": {"steps": 40},
        "eval": {"batches": 1, "interval": 5},
    },
}
COMPARISON = {
    "base": "base.json",
    "contestants": [
        {"name": "standard", "method": "standard"},
        {"name": "raptr", "method": "raptr", "set": ["raptr_ds.path.schedule=3-4-5-6"]},
    ],
    "seeds": [1, 2, 3],
}


class StandIn:
    """Runs planned runs by writing their metrics; `failing` titles end with their code, `stopping` ones half-way."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.started: list[str] = []
        self.failing: dict[str, int] = {}
        self.stopping: set[str] = set()

    def __call__(self, run: PlannedRun) -> int:
        """Write what the run would and return its exit code."""
        self.started.append(run.title)
        (run.folder / "log.txt").write_text(f"starting\n{run.title}\n")
        if run.title in self.failing:
            with (run.folder / "log.txt").open("a") as log:
                log.write("RuntimeError: out of luck\n")
            return self.failing[run.title]
        config = load_run_config(self.base, run.settings).with_vocab_size(VOCAB_SIZE)
        (run.folder / "config.json").write_text(json.dumps(config.resolved()))
        last = run.steps // 2 if run.title in self.stopping else run.steps
        (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines_of(config, last)))
        return 75 if last < run.steps else 0


def lines_of(config: Any, last: int) -> list[dict[str, Any]]:
    """Return the lines of a made-up run, with the real method's paths and their real FLOPs."""
    method, shape, lines, flops = path_method_of(config), config.model, [], 0
    rate, seed = config.optimizer["params"]["lr"], config.train.seed
    predicted = round(4 * predictions_per_sequence(config))
    handicap = HANDICAPS[config.path.method] + 100 * abs(rate - 1e-3) + 0.01 * seed
    for step in range(1, last + 1):
        path = method.path_at(step - 1)
        flops += step_flops(shape, path.length, 4, predicted)
        loss = 5.0 * step**-0.1 + handicap
        line = {"step": step, "loss": loss, "path": list(path.layers), "path_length": path.length, "phase": path.phase}
        lines.append({**line, "flops": flops, "tokens": 128 * step, "step_seconds": 0.1 + 0.02 * path.length})
        if config.eval.due(step) or (step == config.train.steps and config.eval.batches):
            lines.append({"step": step, "eval_loss": loss + 0.1, "path_length": shape.num_layers})
    return lines


class Lab:
    """A folder with a base run file and a comparison file, and runs by a stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "base.json").write_text(json.dumps(BASE))
        self.file = folder / "mine.json"
        self.stand_in = StandIn(folder / "base.json")
        self.said: list[str] = []

    def planner(self, **changes: Any) -> Planner:
        """Return the planner of the comparison with other keys."""
        self.file.write_text(json.dumps({**COMPARISON, "output": str(self.folder / "out"), **changes}))
        return Planner(load_experiment(self.file), VOCAB_SIZE)

    def run(self, planner: Planner) -> ComparisonProgress:
        """Run the comparison; what was started is in stand_in.started."""
        self.stand_in.started.clear()
        session = session_of(["python", "tools/experiment.py", "mine.json"])
        return run_comparison(
            planner, self.stand_in, self.said.append, lambda progress: write_record(planner, progress, "mine", session)
        )


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A comparison of two contestants on three seeds at equal steps, nothing run yet."""
    return Lab(tmp_path)
