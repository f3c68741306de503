"""One seed of a task on Hugging Face's Trainer: train, keep the best checkpoint, measure it."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import get_int_from_env
from torch.distributed import DistNetworkError
from transformers import (
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from raptr_ds.errors import ConfigError
from raptr_ds.finetuning.encoder import Encoder, load_for
from raptr_ds.finetuning.features import Features
from raptr_ds.finetuning.metrics import SCORE
from raptr_ds.finetuning.task import Recipe, Task, TaskData
from raptr_ds.json_text import parse_json

MODEL = "model"
_WARMUP = 0.06  # of all steps
_BETAS, _EPSILON = (0.9, 0.98), 1e-6  # MosaicBERT's and ModernBERT's
_STATE = "trainer_state.json"  # the last file of a checkpoint
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How every seed is trained.

    max_length: in tokens. early_stopping: evaluations without a better score, None: never. eval_steps: between
    evaluations, None: one for each epoch. micro_batch_size: the most sequences of one process at a time, None: all.
    dropout: None keeps the model's. deepspeed: a configuration file.
    """

    recipe: Recipe
    max_length: int = 256
    early_stopping: int | None = None
    eval_steps: int | None = None
    precision: str = "fp32"
    dropout: float | None = None
    micro_batch_size: int | None = None
    deepspeed: Path | None = None


@dataclass(frozen=True)
class SeedResult:
    """What a seed gave. metrics: of the best model, as fractions, those of further splits as `SPLIT/NAME`.

    step: after which the best model was measured; of num_steps that were trained. history: each evaluation.
    """

    seed: int
    metrics: dict[str, float]
    step: int
    num_steps: int
    seconds: float
    history: list[dict[str, float]]


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return get_int_from_env(["RANK"], 0) == 0


def join(settings: Settings) -> None:
    """Connect the processes of a launch. Raises: ConfigError as `training_arguments` does."""
    training_arguments(settings, 1, Path())


def wait_for_all() -> None:
    """Wait until every process of the launch is here; `join` has connected them."""
    PartialState().wait_for_everyone()


def batch_shares(settings: Settings) -> tuple[int, int]:
    """Return the sequences of one device at a time, and how many times it takes those for one step.

    Raises: ConfigError if the batch cannot be shared equally.
    """
    batch = settings.recipe.batch_size
    # The processes of a launcher; without one the GPUs.
    devices = get_int_from_env(["WORLD_SIZE"], 0) or max(1, torch.cuda.device_count())
    largest = max(1, batch // devices)
    micro = min(settings.micro_batch_size or largest, largest)
    if batch % (micro * devices):
        raise ConfigError(
            f"--batch-size {batch} is no multiple of {devices} devices with {micro} sequences each at a time. Give a "
            "multiple, or another --micro-batch-size."
        )
    return micro, batch // (micro * devices)


def training_arguments(settings: Settings, seed: int, folder: Path) -> TrainingArguments:
    """Return Trainer's settings: AdamW, linear decay after 6% of warm-up, gradients clipped at a norm of 1.

    Raises: ConfigError if the batch cannot be shared, DeepSpeed's file does not fit, or a launcher's port is taken.
    """
    micro, accumulation = batch_shares(settings)
    recipe, has_gpu = settings.recipe, torch.cuda.is_available()
    every = "epoch" if settings.eval_steps is None else "steps"
    try:
        return TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            data_seed=seed,
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=max(micro, 8),
            gradient_accumulation_steps=accumulation,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adam_beta1=_BETAS[0],
            adam_beta2=_BETAS[1],
            adam_epsilon=_EPSILON,
            optim="adamw_torch",
            lr_scheduler_type="linear",
            warmup_steps=_WARMUP,
            max_grad_norm=1.0,
            eval_strategy=every,
            save_strategy=every,
            logging_strategy=every,
            eval_steps=settings.eval_steps,
            save_steps=settings.eval_steps or 500,
            logging_steps=settings.eval_steps or 500,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=SCORE,
            greater_is_better=True,
            restore_callback_states_from_checkpoint=True,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            deepspeed=None if settings.deepspeed is None else _deepspeed_options(settings.deepspeed),
            use_cpu=not has_gpu,
            dataloader_pin_memory=has_gpu,
            report_to="none",
            disable_tqdm=True,
        )
    except DistNetworkError as error:
        raise ConfigError(
            f"the processes cannot meet: {str(error).splitlines()[0][:200]}. If the port is in use, give the launcher "
            "another one (deepspeed --master_port PORT, torchrun --master-port PORT)."
        ) from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"Trainer refuses these settings: {error}") from error


