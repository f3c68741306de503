"""What the tests of depth share: runs of small models on prepared text, and their held-out text."""

from pathlib import Path
from typing import Any

import pytest

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.depth.source import ModelSource, open_model
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import lone_process_groups
from tests.depth_runs import MakeRun, depth_run


@pytest.fixture
def make_run(tmp_path: Path, tokenizer: Tokenizer, data_folder: Path) -> MakeRun:
    """Writes a run, and returns it as opened and the model in it."""

    def make(kind: str, name: str = "run", **settings: Any) -> tuple[ModelSource, Stage]:
        folder = tmp_path / f"of_{name}" / name
        with lone_process_groups() as groups:  # not for longer: what is tested has groups of its own
            stage = depth_run(folder, groups, tokenizer, data_folder, kind, **settings)
        return open_model(folder), stage

    return make
