"""--set: dotted keys, JSON values, strings as they are."""

import pytest

from raptr_ds.config.overrides import apply_overrides, parse_value, write_value
from raptr_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("1e-3", 1e-3),
        ("-1", -1),
        ("true", True),
        ("null", None),
        ("6-8-10-12", "6-8-10-12"),
        ("runs/a b", "runs/a b"),
        ('"2"', "2"),
        ("", ""),
        ("007", "007"),
        ("NaN", "NaN"),
        ("[0, -1]", [0, -1]),
        ("{a: 1}", {"a": 1}),
        ('{"data/x.y": 0.5}', {"data/x.y": 0.5}),
        ("none", "none"),
    ],
)
def test_values(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


_WRITTEN = [
    "2",
    "1e-3",
    "true",
    "null",
    '"2"',
    "",
    "007",
    "NaN",
    "[1",
    "{",
    " runs",
    "two\nlines",
    "1" * 5000,
    "ä b",
    "{a",
    "a\nb",
]


@pytest.mark.parametrize("value", [*_WRITTEN, 2, 1e-3, None, True, [0, "-1"], {"data/x.y": 0.5}])
def test_what_is_written_is_read_back(value):
    text = write_value(value)
    parsed = parse_value(text.strip())
    assert parsed == value
    assert type(parsed) is type(value)
    assert "\n" not in text


@pytest.mark.parametrize("text", ["6-8-10-12", "runs/a b", "none", "007"])
def test_plain_text_is_written_plainly(text):
    assert write_value(text) == text


def test_assigns_without_touching_the_original():
    tree = {"a": {"b": 1, "c": 2}}
    changed, touched = apply_overrides(tree, ["a.b=5", "d.e.f=x", "a.b=6"])
    assert changed == {"a": {"b": 6, "c": 2}, "d": {"e": {"f": "x"}}}
    assert tree == {"a": {"b": 1, "c": 2}}
    assert touched == {"a.b", "d.e.f"}


def test_a_whole_object_counts_for_the_keys_in_it():
    changed, touched = apply_overrides({}, ["z={stage: 3, o: {d: 1}}"])
    assert changed == {"z": {"stage": 3, "o": {"d": 1}}}
    assert touched == {"z", "z.stage", "z.o", "z.o.d"}


def test_null_sections_can_be_filled():
    assert apply_overrides({"a": None}, ["a.b=1"])[0] == {"a": {"b": 1}}


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", ".a=1", "a.=1"])
def test_not_key_value(override):
    with pytest.raises(ConfigError, match=r"KEY=VALUE.*Write it as"):
        apply_overrides({}, [override])


def test_below_a_value_there_is_nothing():
    with pytest.raises(ConfigError, match=r"a\.b is the value 1, not a section.*Set a\.b itself"):
        apply_overrides({"a": {"b": 1}}, ["a.b.c=2"])


def test_broken_list_says_where():
    with pytest.raises(ConfigError, match=r"--set a, line 1 column .*double quotes"):
        apply_overrides({}, ["a=[1, "])
