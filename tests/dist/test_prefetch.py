"""ZeRO 3 along changing paths: weights are fetched ahead, in DeepSpeed's own order, and stay sharded between steps."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import num_parameters
from raptr_ds.planner.memory import rank_memory
from raptr_ds.planner.setting import kept_whole
from raptr_ds.planner.step_time import Device, Layout, Setting
from tests.dist.trajectory import Case, batch_at, build_engine, model_of, path_method
from tests.dist.workers import run_distributed


@dataclass(frozen=True)
class Fetches:
    """What a run saw.

    late: for each step, visits whose weights were neither there nor being fetched. restarts: how often DeepSpeed met
    another module than it expected (it compares every visit). whole: weights that are unsharded between the steps,
    though not small. visits: of the last step. most_live: weights, in elements, that were unsharded at once.
    """

    paths: list[tuple[int, ...]]
    late: list[int]
    restarts: int
    whole: list[str]
    visits: int
    most_live: int


def count_fetches(launch: Launch, case: Case, lengths: tuple[int, ...] = ()) -> Fetches:
    """Train the case, evaluating the full model between steps, and count how its weights were fetched.

    lengths: the first layers that steps train in turns, in place of the case's paths.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params

    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    engine: Any = build_engine(case, groups)
    coordinator = engine.engine.optimizer.coordinator
    fetch = coordinator.fetch_sub_module
    restarts = count_restarts(coordinator)
    counts = {"late": 0, "visits": 0, "most_live": 0}
    weights = [p for p in engine.parameters.values() if not p.ds_persist]

    def counted(module: torch.nn.Module, forward: bool) -> None:
        counts["visits"] += 1
        counts["late"] += any(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in iter_params(module))
        fetch(module, forward)
        live = sum(p.ds_numel for p in weights if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        counts["most_live"] = max(live, counts["most_live"])

    coordinator.fetch_sub_module = counted
    method, late, paths, whole = path_method(case), [], [], []
    for step in range(case.steps):
        counts.update(late=0, visits=0)
        path = method.path_at(step)
        if lengths:
            path = LayerPath(tuple(range(lengths[step % len(lengths)])), case.num_layers)
        engine.train_step(batch_at(case, groups, step), path, step, case.learning_rate)
        paths.append(path.layers)
        late.append(counts["late"])
        for name, parameter in engine.parameters.items():
            if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE and not parameter.ds_persist:
                whole.append(f"step {step}: {name}")
        if step % 3 == 1:
            engine.evaluate([batch_at(case, groups, 1000)], LayerPath.full(case.num_layers))
    del coordinator.fetch_sub_module
    return Fetches(paths, late, len(restarts), whole, counts["visits"], counts["most_live"])


def count_restarts(coordinator: Any) -> list[None]:
    """Return a list that gets an entry whenever an order turns out wrong."""
    restarts, discard = [], coordinator._invalidate_trace

    def counted() -> None:
        restarts.append(None)
        discard()

    coordinator._invalidate_trace = counted
    return restarts


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (2, Case(micro_batch=6)),
        (2, Case(micro_batch=2)),  # three micro batches a step
        (2, Case(micro_batch=3, recompute=True)),
        (2, Case(micro_batch=3, architecture="ul2", tied=False)),
        (2, Case(micro_batch=3, skipped_update="zero_grad")),
        (4, Case(micro_batch=3, tensor=2)),
    ],
    ids=["plain", "accumulated", "recompute", "ul2", "zero_grad", "TP2 DP2"],
)
def test_weights_are_fetched_ahead_along_every_path(world_size: int, case: Case) -> None:
    case = replace(case, zero=3, num_layers=6, schedule="3-4-5-6", steps=12)
    for seen in run_distributed(count_fetches, world_size, case):
        assert len(set(seen.paths)) > 6
        assert seen.restarts == 0
        assert seen.late[0] > 20  # the first micro batch is recorded: every weight is fetched when it is needed
        micro_batches = case.global_batch * case.tensor // (case.micro_batch * world_size)
        # Afterwards only what the first visits of a micro batch need is late: nothing comes before them.
        assert max(seen.late[1:]) <= 2 * micro_batches, seen.late
        assert seen.visits > 20 * micro_batches
        assert seen.whole == []


@pytest.mark.parametrize("lengths", [(3, 6), (6, 4)], ids=["keeping first", "recomputing first"])
def test_steps_that_recompute_and_steps_that_do_not_take_turns(lengths: tuple[int, int]) -> None:
    """Each kind of step is recorded once; changing between them forgets nothing."""
    case = Case(zero=3, num_layers=6, schedule="6", steps=6, micro_batch=3, recompute=True, keep_activations_up_to=4)
    for seen in run_distributed(count_fetches, 2, case, lengths):
        assert seen.restarts == 0
        assert min(seen.late[:2]) > 20
        assert max(seen.late[2:]) <= 2 * 2, seen.late  # two micro batches a step
        assert seen.whole == []


def test_no_more_than_asked_for_is_whole_at_once() -> None:
    """DeepSpeed's own limits hold along a changing path: what prefetching may have live, and how long it is kept."""
    layer = 12 * 32 * 32  # about a layer's weights
    limits = (("max_live_parameters", 2 * layer), ("max_reuse_distance", layer), ("prefetch_bucket_size", layer))
    case = Case(zero=3, num_layers=8, schedule="4-6-8", steps=9, micro_batch=6)
    free, limited = (
        run_distributed(count_fetches, 2, replace(case, zero_3_options=options))[0] for options in ((), limits)
    )
    assert free.most_live > 8 * layer
    assert limited.restarts == 0
    # What is being used comes on top of what is fetched ahead: a layer's largest matrix, and the embedding.
    assert limited.most_live < 4 * layer
    # The plan's memory: what is whole beside the rank's share, of two ranks. Right to a layer.
    shape = model_of(case)
    for seen, options in ((free, ()), (limited, limits)):
        kept = kept_whole({f"stage3_{key}": value for key, value in options}, layer, recompute=False)
        layout = Layout((8,), 6, 1, data=2, zero_stage=3, bytes_per_value=1, kept_whole=kept)
        weights = rank_memory(Setting(shape, layout, Device(is_gpu=False), 2), 0, 8).weights - num_parameters(shape) / 2
        assert seen.most_live == pytest.approx(weights, abs=layer)


def test_a_wrong_order_is_recorded_anew() -> None:
    """A path that was not known beforehand is trained all the same: DeepSpeed fetches when needed and records anew."""
    case = Case(zero=3, micro_batch=6, steps=6)
    losses, restarts = run_distributed(train_untold, 2, case)[0]
    known = run_distributed(train_untold, 2, replace(case, recompute=True))[0]
    assert restarts > 0
    assert losses == pytest.approx(known[0], rel=1e-6)


def train_untold(launch: Launch, case: Case) -> tuple[list[float], int]:
    """Train with the coordinator given the full path always; return losses and how often it was wrong."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    engine: Any = build_engine(case, groups)
    coordinator = engine.engine.optimizer.coordinator
    restarts = count_restarts(coordinator)
    if not case.recompute:
        coordinator.expect = lambda _layers, training: None
    method = path_method(case)
    losses = [
        engine.train_step(batch_at(case, groups, step), method.path_at(step), step, case.learning_rate).loss
        for step in range(case.steps)
    ]
    coordinator.__dict__.pop("expect", None)
    return losses, len(restarts)
