"""The change of the loss at a run's phase transitions: longer paths, before any step has trained them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from raptr_ds.checkpoint.folder import CHECKPOINTS, step_folder
from raptr_ds.checkpoint.weights import load_trained_model
from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import StepBatch
from raptr_ds.data.loader import build_loader, load_tokenizer
from raptr_ds.engine.reference import ReferenceEngine
from raptr_ds.errors import ConfigError
from raptr_ds.markdown import markdown_table
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import ProcessGroups, lone_process_groups
from raptr_ds.paths import LayerPath, PathMethod, Phase
from raptr_ds.runtime.method import path_method_of
from raptr_ds.user_paths import is_file

_ONE_PROCESS = (
    "gradient_accumulation_steps=null",
    "train_micro_batch_size_per_gpu=null",
    "raptr_ds.parallel.tensor_model_parallel_size=1",
    "raptr_ds.parallel.pipeline_model_parallel_size=1",
    "raptr_ds.parallel.pipeline_layers=null",
    "raptr_ds.parallel.micro_batches=null",
)


@dataclass(frozen=True)
class Transition:
    """Held-out losses with the weights after `step` steps, where the path length changes from `before` to `after`.

    before_losses, after_losses: of paths sampled from the run's phases before and after the transition.
    """

    step: int
    before: int
    after: int
    before_losses: tuple[float, ...]
    after_losses: tuple[float, ...]
    full_loss: float

    @property
    def gap(self) -> float:
        """The increase of the paths' mean loss at the transition."""
        return float(np.mean(self.after_losses) - np.mean(self.before_losses))


def transitions_of(run: Path, num_paths: int, num_batches: int) -> list[Transition]:
    """Measure every phase transition of a run that has a checkpoint there, in one process.

    Raises: ConfigError if `run` is not a run's folder, or has no checkpoint between two phases.
    """
    if not is_file(run / "config.json"):
        raise ConfigError(f"{run} is not a run's folder: it has no config.json. Give raptr_ds.train.save of a run.")
    config = load_run_config(run / "config.json", _ONE_PROCESS, 1)
    config = config.with_vocab_size(load_tokenizer(config.data).vocab_size)
    method = path_method_of(config)
    if config.path.method == "stacking":
        raise ConfigError(f"{run} is a stacked run: its new layers do not exist before a transition. Give another run.")
    phases = [phase for phase in method.phases if phase.num_steps]
    pairs = [
        (before, after)
        for before, after in pairwise(phases)
        if step_folder(run / CHECKPOINTS, after.first_step).is_dir()
    ]
    if not pairs:
        steps = ", ".join(str(phase.first_step) for phase in phases[1:]) or "none: there is one phase"
        raise ConfigError(
            f"{run} has no checkpoint of a step between two phases ({steps}). Train it with raptr_ds.checkpoint."
            f"interval={phases[0].num_steps} and raptr_ds.checkpoint.keep={len(phases)}."
        )
    loader = build_loader(config.data, config.objective, config.model, config.batch, seed=config.train.seed, dp_rank=0)
    with loader, lone_process_groups() as groups:
        batches = [loader.validation(index) for index in range(num_batches)]
        return [_measure(run, config, method, pair, num_paths, batches, groups) for pair in pairs]


def _measure(
    run: Path,
    config: RunConfig,
    method: PathMethod,
    pair: tuple[Phase, Phase],
    num_paths: int,
    batches: Sequence[StepBatch],
    groups: ProcessGroups,
) -> Transition:
    before, after = pair
    stage = build_stage(config.model, groups, range(config.model.num_layers), recompute=False, seed=0)
    stage.load_state_dict(load_trained_model(step_folder(run / CHECKPOINTS, after.first_step)).weights)
    engine = ReferenceEngine(stage.eval(), seed=0, skipped_update="freeze", max_norm=0.0)

    def losses(phase: Phase) -> tuple[float, ...]:
        number = min(num_paths, phase.num_steps)
        steps = [phase.first_step + index * phase.num_steps // number for index in range(number)]
        found: dict[LayerPath, float] = {}
        for path in map(method.path_at, steps):
            if path not in found:
                found[path] = engine.evaluate(batches, path)
        return tuple(found.values())

    assert before.path_length is not None
    assert after.path_length is not None
    return Transition(
        after.first_step,
        before.path_length,
        after.path_length,
        losses(before),
        losses(after),
        engine.evaluate(batches, LayerPath.full(method.num_layers)),
    )


def transition_table(transitions: Sequence[Transition]) -> list[str]:
    """Return a Markdown table, a row for each transition."""
    head = ["step", "paths", "loss before", "loss after", "gap", "spread of paths before, after", "full model"]
    rows = []
    for one in transitions:
        spread = ", ".join(f"{np.std(losses):.3f}" for losses in (one.before_losses, one.after_losses))
        means = (f"{np.mean(losses):.4f}" for losses in (one.before_losses, one.after_losses))
        rows.append(
            [one.step, f"{one.before} to {one.after}", *means, f"{one.gap:+.4f}", spread, f"{one.full_loss:.4f}"]
        )
    return markdown_table(head, rows)
