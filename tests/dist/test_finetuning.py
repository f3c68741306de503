"""Fine-tuning by several processes: the next task starts from a model that the first process has kept."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raptr_ds.finetuning.encoder import exported_encoder
from raptr_ds.finetuning.jobs import Job, fine_tune_all
from raptr_ds.finetuning.named_tasks import NAMED_TASKS
from raptr_ds.finetuning.task import Example, TaskData
from raptr_ds.finetuning.training import Settings
from raptr_ds.hf.export import export
from raptr_ds.parallel.groups import lone_process_groups
from raptr_ds.parallel.launch import Launch
from tests.dist.workers import run_distributed
from tests.small_tasks import write_run


def fine_tune_slowly(launch: Launch, model: str, output: str) -> list[dict[str, Any]]:
    """Fine-tune on MNLI, then on RTE, where keeping a model takes a while; return the metrics of both."""
    copy = shutil.copytree

    def copy_slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return copy(*arguments)

    shutil.copytree = copy_slowly
    jobs = []
    for name in ("mnli", "rte"):
        task = NAMED_TASKS[name]
        settings = Settings(replace(task.recipe, epochs=1, batch_size=4, seeds=1), max_length=16)
        examples = [Example(f"a cat {number}", "a dog", number % len(task.labels)) for number in range(8)]
        jobs.append(Job(task, TaskData(examples, examples, task.labels), settings))
    results = fine_tune_all(jobs, exported_encoder(Path(model)), None, Path(output), lambda line: None)
    return [result.mean for result in results]


def test_every_process_finds_the_model_of_the_task_before(tmp_path: Path) -> None:
    with lone_process_groups() as groups:
        run = write_run(tmp_path, groups, architecture="bert")
    export(run, tmp_path / "model", torch.float32)
    arguments = (fine_tune_slowly, 2, str(tmp_path / "model"), str(tmp_path / "out"))
    first, second = run_distributed(*arguments)
    assert first == second
    assert len(first) == 2
    assert run_distributed(*arguments) == [first, first]  # where nothing is left to train
