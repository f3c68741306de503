"""Budgets against sums over the paths of real methods."""

import json
from pathlib import Path

import numpy as np
import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.errors import ConfigError
from raptr_ds.lab.file import load_experiment
from raptr_ds.lab.plan import Planner, choose_rate, equal_cost_steps, expected_flops
from raptr_ds.lab.status import measured_step_time
from raptr_ds.paths.cost import step_flops
from raptr_ds.runtime.method import path_method_of
from tests.unit.lab.conftest import VOCAB_SIZE

RIVALS = [
    {"name": "standard", "method": "standard"},
    {"name": "raptr", "method": "raptr", "set": ["raptr_ds.path.schedule=2-4-6"]},
    {"name": "proportional", "method": "raptr", "set": ["raptr_ds.path.split=proportional"]},
    {"name": "warm", "method": "raptr", "set": ["raptr_ds.path.full_warmup_ratio=0.2"]},
    {"name": "constant", "method": "constant", "set": ["raptr_ds.path.constant_length=4"]},
    {"name": "pld", "method": "pld", "set": ["raptr_ds.path.pld_gamma=0.05"]},
    {"name": "layerdrop", "method": "layerdrop"},
    {"name": "stacking", "method": "stacking"},
    {"name": "recomputing", "method": "raptr", "set": ["raptr_ds.parallel.activation_checkpointing=true"]},
]
_FOLDER = Path(__file__).parents[3] / "experiments"
EXPERIMENTS = sorted([*_FOLDER.glob("*.json"), *_FOLDER.glob("*/*.json")])
ONE_SEED = {"quickstart_twins", "ul2_125m", "bert_base_raptr", "ul2_3m_shallow_fp32"}
"""For minutes, or a GPU's; or a further seed of another comparison, in another precision."""


def summed_flops(lab, settings):
    """Return the FLOPs of the paths that a run really takes, head included, step by step."""
    config = load_run_config(lab.folder / "base.json", settings).with_vocab_size(VOCAB_SIZE)
    method, shape = path_method_of(config), config.model
    predicted = round(4 * predictions_per_sequence(config))
    recompute = config.parallel.activation_checkpointing
    return sum(
        step_flops(shape, method.path_at(step).length, 4, predicted, recompute) for step in range(method.num_steps)
    )


def test_equal_flops_are_equal_sums_of_step_costs(lab):
    planner = lab.planner(contestants=RIVALS, budget={"equal": "flops", "steps": 200})
    shares = planner.shares()
    assert shares[0].steps == 200
    budget = summed_flops(lab, [*shares[0].contestant.settings, "raptr_ds.train.steps=200"])
    assert shares[0].flops == budget
    for share in shares[1:]:
        executed = summed_flops(lab, planner.comparison_runs([share], {share.contestant.name: None})[0].settings)
        # Steps are whole, so half a step may be left over; pld's and layerdrop's draws scatter about what is expected.
        tolerance = 0.03 if share.contestant.name in {"pld", "layerdrop"} else 0.5 * 1.5 / 200
        assert executed == pytest.approx(budget, rel=tolerance), share.contestant.name
    steps = {share.contestant.name: share.steps for share in shares}
    assert steps["raptr"] > steps["warm"] > 200
    assert steps["recomputing"] < steps["proportional"]


def test_equal_flops_of_another_contestant_or_of_a_number(lab):
    of = lab.planner(contestants=RIVALS[:2], budget={"equal": "flops", "steps": 200, "of": "raptr"}).shares()
    assert of[1].steps == 200
    assert of[0].steps < 200
    number = lab.planner(contestants=RIVALS[:2], budget={"equal": "flops", "flops": of[0].flops}).shares()
    assert [share.steps for share in number] == [of[0].steps, 200]


def test_equal_steps_are_the_bases_unless_said(lab):
    assert {share.steps for share in lab.planner(contestants=RIVALS).shares()} == {40}
    assert {share.steps for share in lab.planner(contestants=RIVALS, budget={"steps": 7}).shares()} == {7}


def test_equal_time_as_measured(lab):
    """The stand-in takes 0.1 s and 0.02 s a layer for each step, so 0.22 s for six layers and 0.18 s for four."""
    planner = lab.planner(contestants=[RIVALS[0], RIVALS[4]], budget={"equal": "time", "steps": 90})
    with pytest.raises(ConfigError, match="not measured yet"):
        planner.shares()
    lab.run(planner)
    assert [share.steps for share in planner.shares()] == [90, 110]
    assert lab.stand_in.started[:2] == ["standard, seed 1", "constant, seed 1"]
    lab.run(planner)
    assert lab.stand_in.started == []


def test_the_step_time_is_a_line_over_the_path_length(lab):
    lab.run(lab.planner(contestants=[RIVALS[0], RIVALS[1]], budget={"equal": "time", "seconds": 30.0}))
    time = measured_step_time(lab.folder / "out" / "probes" / "raptr")
    assert (time.seconds, time.seconds_per_layer) == (pytest.approx(0.1), pytest.approx(0.02))
    alone = measured_step_time(lab.folder / "out" / "probes" / "standard")
    assert (alone.seconds, alone.seconds_per_layer) == (pytest.approx(0.22), 0.0)


