"""Who is measured when: in turns where memory is enough, one after another where not, and what a row says without."""

import gc
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.bench import steps as step_benchmark
from raptr_ds.bench.others import HuggingFaceStack, MegatronLayersStack, OtherStack
from raptr_ds.bench.ours import OurEntrant
from raptr_ds.bench.report import conclusions, describe, rows_of, table
from raptr_ds.bench.steps import Options, measure_steps
from raptr_ds.config.load import load_run_config
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.planner.random_batch import random_step_batch
from raptr_ds.runtime.out_of_memory import DeviceMemory
from tests.dist.test_memory import live_bytes
from tests.dist.workers import WorkerError, run_distributed

RUN_FILE = Path(__file__).parents[2] / "deepspeed_configs" / "bert_quickstart.json"
TINY = [
    "train_batch_size=4",
    "train_micro_batch_size_per_gpu=2",
    "raptr_ds.model.num_layers=4",
    "raptr_ds.model.hidden_size=32",
    "raptr_ds.model.seq_length=16",
    "raptr_ds.model.vocab_size=90",
]
OURS, HUGGING_FACE, MEGATRON = "raptr_ds", HuggingFaceStack.name, MegatronLayersStack.name


@dataclass(frozen=True)
class Failing:
    """Who finds no memory. when: `build`, `step`, or `beside others`: as soon as another is in memory too."""

    name: str = ""
    when: str = "step"
    message: str = "CUDA out of memory. Tried to allocate 2.00 GiB."


@dataclass
class Seen:
    """What a benchmark did: who was built, in this order, how many were in memory at once, and who still is."""

    built: list[str] = field(default_factory=list)
    most_at_once: int = 0
    left: list[str] = field(default_factory=list)
    left_bytes: int = 0
    num_parameters: int = 0
    why_apart: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    report: str = ""


def measure(launch: Launch, options: Options, failing: Failing, settings: Sequence[str]) -> Seen:
    """Measure a tiny model; entrants are really built, trained and freed, and one of them is made to fail."""
    seen, alive = Seen(), {}
    gc.freeze()  # what this file imports, transformers among it, is not looked through in each of forty collections

    def living() -> list[str]:
        gc.collect()
        return [name for name, reference in alive.items() if reference() is not None]

    def fail() -> None:
        raise RuntimeError(failing.message)

    def follow(kind: Any) -> None:
        build, next_step = kind.build, kind.next_step

        def followed_build(entrant: Any) -> None:
            seen.built.append(entrant.name)
            if failing == Failing(entrant.name, "build"):
                fail()
            build(entrant)
            engine = entrant._engine if kind is OurEntrant else entrant.model
            alive[entrant.name] = weakref.ref(engine)
            seen.most_at_once = max(seen.most_at_once, len(living()))
            if failing.when == "beside others" and len(living()) > 1:
                fail()

        def followed_step(entrant: Any) -> Any:
            if failing.when == "step" and failing.name == entrant.name:
                fail()
            return next_step(entrant)

        kind.build, kind.next_step = followed_build, followed_step

    follow(OurEntrant)
    follow(OtherStack)
    config = load_run_config(RUN_FILE, [*TINY, *settings], 1)
    groups = initialize_process_groups(launch, 1, 1)
    batch, before = random_step_batch(config, 0), live_bytes()
    result = measure_steps(config, groups, batch, options)
    seen.left_bytes, seen.num_parameters = live_bytes() - before, result.num_parameters
    seen.left, seen.why_apart, seen.rows = living(), result.why_apart, rows_of(result)
    report = [*describe(config, result, groups.device, "random"), *table(seen.rows), *conclusions(result, seen.rows)]
    seen.report = "\n".join(report)
    return seen


def run(failing: Failing | None = None, settings: Sequence[str] = (), **options: bool) -> Seen:
    """Measure in a process of its own."""
    return run_distributed(measure, 1, Options(2, **options), failing or Failing(), settings)[0]


