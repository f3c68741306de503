"""The tables of the GPU's tests and measurements: every row is a run that the configuration accepts."""

from pathlib import Path

import pytest

from raptr_ds.config.load import load_run_config
from tests.gpu.kit.measure_training import VARIANTS, Variant
from tests.gpu.kit.measured_models import MODELS
from tests.gpu.training_runs import REPOSITORY, RUNS, held_against, in_order, run_file_of, settings_of


@pytest.mark.parametrize("name", RUNS)
def test_training_runs_are_valid(name: str, tmp_path: Path) -> None:
    run = RUNS[name]
    config = load_run_config(REPOSITORY / run_file_of(run), settings_of(run, Path("data"), tmp_path, 10), world_size=1)
    assert config.model.num_layers == 4
    assert config.zero_stage == (run.forced_zero or 0)
    if (other := held_against(name)) is not None:
        assert RUNS[other].model == run.model


@pytest.mark.parametrize(
    ("model", "variant"),
    [pytest.param(model, variant, id=f"{model} {variant.name}") for model in MODELS for variant in VARIANTS[model]],
)
def test_measured_variants_are_valid(model: str, variant: Variant) -> None:
    config = MODELS[model].config(variant.settings, variant.batch)
    batch = variant.batch or MODELS[model].batch
    assert (config.batch.micro_batch, config.batch.accumulation) == (batch.micro, batch.accumulation)
    assert config.model.hidden_size >= 768  # not a dry run's


def test_a_run_starts_with_all_that_it_is_held_against() -> None:
    assert set(in_order({"ul2_zero_3_bf16"})) == {"ul2_zero_3_bf16", "ul2_bf16", "ul2", "ul2_on_cpu"}
    longest = in_order({"bert", "bert_compiled"})
    assert longest == ["bert_compiled", "bert_on_cpu", "bert"]  # what compiles first, then the slower device
