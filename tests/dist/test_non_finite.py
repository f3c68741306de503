"""Numbers that are not finite, from one rank only: all ranks skip, stop and roll back, and nothing else moves."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raptr_ds.checkpoint.folder import checkpoints_in, step_folder
from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.protocol import Engine
from raptr_ds.errors import NonFiniteError
from raptr_ds.parallel.agreement import PathAgreement
from raptr_ds.parallel.groups import ProcessGroups, initialize_process_groups, launch_store
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import StepFlops
from raptr_ds.pretrain import train
from raptr_ds.runtime.events import EventLog
from raptr_ds.runtime.exports import Exports
from raptr_ds.runtime.metrics import Metrics
from raptr_ds.runtime.ranks import NUM_REPORTED, Ranks
from raptr_ds.runtime.session import Session
from raptr_ds.runtime.signals import StopSignals
from raptr_ds.runtime.state import OPTIMIZER, RunState, run_state_of
from raptr_ds.runtime.watchdog import Watchdog
from tests.dist.trajectory import HIDDEN, SEQ_LENGTH, Case, batch_at, build_engine, model_of, path_method
from tests.dist.workers import run_distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3},
    "pp2": {"pipeline": 2},
    "pp2-zero1": {"pipeline": 2, "zero": 1},
}
CASE = Case(micro_batch=3)  # two a step on two data-parallel ranks
WORLD_SIZES = {"pp2-zero1": 4}  # ZeRO needs a rank to share with; all others run on 2


class PoisonedBatches:
    """The batches of a case; on one rank either the gradients of some are NaN, or their loss is infinite."""

    def __init__(
        self, case: Case, groups: ProcessGroups, engine: Engine, bad: tuple[int, ...], rank: int, what: str = "gradient"
    ) -> None:
        self._case, self._groups = case, groups
        self._bad, self._what = bad if groups.rank == rank else (), what
        self._active = False
        self.asked: list[int] = []
        engine.stage.register_forward_hook(self._poison)  # type: ignore[attr-defined]

    def at(self, step: int, first_sample: int | None = None) -> StepBatch:
        if first_sample is not None:
            step = first_sample // self._case.global_batch
        self.asked.append(step)
        self._active = step in self._bad
        return batch_at(self._case, self._groups, step)

    def _poison(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not self._active or not output.requires_grad:
            return None
        if self._what == "loss":
            return output + float("inf")
        output.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        return None


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Return a copy of all that moves on this rank: fp32 weights, moments, working weights."""
    engine.optimizer.follow_forward(LayerPath.full(engine.stage.model.num_layers))  # type: ignore[attr-defined]
    state = {f"{f.name} {f.kind} {f.geometry.offset}": f.data.clone() for f in engine.fragments()}
    for name, parameter in engine.stage.named_parameters():  # type: ignore[attr-defined]
        state[f"{name} working"] = _working(parameter).detach().clone()
    return state


def _working(parameter: Any) -> torch.Tensor:
    """Return a working weight, or this rank's part of it under ZeRO 3, without the padding, which holds anything."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    part = parameter.ds_tensor
    return part[: max(0, parameter.ds_numel - dist.get_rank() * part.numel())]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Return what is not equal bit for bit."""
    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not torch.equal(a[key], b[key])]