def test_lengths_need_not_be_whole(tmp_path):
    """Several paths in a step have a mean length; the metrics' own words are what is read."""
    lines = [{"step": n, "loss": 1.0, "path_length": 2.5 + n % 2, "step_seconds": 0.35 + n % 2 / 10} for n in range(20)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    time = measured_step_time(tmp_path)
    assert (time.seconds, time.seconds_per_layer) == (pytest.approx(0.1), pytest.approx(0.1))


def test_equal_time_as_planned_gives_shorter_paths_more_steps(lab):
    budget = {"equal": "time", "steps": 100, "step_time": "planned", "tflops": 0.01}
    shares = lab.planner(contestants=RIVALS[:2], budget=budget).shares()
    assert shares[1].steps > 110
    assert shares[1].seconds == pytest.approx(shares[0].seconds, rel=0.01)


def test_the_solution_is_the_nearest_number_of_steps():
    cost = np.cumsum([0, *np.random.default_rng(0).integers(1, 10, 500)])
    for budget in (1.0, 40.0, 777.0, 1234.5):
        steps = equal_cost_steps(lambda steps: float(cost[min(steps, 500)]), budget)
        assert abs(cost[steps] - budget) == min(abs(cost[1:] - budget))


def test_a_solution_that_a_run_cannot_have_is_refused():
    def cost(steps):
        if steps <= 100:
            raise ConfigError(f"{steps} are too few")
        return 2.0 * steps

    assert equal_cost_steps(cost, 201.9, start=300) == 101
    assert equal_cost_steps(cost, 700.0, start=300) == 350
    with pytest.raises(ConfigError, match="100 are too few"):
        equal_cost_steps(cost, 200.0, start=300)
    with pytest.raises(ConfigError, match="50 are too few"):
        equal_cost_steps(cost, 700.0, start=50)


@pytest.mark.parametrize(
    "warmup",
    [
        ["raptr_ds.path.full_warmup_steps=100"],
        ['scheduler={"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100, "warmup_max_lr": 1e-3}}'],
    ],
)
def test_a_warm_up_counted_in_steps_can_have_an_equal_budget(lab, warmup):
    """Numbers of steps that the search tries may be fewer."""
    few = [RIVALS[0], {"name": "warm", "method": "raptr", "set": [*warmup]}]
    planner = lab.planner(contestants=few, budget={"equal": "flops", "steps": 300})
    planner.check()
    first, second = planner.shares()
    assert second.steps > first.steps == 300
    assert second.flops == pytest.approx(first.flops, rel=0.005)


def test_the_lowest_finite_loss_chooses_the_rate():
    assert choose_rate({1e-3: 2.0, 3e-3: 1.5, 1e-2: None}) == 3e-3
    assert choose_rate({1e-3: None}) is None


def test_a_contestants_error_names_it(lab):
    with pytest.raises(ConfigError, match=r"contestant b: .*did you mean 'constant'"):
        lab.planner(contestants=[{"name": "a"}, {"name": "b", "method": "constnt"}]).check()
    with pytest.raises(ConfigError, match=r"eval\.batches=0"):
        lab.planner(set=["raptr_ds.eval.batches=0", "raptr_ds.eval.interval=0"]).check()


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_the_experiments_of_the_repository_can_be_planned(file):
    experiment = load_experiment(file)
    planner = Planner(experiment, 4096)
    planner.check()
    shares = planner.shares()
    assert len(shares) >= 2
    assert len(experiment.seeds) == (1 if file.stem in ONE_SEED else 3)
    if experiment.budget.equal == "flops":
        assert max(share.flops for share in shares) < 1.01 * min(share.flops for share in shares)
        base = next(share for share in shares if share.contestant.name == experiment.reference)
        for share in shares if base.contestant.method == "standard" else []:
            costs_as_much = share.contestant.method == "standard" and share.num_layers == base.num_layers
            assert (share.steps == base.steps) == costs_as_much
    else:
        assert len({share.steps for share in shares}) == 1


def test_kept_activations_count_as_the_plan_counts_them(lab):
    """With recomputation above three layers only the last phase, half of the steps, makes the fourth pass."""
    path = ["raptr_ds.path.method=raptr", "raptr_ds.path.schedule=3-6", "raptr_ds.train.steps=40"]
    recompute = "raptr_ds.parallel.activation_checkpointing=true"

    def flops(*settings):
        return expected_flops(load_run_config(lab.folder / "base.json", [*path, *settings]).with_vocab_size(VOCAB_SIZE))

    none, all_of_it = flops(), flops(recompute)
    some = flops(recompute, "raptr_ds.parallel.keep_activations_up_to=3")
    assert (some - none) / (all_of_it - none) == pytest.approx(6 / 9)
