"""The tasks of one command, each over several seeds in a folder: what is finished stays, the best model is kept."""

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import ConfigError
from raptr_ds.finetuning.encoder import Encoder, check_can_do, exported_encoder
from raptr_ds.finetuning.examples import digest_of
from raptr_ds.finetuning.features import encode
from raptr_ds.finetuning.metrics import SCORE, measure
from raptr_ds.finetuning.task import Examples, Task
from raptr_ds.finetuning.training import MODEL, Say, SeedResult, Settings, is_first, join, train_seed, wait_for_all
from raptr_ds.json_text import parse_json
from raptr_ds.user_paths import claimed, exists, is_file, make_folder, write_error

BEST = "best"
RESULTS = "results.json"
DESCRIPTION = "finetuning.json"
LEAST_LENGTH = 8  # tokens, in which a question with its context fits, cut
_FIX = "Name another folder with --output."


@dataclass(frozen=True)
class Job:
    """A task with its data and settings."""

    task: Task
    data: Examples
    settings: Settings


@dataclass(frozen=True)
class TaskResult:
    """What a task gave. mean, deviation: of each metric over the seeds (deviation None with one seed).

    baseline: the score of the answer that is the most frequent in training, None for question answering. best: the
    seed whose model is kept.
    """

    task: str
    metrics: tuple[str, ...]
    mean: dict[str, float]
    deviation: dict[str, float | None]
    baseline: float | None
    best: int
    num_train: int
    num_validation: int
    seeds: list[SeedResult]


def fine_tune_all(
    jobs: Sequence[Job], encoder: Encoder, start: Encoder | None, output: Path, say: Say
) -> list[TaskResult]:
    """Fine-tune on each task; several get a folder each in `output`, by the task's name.

    jobs: a task that starts from another one's model stands behind that one. start: the model that such tasks start
    from where the other one is not among the jobs; None: `encoder`.
    Raises: ConfigError for what does not fit, before anything is trained.
    """
    for job in jobs:
        check_settings(job, encoder)
    if len(jobs) == 1:
        return [fine_tune(jobs[0], _start_of(jobs[0], encoder, start, say), output, say)]
    if exists(output / DESCRIPTION):
        raise ConfigError(f"{output} holds the fine-tuning of one task. Name another folder with --output.")
    if is_first():
        for job in jobs:  # before the first is trained for hours, not after
            if exists(folder := output / job.task.name):
                _check_folder(folder, _known_description(job, jobs, start or encoder, encoder))
    models: dict[str, Path] = {}
    results = []
    for job in jobs:
        given = models.get(job.task.starts_from or "")
        begin = exported_encoder(given) if given else _start_of(job, encoder, start, say)
        results.append(fine_tune(job, begin, output / job.task.name, say))
        models[job.task.name] = output / job.task.name / BEST
        if is_first():
            make_folder(output)
            write_results(output / RESULTS, {result.task: asdict(result) for result in results})
    return results


def _start_of(job: Job, encoder: Encoder, start: Encoder | None, say: Say) -> Encoder:
    """Return the model that a task starts from, unless one of the same command is it."""
    other = job.task.starts_from
    if other is None:
        return encoder
    if start is None:
        say(
            f"{job.task.name}: starts from {encoder.name}. By convention it starts from a model of {other}: "
            f"--task {other},{job.task.name}, or --start-from FOLDER."
        )
    return start or encoder


def fine_tune(job: Job, encoder: Encoder, output: Path, say: Say) -> TaskResult:
    """Train the seeds 1, 2, ... of a task in a folder, and return what they gave.

    A seed with results is not trained again, one that was interrupted goes on from its last checkpoint. The best
    seed's model goes to output/best, all results to output/results.json.
    Raises: ConfigError if the folder holds another fine-tuning, or another process works there.
    """
    task, settings = job.task, job.settings
    check_settings(job, encoder)
    with claimed(output, "finetune.py", _FIX) if is_first() else nullcontext():
        if is_first():
            _describe(output, _description(job, encoder))
        finished = {seed: _finished(output / f"seed-{seed}") for seed in range(1, settings.recipe.seeds + 1)}
        features, results = None, [result for result in finished.values() if result is not None]
        for result in results:
            say(f"{task.name}, seed {result.seed}: finished before, score {100 * result.metrics[SCORE]:.2f}")
        for seed in [seed for seed, result in finished.items() if result is None]:
            if features is None:
                features = job.data.map(
                    partial(encode, task, tokenizer=encoder.tokenizer, max_length=settings.max_length)
                )
                say(
                    f"{task.name}: {len(features.train):,} training and {len(features.validation):,} validation "
                    f"sequences of at most {settings.max_length} tokens"
                )
            results.append(train_seed(task, features, encoder, settings, seed, output / f"seed-{seed}", say))
            if is_first():
                write_results(output / f"seed-{seed}" / RESULTS, asdict(results[-1]))
        results.sort(key=lambda result: result.seed)
        summary = summarize(task, job.data, results)
        if is_first():
            _keep_best(output, summary)
            write_results(output / RESULTS, asdict(summary))
    wait_for_all()  # the next task may start from the best model
    return summary


