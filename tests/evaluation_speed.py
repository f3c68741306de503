"""How fast an evaluation is beside the harness's own class, by hand: no test of pytest, and nothing is asserted.

python -m tests.evaluation_speed MODEL --task-files FOLDER [--tasks boolq,copa] [--limit 100] [--repeats 3]

MODEL: an exported UL2 folder. Each task is asked of both classes in turn, in one process on one thread; prints the
time of the harness's class divided by ours, left to right and with a prefix: CPU time inside the class, best of the
repeats.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from raptr_ds.evaluation.catalogue import Catalogue
from raptr_ds.evaluation.language_model import PrefixLM
from raptr_ds.evaluation.run import run_tasks
from raptr_ds.evaluation.tasks import load_tasks
from raptr_ds.hf.load import load_prefix_model


def _timed(model: LM) -> list[float]:
    """Have the model add the CPU seconds of each call to a list, which is returned."""
    seconds: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            begin = time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                seconds.append(time.process_time() - begin)

        return run

    for name in ("loglikelihood", "generate_until"):
        setattr(model, name, timed(getattr(model, name)))
    return seconds


def main() -> None:
    """Parse the command line, evaluate and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported folder")
    parser.add_argument("--task-files", type=Path, required=True, help="as of tools/evaluate.py --fetch")
    parser.add_argument("--tasks", default="boolq,cb,copa,sglue_rte,piqa,winogrande,arc_easy", help="of the harness")
    parser.add_argument("--limit", type=int, default=100, help="documents of a task (default 100)")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts (default 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = Catalogue()
    ours, harness_class = load_prefix_model(options.model), cast("Any", HFLM)  # its decorator hides its parameters
    models: dict[str, LM] = {
        "harness": harness_class(pretrained=str(options.model), device="cpu", batch_size=16, dtype="float32"),
        "left to right": PrefixLM(ours, causal=True, batch_size=16),
        "prefix": PrefixLM(ours, batch_size=16),
    }
    print("| task | left to right | prefix |\n|---|---|---|")
    for name in options.tasks.split(","):
        best: dict[str, float] = {}
        for _ in range(options.repeats):
            for kind, model in models.items():
                seconds = _timed(model)
                list(run_tasks(load_tasks(catalogue, [name], options.task_files), {kind: model}, limit=options.limit))
                best[kind] = min(best.get(kind, float("inf")), sum(seconds))
        print(
            f"| {name} | " + " | ".join(f"{best['harness'] / best[kind]:.2f}" for kind in models if kind != "harness")
        )


if __name__ == "__main__":
    main()
