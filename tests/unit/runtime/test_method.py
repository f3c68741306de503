"""From a configuration to its path method: what balanced paths depend on, and expected predictions."""

import json
from pathlib import Path

import pytest

from raptr_ds.checkpoint.manager import RestoredState
from raptr_ds.config.load import load_run_config
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.errors import CheckpointError
from raptr_ds.runtime.method import LAYERS, balanced_stages_of, check_layers, left_out_layers, path_method_of

P, R = "raptr_ds.path.", "raptr_ds.parallel."


@pytest.fixture
def load(tmp_path):
    block = {
        "model": {
            "architecture": "bert",
            "num_layers": 12,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 66,
            "vocab_size": 640,
        },
        "path": {"method": "raptr"},
        "data": {"path": "data/docs"},
        "train": {"steps": 100},
    }
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"train_batch_size": 8, "raptr_ds": block}))
    return lambda *overrides, world_size=1: load_run_config(file, overrides, world_size)


def test_pinned_paths_are_the_same_in_every_layout(load):
    balanced = (f"{P}sampling=balanced", f"{P}balance_stages=4")
    layouts = [
        load(*balanced),
        load(*balanced, f"{R}pipeline_model_parallel_size=2", f"{R}activation_checkpointing=true", world_size=4),
        load(*balanced, f"{R}pipeline_model_parallel_size=4", f"{R}tensor_model_parallel_size=2", world_size=8),
        load(f"{P}sampling=balanced", f"{R}pipeline_model_parallel_size=4", world_size=4),
    ]
    methods = [path_method_of(config) for config in layouts]
    for step in range(0, 100, 3):
        assert len({method.path_at(step) for method in methods}) == 1
    assert balanced_stages_of(load(), load().path) is None
    assert path_method_of(load()).path_at(3) != methods[0].path_at(3)


def test_stages_are_the_pipelines_own_or_as_even_as_possible(load):
    own = load(f"{P}sampling=balanced", f"{R}pipeline_model_parallel_size=2", f"{R}pipeline_layers=[5,7]", world_size=2)
    stages = balanced_stages_of(own, own.path)
    assert stages is not None
    assert stages.num_layers == (5, 7)
    pinned = load(f"{P}sampling=balanced", f"{P}balance_stages=4", f"{R}pipeline_model_parallel_size=2", world_size=2)
    stages = balanced_stages_of(pinned, pinned.path)
    assert stages is not None
    assert stages.num_layers == (3, 3, 3, 3)


def test_the_head_is_weighed_by_the_objective(load):
    config = load(f"{P}sampling=balanced", f"{P}balance_stages=2")
    stages = balanced_stages_of(config, config.path)
    # 10 of the 64 text positions; BERT's head: 2 h^2 + 2 h V each. A layer: 8 T h^2 + 4 T^2 h + 16 T h^2.
    layer, head = 24 * 66 * 32**2 + 4 * 66**2 * 32, 10 * (2 * 32**2 + 2 * 32 * 640)
    assert stages is not None
    assert stages.head_cost == pytest.approx(head / layer, rel=1e-12)
    assert stages.num_layers == (6, 6)


def test_layers_that_a_phase_leaves_out_are_named(load):
    stages = f"{P}balance_stages=4"
    lines = left_out_layers(path_method_of(load(f"{P}sampling=balanced", stages, f"{P}schedule=4-8-12")))
    assert len(lines) == 1
    assert lines[0].startswith("layers 1, 2, 9, 10 are never active in phase 0 (paths of 4)")
    assert "the head leave no room in their stage. Lengthen the phase, fix fewer layers, or lower" in lines[0]
    assert left_out_layers(path_method_of(load(f"{P}schedule=4-8-12"))) == []


def test_phases_of_fixed_layers_alone_are_named_once(load):
    lines = left_out_layers(path_method_of(load(f"{P}schedule=2-2-8-12")))
    assert lines == [
        "layers 1-10 are never active in phases 0, 1 (paths of 2): raptr_ds.path.fixed_layers fill them. Lengthen the "
        "phase or fix fewer layers to draw from all."
    ]
    lines = left_out_layers(path_method_of(load(f"{P}schedule=3-8-12", f"{P}fixed_layers=[0,4,7]")))
    assert lines[0].startswith("layers 1-3, 5, 6, 8-11 are never active in phase 0 (paths of 3): ")
    lines = left_out_layers(path_method_of(load(f"{P}schedule=11-12", f"{P}fixed_layers={[*range(10), 11]}")))
    assert lines[0].startswith("layer 10 is never active in phase 0 (paths of 11): ")


def test_expected_predictions_are_the_objectives(load):
    ul2 = "raptr_ds.model.architecture=ul2"
    assert predictions_per_sequence(load()) == 10.0
    # UL2's one causal denoiser without a mode: a text of 66 tokens, all but the first predicted; the other's: 16 of 65.
    prefix = '{"name":"p","kind":"prefix","rate":0.25,"mode":"[S2S]","weight":3}'
    mixture = f'raptr_ds.objective.denoisers=[{{"name":"c","kind":"causal"}},{prefix}]'
    assert predictions_per_sequence(load(ul2, mixture)) == (65 + 3 * 16) / 4
    assert predictions_per_sequence(load(ul2)) > 10


@pytest.mark.parametrize(
    ("keys", "step", "layers", "expected"),
    [
        ((), 50, range(6), None),  # the growth is yet to come
        ((), 51, range(12), None),
        ((), 100, range(12), None),
        (("train.steps=1000",), 100, range(12), "has layers 0-11 after step 100, .* 0-5 there: .*path.method to full"),
        (("train.steps=60",), 40, range(6), "has layers 0-5 after step 40, .* 0-11 there: .* Set these keys back"),
        (("path.schedule=3-12",), 40, range(6), "layers 0-5 .* layers 0-2 "),
        (("path={}",), 40, range(6), "layers 0-5 .* layers 0-11 "),
        (('path={"method": "full"}',), 100, range(12), None),
        ((), 0, range(12), "layers 0-11 after step 0, .* 0-5 there"),  # imported
    ],
)
def test_a_model_neither_grows_twice_nor_misses_a_growth(load, keys, step, layers, expected):
    path = f'{P[:-1]}={{"method": "stacking", "schedule": "6-12"}}'
    method = path_method_of(load(path, *(f"raptr_ds.{key}" for key in keys)))
    restored = RestoredState(step, {LAYERS: list(layers)}, Path("run/checkpoints/step"))
    check_layers(RestoredState(step, {}, restored.folder), method)  # of an earlier version
    if expected is None:
        check_layers(restored, method)
    else:
        with pytest.raises(CheckpointError, match=expected):
            check_layers(restored, method)
