"""The comparison file: what it may say, and how an error is reported."""

import json

import pytest

from raptr_ds.config.overrides import apply_overrides
from raptr_ds.errors import ConfigError
from raptr_ds.lab.file import load_experiment

GOOD = {
    "base": "base.json",
    "contestants": [{"name": "standard", "method": "standard"}, {"name": "raptr", "method": "raptr"}],
    "seeds": [1, 2],
}


def load(folder, *overrides, **changes):
    (folder / "base.json").write_text("{}")
    file = folder / "mine.json"
    file.write_text("# a comment\n" + json.dumps({**GOOD, **changes}))
    return load_experiment(file, overrides)


def test_the_least_that_a_file_says(tmp_path):
    experiment = load(tmp_path)
    assert experiment.output == "runs/mine"
    assert experiment.contestants[0].settings == ("raptr_ds.path.method=full",)
    assert (experiment.budget.equal, experiment.reference, experiment.sweep) == ("steps", "standard", None)


def test_a_base_beside_the_file_is_found(tmp_path):
    assert load(tmp_path).base == str(tmp_path / "base.json")


def test_settings_as_a_list_or_as_an_object(tmp_path):
    nested = {"raptr_ds": {"path": {"fixed_layers": [0]}, "data": {"path": {"a.b/c": 2}}}, "zero_optimization.stage": 1}
    experiment = load(tmp_path, set=nested)
    assert experiment.set == (
        "raptr_ds.path.fixed_layers=[0]",
        'raptr_ds.data.path={"a.b/c": 2}',
        "zero_optimization.stage=1",
    )
    assert load(tmp_path, set=["a.b=1"]).set == ("a.b=1",)


def test_text_in_an_object_stays_text(tmp_path):
    block = {"raptr_ds": {"path": {"schedule": "6"}, "data": {"path": "[2024]", "tokenizer": "my own"}}}
    settings = load(tmp_path, set=block).set
    assert apply_overrides({}, settings)[0] == block
    assert settings[-1] == "raptr_ds.data.tokenizer=my own"


def test_keys_of_the_file_can_be_set_on_the_command_line(tmp_path):
    experiment = load(tmp_path, "seeds=[7]", "budget.steps=5", "set.raptr_ds.model.num_layers=3")
    assert (experiment.seeds, experiment.budget.steps) == ((7,), 5)
    assert experiment.set == ("raptr_ds.model.num_layers=3",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes (line 2) is an unknown key; did you mean 'seeds'?"),
        (
            {"contestants": [{"name": "a", "metod": "pld"}]},
            "metod (line 2) is an unknown key; did you mean 'method'?",
        ),
        ({"budget": {"equal": "flop"}}, "budget.equal='flop'"),
        ({"budget": {"stps": 3}}, "budget.stps (line 2) is an unknown key; did you mean 'steps'?"),
        ({"budget": {"equal": "flops", "of": "rapter"}}, "did you mean 'raptr'?"),
        ({"budget": {"flops": 1e9}}, "budget.flops is not used with budget.equal=steps"),
        ({"budget": {"equal": "flops", "flops": 1e9, "steps": 3}}, "budget.flops is the budget itself"),
        ({"sweep": {"learning_rates": [1e-3]}}, "sweep.seed is missing"),
        ({"sweep": {"learning_rates": [1e-3, 1e-3], "seed": 1}}, "more than once"),
        ({"seeds": [1, 1]}, "seeds has 1 more than once"),
        ({"seeds": []}, "seeds=[] (line 2): must have at least one item."),
        ({"seeds": 1}, "seeds=1 (line 2): must be a list, as [1, 2]."),
        ({"contestants": []}, "contestants=[] (line 2): must have at least one item."),
        ({"contestants": [1]}, "mine.json: contestants.0=1: must be an object {key: value}."),
        ({"contestants": [{"name": 5}]}, "contestants.0.name=5 (line 2): must be text; put it in double quotes."),
        (
            {"sweep": {"learning_rates": [], "seed": 1}},
            "sweep.learning_rates=[] (line 2): must have at least one item.",
        ),
        (
            {"contestants": [{"name": "a", "seeds": [1, 7]}]},
            "contestant a: seeds has 7, which is not among the comparison's seeds=[1",
        ),
        ({"contestants": [{"name": "a/b"}]}, "name='a/b' (line 2): must be letters, digits and . _ + - only"),
        ({"contestants": [{"name": "a"}, {"name": "a"}]}, "contestants has a more than once"),
        ({"set": ["raptr_ds.train.steps=4"]}, "raptr_ds.train.steps is set by the comparison's budget.steps"),
        ({"set": ["raptr_ds.path.method"]}, "is not KEY=VALUE"),
        (
            {"set": ["optimizer.params.lr=1"], "sweep": {"learning_rates": [1e-3], "seed": 1}},
            "by the comparison's sweep.learning_rates",
        ),
        ({"processes": 3, "slurm": {"nodes": 2}}, "not a multiple of slurm.nodes=2"),
    ],
)
def test_an_error_comes_with_its_fix(tmp_path, changes, message):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, **changes)
    assert message in str(raised.value)


def test_all_errors_are_reported_at_once(tmp_path):
    with pytest.raises(ConfigError, match="2 problems"):
        load(tmp_path, seeds=[1, 1], budget={"seconds": 3.0})
    with pytest.raises(ConfigError, match="does not exist"):
        load_experiment(tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"base='no\.json' does not exist"):
        load(tmp_path, base="no.json")
