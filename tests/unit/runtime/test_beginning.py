"""Which checkpoint a start begins with: what its user asked for, or what the run has written since."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime import setup

ANEW = "none, by job 5"


@pytest.mark.parametrize(
    ("load", "restart_count", "recorded", "expected"),
    [
        ("auto", 0, None, "auto"),
        ("auto", 1, "/other", "auto"),
        ("none", 0, ANEW, "none"),  # its user starts it anew each time
        ("none", 1, ANEW, "auto"),
        ("none", 1, "none, by job 4", "none"),  # of an earlier run in the folder
        ("none", 1, "auto", "none"),
        ("/other", 0, "/other", "auto"),
        ("/other", 1, "/other", "auto"),
        ("/other", 1, "auto", "/other"),
        ("/other", 0, None, "/other"),
        # By a version that recorded folders alone, and continued its own checkpoints at every restart.
        ("none", 1, None, "auto"),
        ("/other", 1, None, "auto"),
    ],
)
def test_where_from(
    load: str, restart_count: int, recorded: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {} if recorded is None else {"begun_from": recorded}
    monkeypatch.setattr(setup, "checkpoints_in", lambda folder: [folder / "step-00000004"])
    monkeypatch.setattr(setup, "read_manifest", lambda _: SimpleNamespace(step=4, run_state=state))
    launch = Launch(0, 0, 1, "127.0.0.1", 1, "none", restart_count=restart_count, begun_by="job 5")
    config: Any = SimpleNamespace(checkpoint=SimpleNamespace(load=load))
    origin = setup._origin(load, launch)
    assert setup._where_from(config, launch, origin, Path("checkpoints"), lambda _: None) == expected
