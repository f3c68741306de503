"""What the path section derives: schedules by name, and rivals at RaPTr's compute."""

import re
from pathlib import Path

import pytest

from raptr_ds.config.path_sections import PATH_SECTIONS, RaptrSection, RunSizes, StackingSection, WidthSection
from raptr_ds.errors import ConfigError

M, P = "raptr_ds.model.", "raptr_ds.path."


@pytest.mark.parametrize(
    ("overrides", "schedule"),
    [
        (f"{P}schedule=paper", "6-8-10-12"),
        (f"{P}schedule=doubling", "3-6-12"),
        (f"{P}schedule=gradual", "6-9-12"),
        (f"{P}schedule=half", "2-3-7-12"),
        (f"{P}schedule=half {M}num_layers=24", "4-6-14-24"),
        (f"{P}schedule=half {M}num_layers=5", "2-2-3-5"),
        (f"{P}schedule=late", "3-3-3-3-12"),
        (f"{P}schedule=late {M}num_layers=24", "6-6-6-6-24"),
        (f"{P}schedule=one_expansion", "2-2-2-2-12"),
        (f"{P}schedule=one_expansion {P}fixed_layers=[0]", "1-1-1-1-12"),
        (f"{P}method=stacking {P}schedule=one_expansion {M}num_layers=24", "1-1-1-1-24"),
        (f"{P}schedule=doubling {P}fixed_layers=[0,1,2,-2,-1]", "5-6-12"),
        (f"{P}schedule=doubling {M}num_layers=5", "2-3-5"),
        (f"{P}method=stacking {P}schedule=doubling {M}num_layers=24", "6-12-24"),
        (f"{P}method=width {P}schedule=doubling", "1-2-4"),
    ],
)
def test_schedules_have_names(load, overrides, schedule):
    assert load(*overrides.split()).path.schedule == schedule


@pytest.mark.parametrize("text", ["6-", "-6", "6--8", "6,8", "six", "6-0-12", "6.5-12", "06-12", " 6-12"])
def test_malformed_schedules_are_refused(load, text):
    with pytest.raises(ConfigError, match="must be path lengths"):
        load(f'{P}schedule="{text}"')


@pytest.mark.parametrize(
    ("split", "read"),
    [("power:1", "power:1"), ("power:0.5", "power:0.5"), ("[0.25,0.25,0.5]", (0.25, 0.25, 0.5))],
)
def test_phases_may_be_split_in_several_ways(load, split, read):
    assert load(f"{P}method=stacking", f"{P}split={split}").path.split == read


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (f"{P}split=uniformly", "must be uniform, proportional, power:A .*did you mean 'uniform'"),
        (f"{P}split=power", "must be uniform, proportional, power:A"),
        (f"{P}split=power:99 {P}schedule={'-'.join(['12'] * 1300)}", "too high a power for 1300 phases"),
        (f"{P}split=power:-1", "must be uniform, proportional, power:A"),
        (f"{P}split=[0.8,0.2]", r"each of the 4 phases of schedule='6-8-10-12'.*it has 2, which add up to 1\."),
        (f"{P}split=[0.8,0.3] {P}schedule=6-12", "which add up to 1; it has 2, which add up to 1.1"),
        (f"{P}split=[1,0] {P}schedule=6-12", r"split.0=1.* must be less than 1"),
        (f"{P}split=3", r"split=3.* must be a string"),
        (f"{P}method=stacking {P}schedule=0-12", "begins without layers.*Set growth_init to 'random' or 'zero'"),
        (f"{P}schedule=0-12", "must be path lengths"),
        (f"{P}width_schedule=1-2-4", "width_schedule='1-2-4' has 3 phases and .*'6-8-10-12' has 4"),
        (f"{P}width_schedule=1-2-3", r"width_schedule='1-2-3' must end with the full model, not at 3 heads; .*heads=4"),
        (f"{P}width_schedule=2-1-4-4", "width_schedule='2-1-4-4' shrinks"),
        (f"{P}width_schedule=4-", "width_schedule='4-' must be path lengths"),
        (
            f"{P}width_schedule=paper {P}paths_per_step=2 train_micro_batch_size_per_gpu=2",
            "width_schedule='2-3-3-4' with raptr_ds.path.paths_per_step=2: .*Remove one",
        ),
        (f"{P}width_schedule=paper {M}ffn_hidden_size=130", "width_schedule='2-3-3-4' cuts the MLP"),
        (f"{P}width_schedule=paper raptr_ds.train.compile=true", "width_schedule='2-3-3-4' changes it"),
        (f"{P}width_schedule=paper zero_optimization.stage=3", "width_schedule='2-3-3-4' with skipped_update='freeze'"),
        (f"{P}method=width {P}width_schedule=paper", "width_schedule='paper'.* has no use with .*method='width'"),
        (f"{P}method=stacking {P}growth_init=zero {P}growth_optimizer_state=copied", "new layers are no copies"),
    ],
)
def test_splits_and_growths_that_do_not_fit_are_refused(load, overrides, says):
    with pytest.raises(ConfigError, match=says):
        load(*overrides.split())


def test_widths_have_the_names_of_schedules(load):
    assert load(f"{P}width_schedule=paper").path.width_schedule == "2-3-3-4"
    assert load().path.width_schedule is None


@pytest.mark.parametrize(("init", "state"), [("copied", "copied"), ("zero", "fresh"), ("random", "fresh")])
def test_the_optimizer_state_of_new_layers_is_that_of_what_they_are_copies_of(load, init, state):
    assert load(f"{P}method=stacking", f"{P}growth_init={init}").path.growth_optimizer_state == state


def test_the_table_of_methods_has_all_their_keys():
    table = (Path(__file__).parents[3] / "docs/methods.md").read_text(encoding="utf-8")
    rows = {row[1]: row[2] for row in re.finditer(r"^\| `(\w+)` \|.*\|(.*)\|$", table, re.M)}
    assert {method: set(re.findall(r"`(\w+)`", keys)) for method, keys in rows.items()} == {
        method: set(section.model_fields) - {"method"} for method, section in PATH_SECTIONS.items()
    }


def test_fixed_layers_count_from_the_end_and_meet():
    assert RaptrSection().fixed_in(12) == (0, 11)
    assert RaptrSection().fixed_in(1) == (0,)
    assert RaptrSection(fixed_layers=()).fixed_in(4) == ()


def test_a_section_is_checked_without_a_run():
    assert WidthSection().checked(RunSizes(12, 100, num_heads=4)).schedule == "2-3-3-4"
    with pytest.raises(ConfigError, match="must end with the full model, not at 9"):
        StackingSection(schedule="3-9").checked(RunSizes(12, 100))


@pytest.mark.parametrize(
    ("method", "num_layers", "derived"),
    [
        ("constant", 12, {"constant_length": 9}),
        ("layerdrop", 12, {"layerdrop": 0.25}),
        ("layerdrop", 1, {"layerdrop": 0.5}),
        ("stacking", 12, {"schedule": "6-9-12"}),
        ("stacking", 24, {"schedule": "12-18-24"}),
        ("stacking", 1, {"schedule": "1-1-1"}),
        ("width", 12, {"schedule": "2-3-3-4"}),
    ],
)
def test_rivals_get_the_compute_of_raptr(load, method, num_layers, derived):
    path = load(f"{P}method={method}", f"{M}num_layers={num_layers}", f"{P}fixed_layers=null").path
    assert {key: getattr(path, key) for key in derived} == derived
