"""The tasks of one command, one behind the other; some start from the model that another one gave."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from raptr_ds.errors import ConfigError
from raptr_ds.finetuning.encoder import Encoder, exported_encoder
from raptr_ds.finetuning.seeds import (
    BEST,
    DESCRIPTION,
    RESULTS,
    Job,
    TaskResult,
    check_settings,
    fine_tune,
    write_results,
)
from raptr_ds.finetuning.training import Say, is_first
from raptr_ds.user_paths import exists, make_folder


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
