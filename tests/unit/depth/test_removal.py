"""Losses by depth against the model's own forward pass along each path, and greedy removal against brute force."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raptr_ds.config.batch import BatchGeometry
from raptr_ds.config.sections import DataSection, ObjectiveSection
from raptr_ds.data.loader import build_loader
from raptr_ds.depth.held_out import read_held_out
from raptr_ds.depth.network import Network
from raptr_ds.depth.removal import evenly_spaced, remove_greedily
from raptr_ds.engine.reference import ReferenceEngine
from raptr_ds.errors import DataError
from raptr_ds.paths import LayerPath
from tests.depth_runs import MakeRun, along
from tests.exported_runs import KINDS

CPU = torch.device("cpu")
EQUAL = 1e-6  # the same sums of fp32 losses in another order


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_exits_and_removals_are_the_models_own_losses(make_run: MakeRun, kind: str, packing: bool) -> None:
    source, stage = make_run(kind, data={"packing": packing})
    held_out = read_held_out(source, num_sequences=20)
    assert (held_out.batches[0].segments is not None) is packing
    network = Network(stage, CPU)
    exits = network.losses_by_exit(held_out.batches, source.path(tuple(range(5))))
    wanted = [along(stage, held_out.batches, LayerPath(tuple(range(k)), 5)) for k in range(1, 6)]
    assert exits == pytest.approx(wanted, abs=EQUAL)
    path = LayerPath((0, 2, 3, 4), 5, residual_scale=1.3)
    without = network.losses_without_each(held_out.batches, path)
    kept = [(2, 3, 4), (0, 3, 4), (0, 2, 4), (0, 2, 3)]
    assert without == pytest.approx(
        [along(stage, held_out.batches, LayerPath(layers, 5, residual_scale=1.3)) for layers in kept], abs=EQUAL
    )
    assert network.loss(held_out.batches, path) == pytest.approx(along(stage, held_out.batches, path), abs=EQUAL)
    assert max(exits) - min(exits) > 0.1  # or the test would see nothing


@pytest.mark.parametrize("rule", ["none", "sqrt"])
@pytest.mark.parametrize("kind", ["bert", "ul2"])
def test_each_step_of_greedy_removal_is_the_best_one(make_run: MakeRun, kind: str, rule: str) -> None:
    source, stage = make_run(kind, path={"method": "raptr", "residual_scale": rule})
    held_out = read_held_out(source, num_sequences=8)
    rows = remove_greedily(Network(stage, CPU), source, held_out)
    assert [row.depth for row in rows] == [5, 4, 3, 2, 1]
    assert rows[0].loss == rows[0].exit_loss == pytest.approx(along(stage, held_out.batches, LayerPath.full(5)))
    for before, row in pairwise(rows):
        scale = (5 / row.depth) ** 0.5 if rule == "sqrt" else 1.0
        assert row.residual_scale == pytest.approx(scale)
        losses = {
            kept: along(stage, held_out.batches, LayerPath(kept, 5, residual_scale=scale))
            for kept in combinations(before.layers, row.depth)
        }
        assert row.layers == min(losses, key=losses.__getitem__)
        assert row.loss == pytest.approx(losses[row.layers], abs=EQUAL)
        exits = LayerPath(tuple(range(row.depth)), 5)
        assert row.exit_loss == pytest.approx(along(stage, held_out.batches, exits), abs=EQUAL)
    assert remove_greedily(Network(stage, CPU), source, held_out, down_to=3) == rows[:3]


def test_a_width_run_scales_no_layers(make_run: MakeRun) -> None:
    source, _ = make_run("bert", path={"method": "width", "residual_scale": "sqrt"})
    assert source.path((0, 1)).residual_scale == 1.0


def test_a_model_that_is_not_finite_is_refused(make_run: MakeRun) -> None:
    source, stage = make_run("bert")
    with torch.no_grad():
        stage.get_parameter("layers.2.mlp.expand.weight").fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        remove_greedily(Network(stage, CPU), source, read_held_out(source, num_sequences=4))


@pytest.mark.parametrize("kind", ["bert", "ul2"])
def test_held_out_text_is_what_the_run_evaluates_on(make_run: MakeRun, data_folder: Path, kind: str) -> None:
    objective = {"mask_rate": 0.3, "denoisers": "causal_prefix_span"}
    source, stage = make_run(kind, objective=objective)
    held_out = read_held_out(source, num_sequences=24)
    geometry = BatchGeometry(12, 4, 3, 1)
    with build_loader(
        DataSection(path=str(data_folder), num_workers=0),
        ObjectiveSection(**objective),  # type: ignore[arg-type]
        stage.model,
        geometry,
        seed=5,
        dp_rank=0,
    ) as loader:
        engine = ReferenceEngine(stage, seed=1, skipped_update="freeze", max_norm=1.0)
        wanted = engine.evaluate([loader.validation(0), loader.validation(1)], LayerPath.full(5))
    assert along(stage, held_out.batches, LayerPath.full(5)) == pytest.approx(wanted, abs=EQUAL)


@given(st.integers(1, 200), st.data())
def test_evenly_spaced_layers(num_layers: int, data: st.DataObject) -> None:
    depth = data.draw(st.integers(1, num_layers))
    layers = evenly_spaced(num_layers, depth)
    assert len(layers) == depth
    assert LayerPath(layers, num_layers).length == depth
    if depth > 1:
        assert (layers[0], layers[-1]) == (0, num_layers - 1)
        gaps = np.diff(layers)
        assert gaps.max() - gaps.min() <= 1
