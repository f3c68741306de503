"""What several rooms' tests share: one process's groups, made-up text, data prepared from it, a call of a tool.

What a fixture needs is imported in it: tests of the model run on the oldest torch without what prepares data.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from raptr_ds.parallel.groups import ProcessGroups, lone_process_groups

if TYPE_CHECKING:
    from raptr_ds.data.tokenizer import Tokenizer
    from raptr_ds.prepare.corpus import FileSource
    from tests.exported_runs import Tool


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sixty text files of forty lines."""
    from tests.made_up_text import made_up_text

    folder = tmp_path_factory.mktemp("text")
    paths = [folder / f"{number:02}.txt" for number in range(60)]
    for number, path in enumerate(paths):
        path.write_text(made_up_text(number % 57, 40))
    return paths


@pytest.fixture(scope="session")
def sources(text_files: list[Path]) -> list[FileSource]:
    """The text files as sources."""
    from raptr_ds.prepare.corpus import FileSource
    from raptr_ds.prepare.readers import ReadingOptions

    return [FileSource(path, ReadingOptions()) for path in text_files]


@pytest.fixture(scope="session")
def data_folder(sources: list[FileSource], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder; tests that change it work on a copy."""
    from raptr_ds.prepare.indexing import Preparation
    from tests.made_up_text import SETTINGS

    output = tmp_path_factory.mktemp("data") / "folder"
    Preparation(sources, output, SETTINGS, report=lambda line: None).run()
    return output


@pytest.fixture(scope="session")
def tokenizer(data_folder: Path) -> Tokenizer:
    """The tokenizer of the prepared folder."""
    from raptr_ds.data.tokenizer import Tokenizer

    return Tokenizer.load(data_folder / "tokenizer.model")


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    """The process groups of a lone process, on the CPU."""
    with lone_process_groups() as lone:
        yield lone


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs a tool, given by its name, in this process."""
    from tests.exported_runs import tool_runner

    return tool_runner(monkeypatch, capsys)