def _deepspeed_options(file: Path) -> dict[str, Any]:
    """Return what a DeepSpeed configuration holds. Raises: ConfigError if it is no JSON object."""
    try:
        options = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--deepspeed {file} is not JSON ({error}). Name a DeepSpeed configuration.") from error
    if not isinstance(options, dict):
        raise ConfigError(
            f"--deepspeed {file} holds {str(options)[:60]!r}, and a DeepSpeed configuration is a JSON object. Name one."
        )
    return options


def train_seed(
    task: Task, data: TaskData[Features], encoder: Encoder, settings: Settings, seed: int, folder: Path, say: Say
) -> SeedResult:
    """Train one seed in a folder, from its last checkpoint if it was interrupted; the best model goes to folder/model.

    Raises: ConfigError as `training_arguments` and `load_for` do.
    """
    started = time.monotonic()
    arguments = training_arguments(settings, seed, folder)
    set_seed(seed)
    model = load_for(task, data.labels, encoder, settings.dropout)
    trainer = make_trainer(task, data, encoder, settings, model, arguments)
    trainer.add_callback(_Report(f"{task.name}, seed {seed}", say))
    last = _last_checkpoint(folder)
    if last is not None:
        say(f"{task.name}, seed {seed}: continues from {last}")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    history = [entry for entry in state.log_history if f"eval_{SCORE}" in entry]
    trainer.remove_callback(_Report)
    metrics = _metrics(trainer.evaluate())
    for name, features in data.also.items():
        trainer.compute_metrics = features.metrics
        metrics |= {f"{name}/{key}": value for key, value in _metrics(trainer.evaluate(features)).items()}  # type: ignore[arg-type]
    trainer.save_model(str(folder / MODEL))
    if trainer.is_world_process_zero():
        (folder / MODEL / "training_args.bin").unlink(missing_ok=True)  # Trainer's, a pickle
        encoder.tokenizer.save_pretrained(folder / MODEL)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return SeedResult(
        seed=seed,
        metrics=metrics,
        step=state.best_global_step or state.global_step,
        num_steps=state.global_step,
        seconds=time.monotonic() - started,
        history=[{"step": entry["step"], "epoch": entry["epoch"], **_metrics(entry)} for entry in history],
    )


def make_trainer(
    task: Task,
    data: TaskData[Features],
    encoder: Encoder,
    settings: Settings,
    model: PreTrainedModel,
    arguments: TrainingArguments,
) -> Trainer:
    """Return the Trainer of a model, which evaluates on the validation split and prints nothing by itself."""
    pads = DataCollatorForMultipleChoice if task.kind == "multiple-choice" else DataCollatorWithPadding
    patience = settings.early_stopping
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,  # type: ignore[arg-type]
        data_collator=pads(encoder.tokenizer),
        compute_metrics=data.validation.metrics,
        callbacks=None if patience is None else [EarlyStoppingCallback(patience)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint: of one that was being written as the process died the last file is not."""
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()}
    return next((path for _, path in sorted(found.items(), reverse=True) if _is_complete(path / _STATE)), None)


def _is_complete(state: Path) -> bool:
    try:
        return bool(parse_json(state.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False


def _metrics(logged: Mapping[str, Any]) -> dict[str, float]:
    """Return what was measured, without Trainer's prefix and its times."""
    left_out = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix("eval_"): value for name, value in logged.items() if name.startswith("eval_")}
    return {name: float(value) for name, value in named.items() if name not in left_out}


class _Report(TrainerCallback):
    """Prints a line for each evaluation."""

    def __init__(self, name: str, say: Say) -> None:
        self._name, self._say, self._losses = name, say, ""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any
    ) -> None:
        """Remember the training loss."""
        if logs and "loss" in logs:
            self._losses = f"training loss {logs['loss']:.4f}, "

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics=None, **kwargs: Any
    ) -> None:
        """Print the losses and the score."""
        found = _metrics(metrics or {})
        self._say(
            f"{self._name}, epoch {state.epoch or 0:.2f} of {args.num_train_epochs:g} (step {state.global_step:,}): "
            f"{self._losses}validation loss {found.get('loss', float('nan')):.4f}, "
            f"score {100 * found[SCORE]:.2f}"
        )
