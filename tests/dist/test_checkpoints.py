"""Checkpoints on real engines: resumed bit for bit, continued in another layout, verified by all ranks together."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.checkpoints import Checkpoints
from tests.dist.trajectory import Case, batch_at, build_engine, full_weights, model_of, path_method, weights_differ
from tests.dist.workers import run_distributed


@dataclasses.dataclass(frozen=True)
class Part:
    """Losses of steps first..last of a run that saved at some of them, and the final state (rank 0)."""

    losses: list[float]
    state: dict[str, dict[str, np.ndarray]]
    restored: int | None


def train_part(launch: Launch, case: Case, folder: str, load: str, last: int, save_at: tuple[int, ...]) -> Part:
    """Train from a checkpoint (or from the start) to step `last`; save after the steps `save_at`."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    engine = build_engine(case, groups)
    checkpoints = Checkpoints(Path(folder), groups, keep=3)
    model = model_of(case)
    restored = checkpoints.restore(engine, load, model)
    first = restored.step if restored else 0
    if restored:
        assert restored.run_state == {"tokens": 100 * first}
    losses = []
    method = path_method(case)
    for step in range(first, last):
        losses.append(engine.train_step(batch_at(case, groups, step), method.path_at(step), step, 1e-3).loss)
        checkpoints.poll()
        if step + 1 in save_at:
            checkpoints.save(engine, step + 1, model, {"tokens": 100 * (step + 1)})
    reports = checkpoints.wait()
    assert all(report.error is None for report in reports)
    checkpoints.close()
    kinds = {fragment.kind for fragment in engine.fragments()}
    state = {kind: full_weights(engine, groups, kind) for kind in sorted(kinds)}
    return Part(losses, state, restored.step if restored else None)


LAYOUTS = {
    "reference": (1, Case(engine="reference", micro_batch=12)),
    "dp2-zero0": (2, Case(zero=0)),
    "dp2-zero1": (2, Case(zero=1)),
    "dp2-zero2": (2, Case(zero=2)),
    "dp2-zero3": (2, Case(zero=3)),
    "tp2": (2, Case(tensor=2)),
    "tp2-zero3": (2, Case(tensor=2, zero=3)),
    "pp2": (2, Case(pipeline=2, zero=1)),
    "tp2-pp2": (4, Case(tensor=2, pipeline=2)),
}
SAVE, LAST = 4, 9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["dp2-zero0", "dp2-zero1", "dp2-zero2", "dp2-zero3", "tp2", "pp2"])
def test_resume_is_bitwise(layout: str, precision: str, tmp_path: Path) -> None:
    world_size, case = LAYOUTS[layout]
    case = dataclasses.replace(case, precision=precision)
    whole = run_distributed(train_part, world_size, case, str(tmp_path), "auto", LAST, (SAVE,))[0]
    resumed = run_distributed(train_part, world_size, case, str(tmp_path), "auto", LAST, ())[0]
    assert resumed.restored == SAVE
    assert resumed.losses == whole.losses[SAVE:]
    assert resumed.state.keys() == whole.state.keys()
    for kind, tensors in whole.state.items():
        assert weights_differ(tensors, resumed.state[kind]) == 0.0, kind