def fingerprints(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the digest of each tensor's bytes, which travels between processes more lightly."""
    raw = {key: tensor.contiguous().view(-1).view(torch.uint8).numpy() for key, tensor in state.items()}
    return {key: hashlib.sha256(data.tobytes()).hexdigest() for key, data in raw.items()}


# One skipped step


@dataclass(frozen=True)
class Skip:
    """What one rank saw of a skipped step, and of the steps after it beside those of a run without it."""

    skipped: list[bool]
    bad_loss: float
    bad_norm: float
    moved: list[str]
    counts_moved: bool
    losses: list[float]
    expected_losses: list[float]
    different: list[str]


def skip_a_step(launch: Launch, case: Case, rank: int, what: str = "gradient") -> Skip:
    """Train steps 0 to 6, of which step 3 is poisoned on one rank; again in another engine without step 3."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    method, bad = path_method(case), 3

    def step(engine: Engine, batches: PoisonedBatches, number: int):
        return engine.train_step(batches.at(number), method.path_at(number), number, case.learning_rate)

    engine = build_engine(case, groups)
    batches = PoisonedBatches(case, groups, engine, (bad,), rank, what)
    results = [step(engine, batches, number) for number in range(bad)]
    before, counts = state_of(engine), engine.step_counts()
    results.append(step(engine, batches, bad))
    moved, counts_moved = differing(before, state_of(engine)), counts != engine.step_counts()
    results += [step(engine, batches, number) for number in range(bad + 1, 7)]
    clean = build_engine(case, groups)
    batches = PoisonedBatches(case, groups, clean, (), rank)
    expected = [step(clean, batches, number) for number in range(7) if number != bad]
    return Skip(
        skipped=[result.skipped for result in results],
        bad_loss=results[bad].loss,
        bad_norm=results[bad].grad_norm,
        moved=moved,
        counts_moved=counts_moved,
        losses=[result.loss for number, result in enumerate(results) if number != bad],
        expected_losses=[result.loss for result in expected],
        different=differing(state_of(engine), state_of(clean)),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_leaves_no_trace(layout: str, precision: str) -> None:
    case = replace(CASE, precision=precision, **LAYOUTS[layout])
    world_size = WORLD_SIZES.get(layout, 2)
    for seen in run_distributed(skip_a_step, world_size, case, world_size - 1):
        assert seen.skipped == [False] * 3 + [True] + [False] * 3
        assert seen.bad_loss == pytest.approx(4.1, abs=1.0)  # a loss like any other: the gradient alone was NaN
        assert not torch.tensor(seen.bad_norm).isfinite()
        assert seen.moved == []
        assert not seen.counts_moved
        assert seen.losses == seen.expected_losses
        assert seen.different == []


@pytest.mark.parametrize("layout", ["zero1", "pp2"])
def test_it_does_not_matter_which_rank_it_came_from(layout: str) -> None:
    for seen in run_distributed(skip_a_step, 2, replace(CASE, **LAYOUTS[layout]), 0):
        assert seen.skipped.index(True) == 3
        assert seen.moved == seen.different == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_infinite_loss_with_finite_gradients_is_skipped_too(layout: str) -> None:
    """As an fp16 logit that overflows gives."""
    world_size = WORLD_SIZES.get(layout, 2)
    for seen in run_distributed(skip_a_step, world_size, replace(CASE, **LAYOUTS[layout]), world_size - 1, "loss"):
        assert seen.skipped == [False] * 3 + [True] + [False] * 3
        assert not torch.tensor(seen.bad_loss).isfinite()
        assert seen.moved == seen.different == []


# Rows of them, in the loop


@dataclass(frozen=True)
class Ran:
    """How a run of the loop ended on one rank."""

    error: str
    asked: list[int]
    state: dict[str, str]


def run_file(case: Case, folder: Path, settings: dict[str, Any]) -> Path:
    """Write the case as a run file; the loop reads little of it."""
    block = {
        "model": {
            "architecture": case.architecture,
            "num_layers": case.num_layers,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "seq_length": SEQ_LENGTH,
        },
        "parallel": {"pipeline_model_parallel_size": case.pipeline},
        "data": {"path": "none"},
        "train": {"steps": case.steps, "save": str(folder), **settings},
        "eval": {"batches": 0},
        "checkpoint": {"interval": 3, "keep": 9},
    }
    path = folder / "run.json"
    optimizer = {"type": "AdamW", "params": {"lr": case.learning_rate}}
    path.write_text(json.dumps({"train_batch_size": case.global_batch, "optimizer": optimizer, "raptr_ds": block}))
    return path


def open_loop(
    launch: Launch, case: Case, folder: Path, bad: tuple[int, ...], settings: dict[str, Any]
) -> tuple[Session, PoisonedBatches]:
    """Return a session of real parts around the case's engine and batches, whose gradients are NaN on rank 1."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    config: RunConfig = load_run_config(run_file(case, folder / f"rank-{launch.rank}", settings), (), launch.world_size)
    engine, method, model = build_engine(case, groups), path_method(case), model_of(case)
    batches = PoisonedBatches(case, groups, engine, bad, rank=1)
    checkpoints = Checkpoints(folder / "checkpoints", groups, config.checkpoint.keep)
    metrics = Metrics(folder if groups.rank == 0 else None, num_steps=case.steps)
    events = EventLog(folder if groups.rank == 0 else None)
    session = Session(
        config=replace(config, model=model),
        groups=groups,
        method=method,
        cost=StepFlops(model_of(case), case.global_batch, recompute=False),
        engine=engine,
        batches=batches,  # type: ignore[arg-type]
        agreement=PathAgreement(groups, method.path_at, lambda: False, case.steps, NUM_REPORTED),
        ranks=Ranks(groups.topology, ["here"] * groups.topology.world_size, groups.device, 1),
        checkpoints=checkpoints,
        exports=Exports(config, folder if groups.rank == 0 else None, checkpoints, metrics, events),
        metrics=metrics,
        signals=StopSignals(watch_launcher=False),
        watchdog=Watchdog(launch_store(), groups.rank, groups.topology.world_size, folder, 0.0),
        events=events,
        state=RunState(),
        recorded={OPTIMIZER: config.optimizer["type"]},
    )
    return session, batches


def run_loop(
    launch: Launch, case: Case, folder: str, bad: tuple[int, ...], settings: dict[str, Any], keep: int = 9
) -> Ran:
    """Run the loop from its newest checkpoint, if there is one, to its end or to its error."""
    session, batches = open_loop(launch, case, Path(folder), bad, settings)
    session.checkpoints.keep = keep
    if (restored := session.checkpoints.restore(session.engine, "auto", session.config.model)) is not None:
        session.state = run_state_of(restored, session.config)
    error = ""
    try:
        session.finish(train(session))
    except NonFiniteError as stopped:
        error = f"{stopped.exit_code}: {stopped}"
    session.checkpoints.close()
    session.metrics.close()
    return Ran(error, batches.asked, fingerprints(state_of(session.engine)))


def run_clean(launch: Launch, case: Case, folder: str, source: str, offset: int) -> Ran:
    """Run the loop from a checkpoint of another run, without faults, with the data moved on by `offset` batches."""
    session, batches = open_loop(launch, case, Path(folder), (), {})
    restored = session.checkpoints.restore(session.engine, source, session.config.model)
    assert restored is not None
    state = run_state_of(restored, session.config)
    session.state = replace(state, next_sample=state.next_sample + offset * case.global_batch)
    session.finish(train(session))
    session.checkpoints.close()
    session.metrics.close()
    return Ran("", batches.asked, fingerprints(state_of(session.engine)))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest_of(run: Path, step: int) -> dict[str, Any]:
    """Return the manifest of a run's checkpoint."""
    return json.loads((step_folder(run / "checkpoints", step) / "manifest.json").read_text())


def folder_for(tmp_path: Path, name: str) -> Path:
    """Make a run's folder, with one for each rank's copy of the run file."""
    for rank in range(4):
        (tmp_path / name / f"rank-{rank}").mkdir(parents=True)
    return tmp_path / name


ROLLBACK = {"max_non_finite_steps": 2, "on_non_finite": "rollback"}


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("zero0", "fp32"),
        ("zero0", "bf16"),
        ("zero0", "fp16"),
        ("zero1", "fp32"),
        ("zero1", "bf16"),
        ("zero2", "fp32"),
        ("zero2", "bf16"),
        ("zero2", "fp16"),
        ("zero3", "fp32"),
        ("zero3", "bf16"),
        ("pp2", "fp32"),
        ("pp2-zero1", "bf16"),
    ],
)
def test_a_rolled_back_run_is_a_clean_run_on_other_data(layout: str, precision: str, tmp_path: Path) -> None:
    """Batches 7 and 8 are bad, checkpoints come every 3 steps: back to step 6, and on with batch 9."""
    case = replace(CASE, precision=precision, steps=10, **LAYOUTS[layout])
    world_size = WORLD_SIZES.get(layout, 2)
    rolled, good, clean = (folder_for(tmp_path, name) for name in ("rolled", "good", "clean"))
    ran = run_distributed(run_loop, world_size, case, str(rolled), (7, 8), ROLLBACK)
    run_distributed(run_loop, world_size, case, str(good), (6,), {"max_non_finite_steps": 1})  # ends after step 6
    source = step_folder(good / "checkpoints", 6)
    expected = run_distributed(run_clean, world_size, case, str(clean), str(source), 3)
    for result, other in zip(ran, expected, strict=True):
        assert result.error == ""
        assert result.asked == list(range(13))
        assert other.asked == [9, 10, 11, 12]
        assert result.state == other.state
    lines = lines_of(rolled / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["skipped_steps"] for line in lines] == [0] * 6 + [2] * 4
    expected_lines = lines_of(good / "metrics.jsonl")[:6] + lines_of(clean / "metrics.jsonl")
    for key in ("step", "loss", "grad_norm", "lr", "path", "tokens", "flops"):
        assert [line[key] for line in lines] == [line[key] for line in expected_lines], key
    saved = [manifest_of(folder, 10) for folder in (rolled, clean)]
    for key in ("step_counts", "loss_scaler"):  # fp16 halved its scale at each of the bad steps
        assert saved[0][key] == saved[1][key]
    # The new course is on the disk at once: a run that is killed after a rollback does not meet the data again.
    assert manifest_of(rolled, 6)["run_state"]["next_sample"] == (6 + 3) * case.global_batch
    assert manifest_of(good, 6)["run_state"]["next_sample"] == 6 * case.global_batch
    aside = lines_of(rolled / "metrics.rolled_back.jsonl")
    assert [(line["step"], line.get("non_finite", False)) for line in aside] == [(7, False), (8, True), (9, True)]


