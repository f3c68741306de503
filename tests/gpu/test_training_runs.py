"""The command line on the device: every precision, ZeRO stage and kind of step against a plainer one, or the CPU's.

The runs start together, KIT_JOBS at a time (8), because most of each is imports; a test waits for its own.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.kit.measured_device import IS_DRY_RUN
from tests.gpu.training_runs import (
    CASES,
    NUM_STEPS,
    PATIENCE,
    RUNS,
    STOPPED_STEPS,
    held_against,
    in_order,
    largest_difference,
    prepared_data,
    train,
    train_in_two_parts,
)

Record = Callable[[str, object], None]
Futures = dict[str, Future[Any]]

pytestmark = pytest.mark.timeout(600 * PATIENCE)


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Futures]:
    """Everything that the selected tests wait for, by name."""
    folder: Path = tmp_path_factory.mktemp("runs")
    data = prepared_data(folder)
    own = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    names = {str(item.callspec.params["name"]) for item in own}
    with ThreadPoolExecutor(int(os.environ.get("KIT_JOBS", "1" if IS_DRY_RUN else "8"))) as pool:
        futures: Futures = {}
        for name in sorted(names & {"killed", "stopped"}):  # three runs each
            futures[name] = pool.submit(train_in_two_parts, data, folder, name == "killed")
        for name in in_order(names & RUNS.keys()):
            futures[name] = pool.submit(train, name, data, folder)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CASES)
def test_losses(name: str, started: Futures, record_property: Record) -> None:
    """A run ends well, its losses are finite, and near those of what it is held against."""
    run, finished = RUNS[name], started[name].result()
    text = f"exit code {finished.exit_code} after {finished.seconds:.0f} s"
    assert finished.exit_code == 0, f"{text}: {finished.last_words}"
    assert len(finished.losses) == NUM_STEPS
    assert all(math.isfinite(loss) for loss in finished.losses), finished.losses
    text += f", loss {finished.losses[0]:.5f} to {finished.losses[-1]:.5f}"
    if (other := held_against(name)) is not None:
        expected = started[other].result().losses
        assert len(expected) == NUM_STEPS, f"{other}, which this is held against, failed"
        first = largest_difference(finished.losses[:1], expected)
        later = largest_difference(finished.losses, expected)
        text += f", off {other} by {first:.1e} at first and {later:.1e} at most"
        assert first <= run.tolerance.first, text
        assert later <= run.tolerance.later, text
    record_property("finding", text)


@pytest.mark.parametrize("name", [] if IS_DRY_RUN else ["stopped", "killed"])
def test_a_run_in_two_parts_is_the_run_in_one(name: str, started: Futures, record_property: Record) -> None:
    """A GPU sums some gradients in any order, which a hundred steps amplify; other batches would differ by percents."""
    resumed = started[name].result()
    assert resumed.exit_codes == [0, -9 if name == "killed" else 75, 0]
    assert 0 < resumed.num_before < STOPPED_STEPS
    assert len(resumed.losses) == len(resumed.whole) == STOPPED_STEPS
    difference = largest_difference(resumed.losses, resumed.whole)
    record_property("finding", f"after {resumed.num_before} of {STOPPED_STEPS} steps, off by {difference:.1e} at most")
    assert difference < 2e-3
