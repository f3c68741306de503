"""Questions to the planner, in a process of its own: the trainer imports nothing of it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from raptr_ds.config.run import RunConfig
from raptr_ds.parallel.launch import environment_of_child

_SECONDS = 60.0
_SOURCES = Path(__file__).resolve().parents[2]


class PlannerError(Exception):
    """The planner failed, or took more than a minute."""


def ask_planner(module: str, arguments: Sequence[str], config: RunConfig) -> str:
    """Return what a module of the planner prints about a run; the process sees no GPU.

    Raises: PlannerError.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            input=json.dumps(config.resolved()),
            cwd=_SOURCES,
            env=environment_of_child(),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PlannerError(f"the memory plan could not be made ({error})") from error
    return done.stdout