def test_a_stop_comes_on_all_ranks_with_the_good_checkpoints_left(tmp_path: Path) -> None:
    case = replace(CASE, steps=10, **LAYOUTS["zero1"])
    ran = run_distributed(run_loop, 2, case, str(folder_for(tmp_path, "run")), (4, 5, 6), {"max_non_finite_steps": 3})
    for result in ran:
        assert result.error.startswith("1: steps 5 to 7, 3 in a row, had a loss or a gradient that is not finite")
        assert "raptr_ds.train.max_non_finite_steps=3" in result.error
        assert "on_non_finite=rollback" in result.error
        assert result.asked == list(range(7))
    # Step 6 was due in the row: its weights are those of step 4, and it would be taken for the newest good one.
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert [line["step"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 8))


def test_without_a_checkpoint_from_before_there_is_no_way_back(tmp_path: Path) -> None:
    case = replace(CASE, steps=10, **LAYOUTS["zero1"])
    for result in run_distributed(run_loop, 2, case, str(folder_for(tmp_path, "run")), (1, 2), ROLLBACK):
        assert result.error.startswith("1: steps 2 to 3, 2 in a row,")
        assert "there is no way back" in result.error
        assert "has no checkpoint of step 1 or before" in result.error


def test_a_stop_in_a_row_leaves_a_way_back(tmp_path: Path) -> None:
    """The first start ends after one of two bad steps; of `keep`, 1, that checkpoint is all that is left."""
    case, folder = replace(CASE, steps=8, **LAYOUTS["zero1"]), folder_for(tmp_path, "run")
    run_distributed(run_loop, 2, case, str(folder), (7, 8), ROLLBACK, 1)
    assert [path.name for path in checkpoints_in(folder / "checkpoints")] == ["step-00000008"]
    for result in run_distributed(run_loop, 2, replace(case, steps=10), str(folder), (7, 8), ROLLBACK, 1):
        assert result.error == ""
        assert result.asked == [8, 9, 10]
    assert [line["step"] for line in lines_of(folder / "metrics.jsonl")] == [9, 10]


def test_data_that_stay_bad_end_the_run_after_so_many_rollbacks(tmp_path: Path) -> None:
    case = replace(CASE, steps=10, **LAYOUTS["zero1"])
    for result in run_distributed(run_loop, 2, case, str(folder_for(tmp_path, "run")), tuple(range(4, 99)), ROLLBACK):
        assert "3 rollbacks to step 3, each with other data, did not help" in result.error
        assert result.asked == list(range(4 + 2 + 3 * 2))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["skipped_steps"] == 2 + 3 * 2


def test_what_came_due_in_a_row_is_saved_after_it(tmp_path: Path) -> None:
    case = replace(CASE, steps=10, **LAYOUTS["zero1"])
    for result in run_distributed(run_loop, 2, case, str(folder_for(tmp_path, "run")), (5, 6), {}):
        assert result.error == ""
    names = [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000010", "step-00000009", "step-00000008", "step-00000003"]