def test_in_turns_or_one_after_another() -> None:
    together, apart = run(), run(one_at_a_time=True)
    assert (together.most_at_once, apart.most_at_once) == (3, 1)
    for seen in (together, apart):
        assert seen.built == [OURS, HUGGING_FACE, MEGATRON]
        assert seen.left == []
        assert seen.left_bytes < seen.num_parameters  # a byte for each: no copy of the weights is left anywhere
        assert [len(row["seconds"]) for row in seen.rows] == [2] * 5
        assert [row["out_of_memory"] for row in seen.rows] == [None] * 5
    # The same weights, although our engine has trained and is gone when the others are built.
    assert [row["loss"] for row in together.rows] == [row["loss"] for row in apart.rows]
    assert together.why_apart is None
    assert "in turns: one step of each row in every round" in together.report
    assert "peak memory of the process, all rows together" in together.report
    assert "one stack after another (as asked for), our paths in turns" in apart.report
    assert f"peak memory of the process: {OURS} " in apart.report


def test_no_memory_side_by_side_leads_to_one_after_another() -> None:
    seen = run(Failing(when="beside others"))
    assert seen.why_apart == "side by side they ran out of memory"
    assert seen.built == [OURS, HUGGING_FACE, OURS, HUGGING_FACE, MEGATRON]
    assert seen.left == []
    assert [len(row["seconds"]) for row in seen.rows] == [2] * 5
    assert "(side by side they ran out of memory)" in seen.report


@pytest.mark.parametrize("when", ["build", "step"])
def test_who_does_not_fit_has_a_row_that_says_so_and_the_others_go_on(when: str) -> None:
    seen = run(Failing(HUGGING_FACE, when))
    assert [len(row["seconds"]) for row in seen.rows] == [2, 2, 2, 0, 2]
    assert re.search(
        rf"\| {re.escape(HUGGING_FACE)} \| one process \| 4 \| out of memory: needs about [\d.]+ MiB \|", seen.report
    )
    assert f"full path against {MEGATRON}" in seen.report
    assert f"full path against {HUGGING_FACE}" not in seen.report
    assert seen.left == []


def test_if_ours_does_not_fit_the_others_are_measured_all_the_same() -> None:
    seen = run(Failing(OURS, "build"))
    assert [len(row["seconds"]) for row in seen.rows] == [0, 0, 0, 2, 2]
    assert all(row["speed_up"] is None for row in seen.rows)
    assert seen.report.count("out of memory: needs about") == 3
    losses = [row["loss"] for row in seen.rows]
    assert losses[0] is None
    assert losses[3] == pytest.approx(losses[4], rel=1e-5)  # the same weights, drawn for the two


def test_another_error_is_raised() -> None:
    with pytest.raises(WorkerError, match="mat1 and mat2"):
        run(Failing(MEGATRON, "step", "mat1 and mat2 shapes cannot be multiplied"))


def test_hugging_face_can_be_compiled_too() -> None:
    seen = run(settings=["raptr_ds.model.num_layers=2"], compile_others=True)  # every layer adds to what is compiled
    assert [row["name"] for row in seen.rows[-2:]] == [f"{HUGGING_FACE}, compiled", MEGATRON]
    assert "; aim 1.3: " in seen.report
    assert seen.rows[-2]["loss"] == pytest.approx(seen.rows[0]["loss"], rel=1e-5)


def test_the_plan_decides_before_anything_is_built() -> None:
    config = load_run_config(RUN_FILE.with_name("ul2_1b_full.json"), ["raptr_ds.model.vocab_size=32000"], 1)
    h100, h200 = DeviceMemory("H100", 80 << 30), DeviceMemory("H200", 141 << 30)
    reason = step_benchmark._do_not_fit(config, h100, is_alone=False)
    assert reason is not None
    assert reason.endswith("GiB of 80.00 GiB")
    assert step_benchmark._do_not_fit(config, h200, is_alone=False) is None
    assert step_benchmark._do_not_fit(config, h100, is_alone=True) is None
    assert step_benchmark._do_not_fit(config, None, is_alone=False) is None
    for name in (OURS, HUGGING_FACE, MEGATRON):
        assert step_benchmark._needed_bytes(config, name, on_gpu=True) < h100.total
    words = step_benchmark._out_of_memory(93.4 * 2**30, h100)
    assert words == "out of memory: needs about 93.40 GiB of 80.00 GiB"
