"""Checkpoints of real engines: resumed bit for bit, continued in any other layout, agreed on by all ranks."""

import dataclasses
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from raptr_ds.checkpoint.folder import checkpoints_in, step_folder
from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.engine.protocol import Engine
from raptr_ds.errors import CheckpointError
from raptr_ds.parallel.groups import ProcessGroups, initialize_process_groups
from raptr_ds.parallel.launch import Launch
from tests.dist.trajectory import (
    Case,
    batch_at,
    build_engine,
    full_weights,
    model_of,
    path_method,
    process_groups,
    weights_differ,
)
from tests.dist.workers import run_distributed

LAST = 9  # three phases of three steps
RESUMED_STEPS = 3
LAYOUTS = {
    "reference": (1, Case(engine="reference", micro_batch=12)),
    "dp2-zero0": (2, Case(zero=0)),
    "dp2-zero1": (2, Case(zero=1)),
    "dp2-zero2": (2, Case(zero=2)),
    "dp2-zero3": (2, Case(zero=3)),
    "tp2": (2, Case(tensor=2, micro_batch=4)),
    "tp2-sp-zero3": (2, Case(tensor=2, sequence_parallel=True, zero=3, micro_batch=4)),
    "pp2-zero1-round-robin": (4, Case(pipeline=2, zero=1, round_robin=True)),
    "tp2-pp2": (4, Case(tensor=2, pipeline=2, micro_batch=4)),
}


def train(engine: Engine, case: Case, groups: ProcessGroups, first: int, last: int) -> list[float]:
    """Train steps first..last (0-based, last not included) and return their losses."""
    method = path_method(case)
    return [
        engine.train_step(batch_at(case, groups, step), method.path_at(step), step, case.learning_rate).loss
        for step in range(first, last)
    ]


