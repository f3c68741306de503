"""Fine-tune an encoder on a task: python tools/finetune.py MODEL --task NAME|FILE [--output FOLDER].

MODEL: a folder of tools/export_hf.py (MegatronBert or ESM), a run of a BERT, or one checkpoint. Tasks by name: glue and
superglue, or those in them; squad, squad_v2; and, from pip packages, without the Hugging Face hub: film-reviews, boolq,
commonsense_qa, openbookqa, piqa, social_i_qa. Several with commas between them. FILE: JSON lines, CSV or TSV of your
own, or a folder of the datasets library. Prints mean and spread over seeds, keeps the best model in OUTPUT/best and
everything in OUTPUT/results.json. The same command continues what was interrupted.

Several processes: deepspeed --num_accelerators N tools/finetune.py ..., or torchrun; --deepspeed FILE for ZeRO.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import _command_line
from _command_line import COUNT, above_zero
from rich.console import Console
from rich.table import Table

from raptr_ds.errors import ConfigError
from raptr_ds.finetuning.local_task import LocalOptions, load_local
from raptr_ds.finetuning.named_tasks import named_tasks, unknown
from raptr_ds.finetuning.sources import check_folder_is_used, load_named
from raptr_ds.finetuning.task import KINDS, Examples, Recipe, Task
from raptr_ds.parallel.launch import prepare_imports
from raptr_ds.user_paths import exists, is_file

if TYPE_CHECKING:  # torch and transformers take seconds to import: check the command line before
    from raptr_ds.finetuning.encoder import Encoder
    from raptr_ds.finetuning.jobs import TaskResult
    from raptr_ds.finetuning.training import Settings

MAX_LENGTH = 256
Say = Callable[[str], None]


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is learned from."""
    group = parser.add_argument_group("the task")
    group.add_argument("--task", required=True, metavar="NAME|FILE", help="as above")
    group.add_argument(
        "--data", type=Path, metavar="FOLDER", help="a named task's data, as the datasets library saved them"
    )
    group.add_argument("--validation", type=Path, metavar="FILE", help="validation rows for your own FILE")
    group.add_argument(
        "--validation-fraction",
        type=above_zero,
        metavar="F",
        help="or the share of FILE that is held out (default 0.1)",
    )
    group.add_argument("--kind", choices=KINDS, help="of your own task (default: by its columns)")
    group.add_argument("--text-column", metavar="NAME", help="default: sentence1, sentence, text, premise or question")
    group.add_argument("--pair-column", metavar="NAME", help="default: sentence2 or hypothesis, if there is one")
    group.add_argument("--label-column", metavar="NAME", help="default: label, labels or score")
    group.add_argument(
        "--cache-folder",
        type=Path,
        default=_command_line.package_cache(),
        metavar="FOLDER",
        help="where packages are kept, with those of tools/prepare_data.py (default: %(default)s)",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how it is learned."""
    group = parser.add_argument_group("training (default: the task's recipe)")
    add = group.add_argument
    add("--seeds", type=COUNT, metavar="N", help="seeds 1 to N")
    add("--epochs", type=above_zero, metavar="N")
    add("--batch-size", type=COUNT, metavar="N", help="sequences of a step, over all processes")
    add("--learning-rate", type=above_zero, metavar="RATE")
    add("--weight-decay", type=float, metavar="W", help="as torch's AdamW has it")
    add("--max-length", type=COUNT, metavar="N", help=f"tokens (default {MAX_LENGTH}, or what the model takes)")
    add("--early-stopping", type=COUNT, metavar="PATIENCE", help="stop after so many evaluations without a better one")
    add("--eval-steps", type=COUNT, metavar="N", help="steps between evaluations (default: an epoch)")
    add("--dropout", type=float, metavar="P", help="of hidden states and attention (default: the model's)")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the computation (default fp32)")
    add("--micro-batch-size", type=COUNT, metavar="N", help="sequences of one process at a time (default: all)")
    add("--deepspeed", type=Path, metavar="FILE", help="a DeepSpeed configuration, for Hugging Face's Trainer")
    add(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="a model of mnli that rte, mrpc and stsb start from, unless mnli is in the same command",
    )


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="an exported folder, a run's folder, or a checkpoint")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: finetuned/MODEL-TASK")
    parser.add_argument("--tokenizer", metavar="FILE", help="of a checkpoint that lies outside of its run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    add_task_arguments(parser)
    add_training_arguments(parser)
    arguments = parser.parse_args()
    for name, low, high in (("dropout", 0, 1), ("weight_decay", 0, math.inf)):
        value = getattr(arguments, name)
        if value is not None and not low <= value < high:
            parser.error(f"argument --{name.replace('_', '-')}: {value} must be {low} or more, and less than {high}")
    if arguments.deepspeed is not None and not is_file(arguments.deepspeed):
        parser.error(f"argument --deepspeed: there is no file {arguments.deepspeed}")
    return arguments


def tasks_and_data(arguments: argparse.Namespace, say: Say) -> list[tuple[Task, Examples]]:
    """Return what --task names. Raises: ConfigError or DataError if it is not there or not usable."""
    tasks = named_tasks(arguments.task)
    own = ("validation", "validation_fraction", "kind", "text_column", "pair_column", "label_column")
    given = [name for name in own if getattr(arguments, name) is not None]
    if tasks is not None:
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} is for files of your own, and --task {arguments.task} is a task by "
                "name, which has its own columns and splits. Leave it out."
            )
        check_folder_is_used(arguments.data, tasks)
        return [(task, load_named(task, arguments.data, arguments.cache_folder, say)) for task in tasks]
    path = Path(arguments.task)
    if not exists(path):
        raise unknown(arguments.task)
    if arguments.data is not None:
        raise ConfigError(f"--data is for tasks by name, and --task {path} has its own data. Leave it out.")
    options = LocalOptions(
        arguments.kind,
        arguments.text_column,
        arguments.pair_column,
        arguments.label_column,
        arguments.validation,
        arguments.validation_fraction,
    )
    return [load_local(path, options)]


def settings_of(recipe: Recipe, encoder: Encoder, arguments: argparse.Namespace) -> Settings:
    """Return a task's settings: its recipe, with what the command line changes."""
    from raptr_ds.finetuning.training import Settings

    changed = {name: getattr(arguments, name) for name in Recipe.__dataclass_fields__}
    recipe = replace(recipe, **{name: value for name, value in changed.items() if value is not None})
    return Settings(
        recipe=recipe,
        max_length=arguments.max_length or min(MAX_LENGTH, encoder.max_length),
        early_stopping=arguments.early_stopping,
        eval_steps=arguments.eval_steps,
        precision=arguments.precision,
        dropout=arguments.dropout,
        micro_batch_size=arguments.micro_batch_size,
        deepspeed=arguments.deepspeed,
    )


def results_table(results: Sequence[TaskResult]) -> Table:
    """Return a row for each task: mean and standard deviation over its seeds, times 100 as GLUE has them."""
    from raptr_ds.finetuning.metrics import SCORE

    table = Table(title="validation, times 100: mean ± standard deviation over seeds")
    table.add_column("task")
    for name in ("score", "baseline", "seeds"):
        table.add_column(name, justify="right")
    table.add_column("metrics", overflow="fold")
    for result in results:
        names = [name for name in result.mean if name.rpartition("/")[2] in result.metrics]
        metrics = ", ".join(f"{name} {spread(result, name)}" for name in names)
        best = "" if len(result.seeds) == 1 else f" (best: {result.best})"
        baseline = "" if result.baseline is None else f"{100 * result.baseline:.1f}"
        table.add_row(result.task, spread(result, SCORE), baseline, f"{len(result.seeds)}{best}", metrics)
    if len(results) > 1:
        table.add_section()
        table.add_row("mean", f"{100 * fmean(result.mean[SCORE] for result in results):.2f}", "", "", "")
    return table


def spread(result: TaskResult, name: str) -> str:
    """Return a metric's mean and deviation, times 100."""
    deviation = result.deviation[name]
    return f"{100 * result.mean[name]:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def main() -> None:
    """Parse the command line, fine-tune, and print the table."""
    arguments = parse()
    import torch

    prepare_imports(torch.cuda.is_available())
    from raptr_ds.finetuning.encoder import exported_encoder, open_encoder
    from raptr_ds.finetuning.jobs import Job, fine_tune_all
    from raptr_ds.finetuning.training import is_first

    _command_line.quiet_transformers()
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    say: Say = console.print if is_first() else lambda line: None
    with open_encoder(arguments.model, arguments.tokenizer) as encoder:
        start = None if arguments.start_from is None else exported_encoder(arguments.start_from)
        found = tasks_and_data(arguments, say)
        if start is not None and not any(task.starts_from for task, _ in found):
            raise ConfigError(
                f"--start-from is for rte, mrpc and stsb. To start {arguments.task} from {arguments.start_from}, name "
                "that folder as MODEL."
            )
        stem = Path(arguments.task).stem if len(found) == 1 else arguments.task.replace(",", "-")
        output = arguments.output or Path("finetuned") / f"{arguments.model.resolve().name}-{stem}"
        jobs = [Job(task, data, settings_of(task.recipe, encoder, arguments)) for task, data in found]
        results = fine_tune_all(jobs, encoder, start, output, say)
    if is_first():
        Console(markup=False, emoji=False).print(results_table(results))
        console.print(f"best model: {output / 'best' if len(results) == 1 else output / 'TASK' / 'best'}")
        console.print(f"all results: {output / 'results.json'}")


if __name__ == "__main__":
    _command_line.run(main)
