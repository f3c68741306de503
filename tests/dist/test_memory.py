"""The memory formulas against really built engines: weights and optimizer state of each ZeRO stage, counted tensors."""

import gc
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import num_parameters
from raptr_ds.paths.stages import stage_layers
from raptr_ds.planner.memory import layer_activation_bytes, rank_memory
from raptr_ds.planner.step_time import Device, Layout, Setting
from tests import kept_tensors
from tests.dist.trajectory import SEED, Case, batch_at, build_engine, model_of, process_groups
from tests.dist.workers import run_distributed
from tests.dropout_masks import streams_of

ON_CPU = Device(is_gpu=False)


def live_bytes() -> int:
    """Return the bytes of all tensors that Python can reach, shared storages counted once."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter) and found.layout == torch.strided:
                storage = found.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(launch: Launch, case: Case) -> tuple[int, int]:
    """Return this rank's bytes after building the engine and after a full step, beside what was there before."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    batch = batch_at(case, groups, 0)
    before = live_bytes()
    engine = build_engine(case, groups)
    built = live_bytes() - before
    engine.train_step(batch, LayerPath.full(case.num_layers), 0, 1e-3)
    return built, live_bytes() - before


CASES = {
    "ZeRO 0": (2, {"zero": 0}),
    "ZeRO 0 bf16": (2, {"zero": 0, "precision": "bf16"}),
    "ZeRO 1": (2, {"zero": 1}),
    "ZeRO 1 bf16": (2, {"zero": 1, "precision": "bf16"}),
    "ZeRO 2": (2, {"zero": 2}),
    "TP2": (2, {"zero": 0, "tensor": 2}),
    "PP2 bf16": (2, {"pipeline": 2, "pipeline_layers": (4, 4), "precision": "bf16"}),
    "PP2 DP2 ZeRO 1 bf16": (4, {"zero": 1, "pipeline": 2, "pipeline_layers": (4, 4), "precision": "bf16"}),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_optimizer_are_as_the_formula_says(name):
    world_size, values = CASES[name]
    case = Case(num_layers=8, schedule="2-8", **values)
    shape = model_of(case)
    layout = Layout(
        case.pipeline_layers or (8,),
        case.micro_batch,
        3,
        tensor=case.tensor,
        data=world_size // (case.tensor * case.pipeline),
        zero_stage=case.zero,
        bytes_per_value=2 if case.precision == "bf16" else 4,
    )
    for rank, (built, trained) in enumerate(run_distributed(measure, world_size, case)):
        stage = rank // (world_size // case.pipeline)
        # Adam makes its two moments at the first step. Beside what the formula counts there are norms and biases that
        # both tensor ranks hold (3% of this narrow model), step counts and small buffers.
        for held, optimizer_bytes in ((built, 0), (trained, 8)):
            setting = Setting(shape, replace(layout, optimizer_bytes=optimizer_bytes), ON_CPU, 2)
            memory = rank_memory(setting, stage, 8 // case.pipeline)
            assert held == pytest.approx(memory.weights + memory.optimizer, rel=0.04)
    assert num_parameters(shape) > 100_000


def kept_by_layers(launch: Launch, case: Case) -> int:
    """Return the bytes of all storages that autograd saves for three layers, parameters aside."""
    groups = process_groups(launch, case)
    layers = stage_layers((case.num_layers,))[0]
    stage = build_stage(model_of(case), groups, layers, case.recompute, SEED)
    micro = batch_at(case, groups, 0).micro_batches[0]
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    totals = []
    for length in (1, 4):
        kept = {}  # tensors alive, so that no other storage gets their address

        def pack(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        path = LayerPath(tuple(range(length)), case.num_layers)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = stage(micro.tokens, micro, path, streams_of(SEED, 0, micro.sample_ids))
        totals.append(sum(kept[key].untyped_storage().nbytes() for key in kept.keys() - own))
        assert losses.requires_grad
    return totals[1] - totals[0]


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_keep_what_the_formula_says(architecture, recompute, sequence_parallel):
    """Sequence parallelism halves what two tensor ranks have copies of, and keeps no gathered sequence."""
    case = Case(
        architecture=architecture, tensor=2, sequence_parallel=sequence_parallel, recompute=recompute, dropout=0.0
    )
    shape = model_of(case)
    layout = Layout((5,), case.micro_batch, 1, tensor=2, bytes_per_value=4, sequence_parallel=sequence_parallel)
    layer = layer_activation_bytes(Setting(shape, layout, ON_CPU, 2))
    if recompute:
        layer = case.micro_batch * shape.seq_length * shape.hidden_size * 4 / (2 if sequence_parallel else 1)
    for kept in run_distributed(kept_by_layers, 2, case):
        assert kept == pytest.approx(3 * layer, rel=0.02)


def bytes_of_buckets(shape: ModelSection, layout: Layout, bucket: int) -> float:
    """Return what the formula counts for a buffer of gradients of so many elements, which are summed as they are."""
    layout = replace(layout, summed_bytes_per_value=layout.bytes_per_value)
    with_bucket, without = (
        rank_memory(Setting(shape, replace(layout, reduce_bucket=size), ON_CPU, 2), 0, 5).gradients
        for size in (bucket, 0)
    )
    return with_bucket - without


def reduce_bucket(launch: Launch, case: Case) -> tuple[int, int]:
    """Return the elements of DeepSpeed's buffer of gradients, and of all gradients of this rank."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    engine: Any = build_engine(case, groups)
    sizes = (getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.parameters.values())
    return engine.engine.optimizer.reduce_bucket_size, sum(sizes)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_buffer_of_gradients_is_no_larger_than_all_gradients(zero):
    for bucket, gradients in run_distributed(reduce_bucket, 2, Case(zero=zero)):
        assert bucket == gradients > 10_000
    for bucket, _ in run_distributed(reduce_bucket, 2, Case(zero=zero, reduce_bucket=5000)):
        assert bucket == 5000
    layout, shape = Layout((5,), 2, 3, data=2, zero_stage=zero), model_of(Case())
    assert bytes_of_buckets(shape, layout, 500_000_000) == 2 * num_parameters(shape)


@pytest.mark.parametrize("accumulate_in_fp32", [False, True])
@pytest.mark.parametrize("zero", [1, 2])
def test_the_buffer_of_gradients_has_the_type_that_the_formula_counts(zero, accumulate_in_fp32):
    """ZeRO 1 fills it from what has accumulated, ZeRO 2 from each micro batch's gradients."""
    case = Case(zero=zero, precision="bf16", accumulate_in_fp32=accumulate_in_fp32)
    layout = Layout((5,), 2, 3, data=2, zero_stage=zero, gradient_bytes_per_value=4 if accumulate_in_fp32 else 2)
    for buffer_bytes in run_distributed(bucket_bytes_per_element, 2, case):
        assert bytes_of_buckets(model_of(case), layout, 1000) == 1000 * buffer_bytes


def bucket_bytes_per_element(launch: Launch, case: Case) -> int:
    """Return the size of an element of DeepSpeed's buffer of gradients, from the buffer that a step has filled."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    engine: Any = build_engine(case, groups)
    found: list[int] = []
    optimizer = engine.engine.optimizer
    reduce = optimizer.average_tensor

    def average_tensor(tensor: torch.Tensor, *more: Any) -> None:
        found.append(tensor.element_size())
        reduce(tensor, *more)

    optimizer.average_tensor = average_tensor
    engine.train_step(batch_at(case, groups, 0), LayerPath.full(case.num_layers), 0, 1e-3)
    assert len(set(found)) == 1
    return found[0]


def gpu_layer(launch: Launch, architecture: str, sequence_parallel: bool) -> float:
    """Return what one compiled layer keeps on one of two tensor ranks."""
    groups = initialize_process_groups(launch, 2, 1, sequence_parallel=sequence_parallel)
    return kept_tensors.kept_by_a_layer(groups, architecture, 0.1, is_compiled=True)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_a_compiled_layer_on_tensor_ranks_keeps_what_the_formula_says(architecture, sequence_parallel):
    """What waits for other ranks stays out of graphs, and each graph between keeps what it needs itself."""
    shape = kept_tensors.model_of(architecture, (0.1, 0.1))
    layers, batch = (kept_tensors.LAYERS,), kept_tensors.BATCH
    layout = Layout(layers, batch, 1, tensor=2, sequence_parallel=sequence_parallel, compiled=True)
    expected = layer_activation_bytes(Setting(shape, layout, Device(), 2))
    for kept in run_distributed(gpu_layer, 2, architecture, sequence_parallel):
        assert kept == pytest.approx(expected, rel=0.02)