def state_of(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    """Return a copy of all that this rank holds."""
    return {(f.name, f.kind, f.geometry.offset): f.data.clone() for f in engine.fragments()}


# Resume


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What differs on this rank between an uninterrupted run and one that was restored, and how far both got."""

    restored_step: int
    losses: list[float]
    expected_losses: list[float]
    different: list[str]
    num_tensors: int


def resume(launch: Launch, case: Case, folder: str, save_at: int) -> Resumed:
    """Train over a phase boundary, saving before it; restore that in another engine and train the rest again."""
    groups = process_groups(launch, case)
    checkpoints = Checkpoints(Path(folder), groups, keep=1)
    engine, last = build_engine(case, groups), save_at + RESUMED_STEPS
    train(engine, case, groups, 0, save_at)
    checkpoints.save(engine, save_at, model_of(case), {"tokens": 5})
    expected_losses = train(engine, case, groups, save_at, last)  # while it is being written
    assert [report.error for report in checkpoints.wait()] == [None]
    again = build_engine(case, groups)
    restored = checkpoints.restore(again, "auto", model_of(case))
    assert restored is not None
    assert restored.run_state == {"tokens": 5}
    losses = train(again, case, groups, restored.step, last)
    expected, found = state_of(engine), state_of(again)
    different = [str(key) for key in expected if not torch.equal(expected[key], found.get(key, torch.empty(0)))]
    if engine.step_counts() != again.step_counts():
        different.append("step counts")
    if engine.loss_scaler_state() != again.loss_scaler_state():
        different.append("loss scale")
    checkpoints.close()
    return Resumed(restored.step, losses, expected_losses, different, len(found))


@pytest.mark.parametrize(
    ("layout", "precision", "save_at"),
    [
        ("dp2-zero0", "fp32", 1),  # after one step some layers have never moved
        ("dp2-zero0", "bf16", 4),
        ("dp2-zero0", "fp16", 4),
        ("dp2-zero1", "fp32", 4),
        ("dp2-zero1", "bf16", 1),
        ("dp2-zero1", "fp16", 4),
        ("dp2-zero2", "fp32", 4),
        ("dp2-zero2", "bf16", 4),
        ("dp2-zero3", "fp32", 1),
        ("dp2-zero3", "bf16", 4),
        ("tp2", "fp32", 4),
        ("tp2-sp-zero3", "bf16", 4),
        ("pp2-zero1-round-robin", "bf16", 4),
    ],
)
def test_resume_is_bitwise(layout: str, precision: str, save_at: int, tmp_path: Path) -> None:
    world_size, case = LAYOUTS[layout]
    case = dataclasses.replace(case, precision=precision)
    for result in run_distributed(resume, world_size, case, str(tmp_path), save_at):
        assert result.restored_step == save_at
        assert len(result.losses) == RESUMED_STEPS
        assert result.losses == result.expected_losses
        assert result.num_tensors > 0
        assert result.different == []


@pytest.mark.parametrize("layout", ["dp2-zero0", "dp2-zero1", "dp2-zero2", "dp2-zero3", "pp2-zero1-round-robin"])
def test_resume_is_bitwise_where_skipped_layers_move(layout: str, tmp_path: Path) -> None:
    world_size, case = LAYOUTS[layout]
    case = dataclasses.replace(case, skipped_update="zero_grad")
    for result in run_distributed(resume, world_size, case, str(tmp_path), 4):
        assert result.losses == result.expected_losses
        assert result.different == []


# Relayout


@dataclasses.dataclass(frozen=True)
class Part:
    """Some steps of a run: their losses, and what followed from them (weights and moments on rank 0)."""

    losses: list[float]
    state: dict[str, dict[str, np.ndarray]]
    step_counts: dict[str, float]


def continue_run(launch: Launch, case: Case, folder: str, last: int) -> Part:
    """Continue the run in `folder` to step `last`, in this case's layout, and save."""
    groups = process_groups(launch, case)
    checkpoints = Checkpoints(Path(folder), groups, keep=1)
    engine = build_engine(case, groups)
    restored = checkpoints.restore(engine, "auto", model_of(case))
    losses = train(engine, case, groups, restored.step if restored else 0, last)
    checkpoints.save(engine, last, model_of(case), {})
    assert [report.error for report in checkpoints.wait()] == [None]
    checkpoints.close()
    state = {kind: full_weights(engine, groups, kind) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    return Part(losses, state, engine.step_counts())


@pytest.mark.parametrize("skipped_update", ["freeze", "zero_grad"])
def test_a_run_continues_in_any_layout(skipped_update: str, tmp_path: Path) -> None:
    # One run that changes its layout with every checkpoint, at each place of a phase, against one that never does.
    route = [
        "reference",
        "dp2-zero1",
        "tp2",
        "dp2-zero3",
        "pp2-zero1-round-robin",
        "dp2-zero2",
        "tp2-pp2",
        "tp2-sp-zero3",
        "dp2-zero0",
    ]
    layouts = {
        name: (world_size, dataclasses.replace(case, skipped_update=skipped_update))
        for name, (world_size, case) in LAYOUTS.items()
    }
    whole = run_distributed(continue_run, 1, layouts["reference"][1], str(tmp_path / "whole"), LAST)[0]
    losses = []
    for last, layout in enumerate(route, start=1):
        world_size, case = layouts[layout]
        part = run_distributed(continue_run, world_size, case, str(tmp_path / "changing"), last)[0]
        losses += part.losses
    assert len(losses) == LAST
    # Rounding only: a sum over 12 sequences or 32 channels in another order is off by some 1e-7 of itself, and nine
    # steps of a small learning rate do not amplify that.
    np.testing.assert_allclose(losses, whole.losses, rtol=2e-6)
    back = run_distributed(continue_run, 1, layouts["reference"][1], str(tmp_path / "changing"), LAST)[0]
    assert back.losses == []
    assert back.step_counts == whole.step_counts
    for kind, tensors in whole.state.items():
        assert tensors.keys() == back.state[kind].keys()
        assert weights_differ(tensors, back.state[kind]) < 2e-5, kind


# Failures


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one rank saw when the disk of one rank was full and a file was damaged."""

    errors: list[str | None]
    left: list[str]
    used: str
    refusal: str
    weights: float


def meet_failures(launch: Launch, case: Case, folder: str) -> Seen:
    """Save three times, the second time with no room for rank 1; then damage the file of the last rank."""
    groups = process_groups(launch, case)
    checkpoints = Checkpoints(Path(folder), groups, keep=3)
    engine, model = build_engine(case, groups), model_of(case)
    errors = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = {}
    for step in (1, 2, 3):
        train(engine, case, groups, step - 1, step)
        saved[step] = state_of(engine)
        if step == 2 and groups.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        checkpoints.save(engine, step, model, {})
        errors += [report.error for report in checkpoints.wait()]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(path.name for path in Path(folder).iterdir())
    if groups.rank == 0:
        damaged = step_folder(Path(folder), 3) / f"rank-{groups.topology.world_size - 1:05d}.safetensors"
        raw = bytearray(damaged.read_bytes())
        raw[len(raw) // 2] ^= 4
        damaged.write_bytes(raw)
    torch.distributed.barrier(groups.control)
    refusal = ""
    try:
        checkpoints.restore(engine, str(step_folder(Path(folder), 3)), model)
    except CheckpointError as error:
        refusal = str(error)
    restored = checkpoints.restore(engine, "auto", model)
    assert restored is not None
    found = state_of(engine)
    assert found.keys() == saved[1].keys()
    difference = max(float((found[key] - saved[1][key]).abs().max()) for key in found)
    return Seen(errors, left, checkpoints_in(Path(folder))[0].name, refusal, difference)


def test_all_ranks_see_one_ranks_failure(tmp_path: Path) -> None:
    world_size, case = LAYOUTS["dp2-zero1"]
    seen = run_distributed(meet_failures, world_size, case, str(tmp_path))
    assert seen[0] == seen[1]
    first, second, third = seen[0].errors
    assert first is None
    assert second is not None
    assert "rank 1 cannot write" in second
    assert third is None
    assert seen[0].left == ["step-00000001", "step-00000003"]
    assert "rank-00001.safetensors does not match its checksum" in seen[0].refusal
    assert seen[0].used == "step-00000001"
    assert seen[0].weights == 0.0


def open_where_one_rank_may_not(launch: Launch, folder: str) -> str:
    """Make checkpoints where rank 1 sees a file in place of the folder; return the error."""
    groups = initialize_process_groups(launch, 1, 1)
    own = Path(folder) / f"rank-{groups.rank}"
    if groups.rank == 1:
        own.write_text("")
    else:
        own.mkdir()
    try:
        Checkpoints(own / "checkpoints", groups, keep=1)
    except CheckpointError as error:
        return f"{error.exit_code}: {error}"
    return ""


def test_no_room_for_one_rank_stops_all_before_training(tmp_path: Path) -> None:
    first, second = run_distributed(open_where_one_rank_may_not, 2, str(tmp_path))
    assert first == second
    assert first.startswith("2: rank 1 does not see")
    assert os.fspath(tmp_path) in first
