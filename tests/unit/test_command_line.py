"""Numbers on the tools' command lines."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return what the tools share."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("_command_line")


def test_whole_numbers(command_line: ModuleType) -> None:
    assert [command_line.COUNT(text) for text in ("1", "08", "2147483647")] == [1, 8, 2147483647]
    assert command_line.whole_number(0)("0") == 0
    assert command_line.whole_number(-2, 5)("-2") == -2


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "nan", "inf", "1e3", "", "2147483648", "9" * 30, "9" * 5000])
def test_no_whole_number_from_one(command_line: ModuleType, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' must be a whole number, 1 to 2147483647$"):
        command_line.COUNT(text)


def test_numbers_above_zero(command_line: ModuleType) -> None:
    assert [command_line.above_zero(text) for text in ("0.5", "1e-5", "400")] == [0.5, 1e-5, 400]


@pytest.mark.parametrize("text", ["0", "-0.0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "", "1,5"])
def test_no_number_above_zero(command_line: ModuleType, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' must be a number above 0$"):
        command_line.above_zero(text)