def check_settings(job: Job, encoder: Encoder) -> None:
    """Raise ConfigError for settings that do not fit the launch, the model or the task, before any work."""
    check_can_do(encoder, job.task.kind)
    join(job.settings)
    if job.settings.max_length < LEAST_LENGTH:
        raise ConfigError(
            f"--max-length {job.settings.max_length} leaves no room for texts between the special tokens. Give "
            f"{LEAST_LENGTH} or more."
        )
    if job.settings.max_length > encoder.max_length:
        raise ConfigError(
            f"--max-length {job.settings.max_length} is more than the {encoder.max_length} tokens that {encoder.name} "
            f"takes. Give {encoder.max_length} or fewer."
        )


def summarize(task: Task, data: Examples, results: Sequence[SeedResult]) -> TaskResult:
    """Return mean and sample standard deviation of each metric, and which seed is the best (the first of equals)."""
    by_name = {name: [result.metrics[name] for result in results] for name in results[0].metrics}
    return TaskResult(
        task=task.name,
        metrics=task.metrics,
        mean={name: fmean(values) for name, values in by_name.items()},
        deviation={name: stdev(values) if len(values) > 1 else None for name, values in by_name.items()},
        baseline=baseline(task, data),
        best=max(results, key=lambda result: result.metrics[SCORE]).seed,
        num_train=len(data.train),
        num_validation=len(data.validation),
        seeds=list(results),
    )


def baseline(task: Task, data: Examples) -> float | None:
    """Return the score of always giving training's most frequent answer; None for question answering."""
    if task.kind == "question-answering":
        return None
    labels = [example.label for example in data.train]
    if task.kind == "regression":
        outputs = np.zeros((len(data.validation), 1))
    else:
        width = len(data.labels) or len(data.train[0].choices)
        outputs = np.zeros((len(data.validation), width))
        outputs[:, np.bincount(np.array(labels, np.int64), minlength=width).argmax()] = 1
    return measure(task, outputs, data.validation)[SCORE]


def _description(job: Job, encoder: Encoder) -> dict[str, Any]:
    """Return what the results depend on; not where the model and the data lie."""
    task, settings = job.task, job.settings
    recipe = {name: value for name, value in asdict(settings.recipe).items() if name != "seeds"}
    own = {name: value for name, value in asdict(settings).items() if name not in ("recipe", "micro_batch_size")}
    if settings.deepspeed is not None:
        own["deepspeed"] = settings.deepspeed.read_text(encoding="utf-8")
    model = {"model": encoder.digest, "tokenizer": len(encoder.tokenizer)}
    return {"task": task.name, "kind": task.kind, "data": digest_of(job.data), **model, **recipe, **own}


def _known_description(job: Job, jobs: Sequence[Job], start: Encoder, encoder: Encoder) -> dict[str, Any]:
    """Return a task's description before anything is trained: without a model that one of `jobs` is yet to make."""
    other = job.task.starts_from
    description = _description(job, start if other else encoder)
    if any(other == made.task.name for made in jobs):
        del description["model"], description["tokenizer"]
    return description


def _describe(output: Path, description: dict[str, Any]) -> None:
    """Write what a new folder is for. Raises: ConfigError if it is for something else already."""
    _check_folder(output, description)
    if not is_file(output / DESCRIPTION):
        write_results(output / DESCRIPTION, description)


def _check_folder(output: Path, description: dict[str, Any]) -> None:
    """Raise ConfigError for a folder that is not new and holds anything but this fine-tuning."""
    path = output / DESCRIPTION
    if not is_file(path):
        others = sorted(entry.name for entry in output.iterdir() if entry.name != ".lock")
        if others:
            raise ConfigError(f"{output} holds {others[0]}, which is no fine-tuning of one task. {_FIX}")
        return
    found = _read(path)
    changed = [name for name in description if found.get(name) != description[name]]
    if changed:
        shown = "; ".join(f"{name} was {found.get(name)!r}, is {description[name]!r}"[:120] for name in changed[:4])
        raise ConfigError(
            f"{output} holds a fine-tuning with other settings: {shown}. Repeat its command to continue it, or name "
            "another folder with --output."
        )


def _finished(folder: Path) -> SeedResult | None:
    path = folder / RESULTS
    if not is_file(path):
        return None
    try:
        return SeedResult(**_read(path))
    except TypeError as error:
        raise ConfigError(f"{path} is damaged ({error}). Remove {folder}: the seed is then trained again.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}). Remove it: the same command makes it again.") from error


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Replace a file of results. Raises: PathError or StorageError if it cannot be written."""
    try:
        write_atomically(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise write_error(path, error, _FIX) from error


def _keep_best(output: Path, summary: TaskResult) -> None:
    """Put the best seed's model into output/best, over that of an earlier call with fewer seeds."""
    best, aside = output / BEST, output / f"{BEST}.new"
    for folder in (aside, best):
        if exists(folder):
            shutil.rmtree(folder)
    shutil.copytree(output / f"seed-{summary.best}" / MODEL, aside)
    aside.rename(best)
