"""Whatever a run file holds, it is a run or our own error; what a run's schedule does, it does in every step."""

import copy
import json
import math
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raptr_ds.config.hjson_text import parse_hjson, read_hjson
from raptr_ds.config.load import load_run_config
from raptr_ds.config.optimization import SCHEDULERS
from raptr_ds.config.overrides import parse_value
from raptr_ds.engine.learning_rate import learning_rate_at
from raptr_ds.errors import RaptrError

FILES = sorted((Path(__file__).parents[3] / "deepspeed_configs").glob("*.json"))
TREES = [read_hjson(file)[0] for file in FILES]

TEXTS = st.text(alphabet='ab0.1-_ é"\\\0\ud800', max_size=6)
HUGE = st.sampled_from([10**18, 2**63, -(2**63), 10**400, 1e18, 1e308, -1e308, 5e-324, 65536, 2**31 - 1, 2**31])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 1),
    HUGE,
    TEXTS,
    st.sampled_from(["auto", "raptr", "full", "width", "ul2", "bert", "SGD", "balanced", "paper", "1-2"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += places(value, (*prefix, key))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(places(tree) or [("raptr_ds",)]))
        node = tree
        for key in where[:-1]:
            node = node[key]
        match draw(st.sampled_from(["delete", "replace", "rename", "nest", "add"])):
            case "delete":
                node.pop(where[-1], None)
            case "replace":
                node[where[-1]] = draw(VALUES)
            case "rename":
                other = draw(st.sampled_from(places(tree) or [("x",)]))
                node[draw(TEXTS | st.just(other[-1]) | st.just(".".join(other)))] = node.pop(where[-1], None)
            case "nest":
                node[where[-1]] = {where[-1]: node.get(where[-1])}
            case _:
                node[draw(TEXTS)] = draw(VALUES)
    return tree


def loads_or_is_refused(file: Path, text: str) -> None:
    """Load the text; a run's resolved tree gives the same run and the same tree."""
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_run_config(file, [], 2)
    except RaptrError:
        return
    resolved = config.resolved()
    file.write_text(json.dumps(resolved), encoding="utf-8")
    again = load_run_config(file, [], 2)
    assert again.resolved() == resolved
    assert again == config


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run.json"


@given(tree=mutated())
def test_a_changed_run_file_is_a_run_or_our_error(run_file, tree):
    loads_or_is_refused(run_file, json.dumps(tree))


@given(text=st.text() | st.text(alphabet="{}[]:,\"'#/\\ \n-0123456789eE.nulltrfas", max_size=60))
def test_arbitrary_text_is_an_object_or_our_error(run_file, text):
    loads_or_is_refused(run_file, text)
    for parse in (parse_hjson, parse_value):
        with suppress(RaptrError):
            parse(text, "text")


@given(data=st.data())
def test_arbitrary_overrides_give_a_run_or_our_error(data):
    file = data.draw(st.sampled_from(FILES))
    keys = [".".join(place) for place in places(TREES[FILES.index(file)])]
    key = data.draw(st.sampled_from(keys) | TEXTS)
    value = data.draw(VALUES.map(json.dumps) | TEXTS)
    with suppress(RaptrError):
        load_run_config(file, [f"{key}={value}"], 2)


STEPS = st.integers(0, 60)
RATES = st.floats(1e-8, 1.0) | st.sampled_from([0.0, 1e-3])
PARAMS: dict[str, st.SearchStrategy[Any]] = {
    "warmup_num_steps": STEPS,
    "total_num_steps": STEPS,
    "decay_num_steps": STEPS,
    "warmup_ratio": st.floats(0, 1),
    "decay_ratio": st.floats(0, 1),
    "warmup_min_lr": RATES,
    "warmup_max_lr": RATES,
    "decay_min_lr": RATES,
    "warmup_min_ratio": st.floats(0, 1),
    "cos_min_ratio": st.floats(0, 1),
    "warmup_type": st.sampled_from(["log", "linear"]),
    "decay_type": st.sampled_from(["linear", "cosine", "sqrt"]),
}


@given(data=st.data(), num_steps=st.integers(1, 50), lr=st.floats(1e-8, 1.0))
def test_every_accepted_schedule_trains_in_every_step(run_file, data, num_steps, lr):
    kind = data.draw(st.sampled_from(list(SCHEDULERS)))
    keys = data.draw(st.lists(st.sampled_from(list(SCHEDULERS[kind])), unique=True, max_size=4))
    tree = copy.deepcopy(TREES[0])
    tree["optimizer"]["params"]["lr"] = lr
    tree["scheduler"] = {"type": kind, "params": {key: data.draw(PARAMS[key], label=key) for key in keys}}
    tree["raptr_ds"]["train"]["steps"] = num_steps
    run_file.write_text(json.dumps(tree), encoding="utf-8")
    try:
        config = load_run_config(run_file, [], 2)
    except RaptrError:
        return
    assert config.scheduler is not None
    warmup = config.scheduler["params"]["warmup_num_steps"]
    rates = [learning_rate_at(config.scheduler, lr, step) for step in range(num_steps)]
    rounding = lr * 1e-12  # a sum of two rates may round up by a few units in the last place
    assert all(math.isfinite(rate) and 0 < rate <= lr + rounding for rate in rates)
    assert all(after >= before - rounding for before, after in pairwise(rates[:warmup]))
    assert all(after <= before + rounding for before, after in pairwise(rates[warmup:]))
