"""The law of what a saving costs: made-up runs that follow it, their noise, and the results in the repository."""

import dataclasses
import json
import shutil
from pathlib import Path

import hjson
import numpy as np
import pytest

from raptr_ds.planner.law import Measured, fit_law
from raptr_ds.planner.results import RESULTS, read_results

TRUE = {"b": 0.35, "d": -0.05, "q": 0.3, "deep": (0.1, 2.4, 1.3), "wide": (-0.1, 2.1, 1.6)}
SIZES = {"deep": 1000, "wide": 4000}
SAVINGS = (0.0, 0.1, 0.25, 0.5)


def _loss(model: str, tokens: float, saving: float) -> float:
    c, floor, height = TRUE[model]
    counted = np.exp(saving * (c + TRUE["d"] * np.log(tokens)) + TRUE["q"] * saving**2) * tokens
    return float(floor + height * counted ** -TRUE["b"])


def _runs(noise: float = 0.0, seed: int = 0) -> list[Measured]:
    draw = np.random.default_rng(seed)
    return [
        Measured(model, SIZES[model], tokens, saving, _loss(model, tokens, saving) + noise * draw.standard_normal())
        for model in ("deep", "wide")
        for tokens in (0.2, 0.5, 1.0, 2.5)
        for saving in SAVINGS
    ]


def test_runs_that_follow_the_law_give_it_back() -> None:
    law = fit_law(_runs())
    np.testing.assert_allclose(
        law.parameters, [TRUE["b"], TRUE["d"], TRUE["q"], *TRUE["deep"], *TRUE["wide"]], rtol=1e-5
    )
    assert law.residual < 1e-7
    assert (law.longest, law.longest_model, law.shortest, law.largest) == (2.5, "deep", 0.2, 4000)
    for tokens, saving in ((0.5, 0.25), (40.0, 0.4)):
        equal_flops = _loss("wide", tokens / (1 - saving), saving) - _loss("wide", tokens, 0)
        equal_tokens = _loss("wide", tokens, saving) - _loss("wide", tokens, 0)
        assert law.at_equal_flops("wide", tokens, saving).mean == pytest.approx(equal_flops, abs=1e-5)
        assert law.at_equal_tokens("wide", tokens, saving).mean == pytest.approx(equal_tokens, abs=1e-5)


def test_intervals_hold_the_truth_as_often_as_they_claim() -> None:
    """Inside what was measured and beyond it; 95% of 300 draws, within four deviations of a binomial's."""
    for tokens in (1.0, 25.0):
        true = _loss("deep", tokens / 0.75, 0.25) - _loss("deep", tokens, 0)
        expected = [fit_law(_runs(0.01, seed)).at_equal_flops("deep", tokens, 0.25) for seed in range(300)]
        held = np.mean([one.least <= true <= one.most for one in expected])
        assert abs(held - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 300)


def test_the_saving_with_the_least_upper_end_is_chosen_and_none_without_evidence() -> None:
    law = fit_law(_runs(0.002))
    assert law.best_saving("deep", 1.0, (0.1, 0.25, 0.5)) == 0.5
    # On such paths a token counts for nothing: whatever is saved, the standard run is better.
    worse = dataclasses.replace(law, parameters=law.parameters.copy())
    worse.parameters[3] = -20.0  # c of `deep`
    assert worse.best_saving("deep", 1.0, (0.1, 0.25, 0.5)) is None
    uncertain = dataclasses.replace(law, covariance=law.covariance * 1e6)
    assert uncertain.best_saving("deep", 1.0, (0.1, 0.25)) is None


def test_too_few_runs_are_no_law() -> None:
    with pytest.raises(ValueError, match="9 runs do not determine the law's 9 parameters"):
        fit_law([*_runs()[:4], *_runs()[-5:]])


def test_a_model_that_its_few_runs_do_not_determine_gives_no_numbers() -> None:
    alone = Measured("alone", 9000, 9.0, 0.0, 2.0)  # says nothing of paths
    law = fit_law([*_runs(0.002), alone])
    assert (law.longest, law.longest_model, law.largest) == (2.5, "deep", 9000)
    with pytest.raises(ValueError, match="no model has a standard run and more than 3 runs"):
        fit_law([run for run in _runs() if run.saving] + [alone])


def test_another_schedule_of_rates_makes_another_model(tmp_path: Path) -> None:
    kinds = ("WarmupDecayLR", "WarmupStableDecayLR", None)
    for number, kind in enumerate(kinds):
        shutil.copytree(RESULTS / "ul2_1m_one_rate", tmp_path / str(number))
        for file in (tmp_path / str(number)).rglob("config.json"):
            config = json.loads(file.read_text())
            scheduler = config.pop("scheduler")
            file.write_text(json.dumps({**config, "scheduler": {**scheduler, "type": kind}} if kind else config))
    results = read_results("ul2", tmp_path)
    first, *others = ([run.loss for run in results[start : start + 3]] for start in (0, 3, 6))
    assert others == [first, first]
    names = ["", ", WarmupStableDecayLR", ", constant rate"]
    assert [run.model for run in results[::3]] == [f"12 layers x 128{name}" for name in names]


def test_another_text_makes_another_model(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "ul2_1m_one_rate", tmp_path / "other")
    for file in tmp_path.rglob("config.json"):
        config = json.loads(file.read_text())
        config["raptr_ds"]["data"]["path"] = "data/mine"
        file.write_text(json.dumps(config))
    names = {run.model for run in read_results("ul2", tmp_path)}
    assert names == {"12 layers x 128, data/mine"}


def test_the_repositorys_runs_speak_for_half_where_they_are_and_for_neither_outside() -> None:
    """That of docs/results.md."""
    law = fit_law(read_results("ul2"))
    wide = "12 layers x 128"
    assert law.models == (
        "12 layers x 64",
        "24 layers x 64",
        wide,
        f"{wide}, WarmupStableDecayLR",
        f"{wide}, data/code",
    )
    assert law.at_equal_flops(law.longest_model, 1.2, 0.449).mean == pytest.approx(-0.255, abs=5e-4)
    assert law.best_saving(law.longest_model, 1.2, (0.224, 0.449)) == 0.449
    far = law.at_equal_flops(law.longest_model, 20.0, 0.449)
    assert (far.mean, far.most) == (pytest.approx(0.004, abs=5e-4), pytest.approx(0.080, abs=5e-4))
    assert law.best_saving(law.longest_model, 20.0, (0.224, 0.449)) is None


def test_it_predicts_runs_of_four_times_the_length_from_the_short_ones() -> None:
    """Fitted without the longest runs, it gives their differences within its intervals."""
    runs = [run for run in read_results("ul2") if run.model.endswith(" 64")]
    short = fit_law([run for run in runs if run.tokens < 1])
    long = [run for run in runs if run.tokens > 1]
    (standard,) = [run for run in long if not run.saving]
    compared = [run for run in long if run.saving and run.tokens > standard.tokens]
    assert [run.saving for run in compared] == [0.244, 0.489]
    for run in compared:
        expected = short.at_equal_flops(run.model, standard.tokens, run.saving)
        assert expected.least < run.loss - standard.loss < expected.most


def test_every_result_names_a_comparison_of_the_repository() -> None:
    for path in RESULTS.glob("*.hjson"):
        models = hjson.loads(path.read_text())["models"]
        for run in (run for model in models.values() for run in model["runs"]):
            assert list(RESULTS.parent.glob(f"*/{run['comparison']}.json")), run
    for record in RESULTS.glob("*/experiment.json"):
        assert list(RESULTS.parent.glob(f"*/{record.parent.name}.json")), record
