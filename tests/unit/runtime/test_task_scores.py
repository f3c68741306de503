"""The file in which tools/evaluate.py leaves the scores of an export."""

import json
from pathlib import Path

import pytest

from raptr_ds.runtime.exports import read_scores


def test_scores_are_the_numbers_in_it(tmp_path: Path) -> None:
    results = {"boolq": {"alias": "boolq", "acc": 0.5, "acc_stderr": float("nan")}}
    (tmp_path / "tasks.json").write_text(json.dumps({"results": results}))
    assert read_scores(tmp_path / "tasks.json") == {"boolq": {"acc": 0.5, "acc_stderr": None}}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": {}}', pytest.param("[" * 100_000, id="deep")])
def test_a_file_without_scores_is_a_value_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ValueError):  # noqa: PT011, each has its own words
        read_scores(tmp_path / "tasks.json")
