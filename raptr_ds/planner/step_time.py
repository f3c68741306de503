"""Step time: a cost model that predicts how long a step along any path takes on any layout.

Layers and head take their executed FLOPs at the effective speed; tensor-parallel reductions, transfers between
pipeline stages, the gradients' reduction, ZeRO's gathers and copies and the optimizer take their bytes at the speed of
links or memory. Only what the pipeline's schedule overlaps is taken to overlap, so the prediction is on the slow side
where communication hides behind computation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raptr_ds.config.sections import ModelSection
from raptr_ds.paths import stages
from raptr_ds.paths.cost import (
    StepFlops,
    head_forward_flops,
    layer_forward_flops,
    layer_parameters,
    outer_parameters,
)
from raptr_ds.paths.path import LayerPath
from raptr_ds.planner.simulator import pipeline_seconds

OPTIMIZER_BYTES = 30
"""AdamW's for a parameter: fp32 weight and two moments read and written, gradient read, 16-bit weight written."""


@dataclass(frozen=True)
class Device:
    """Speeds that a device and its links reach in practice; the defaults are roughly a datacentre GPU of 2023."""

    flops_per_second: float = 400e12
    memory_bytes_per_second: float = 2e12
    machine_bytes_per_second: float = 300e9
    """Links inside a machine."""
    network_bytes_per_second: float = 40e9
    """Links between machines, for one device."""
    ranks_per_machine: int = 8
    latency_seconds: float = 10e-6
    """Of one message or collective."""
    is_gpu: bool = True
    """Decides what a layer keeps in memory (planner/memory.py)."""

    def link_bytes_per_second(self, num_ranks: int) -> float:
        """Return the speed between ranks of a group that spans num_ranks neighbours."""
        inside = num_ranks <= self.ranks_per_machine
        return self.machine_bytes_per_second if inside else self.network_bytes_per_second


@dataclass(frozen=True)
class Layout:
    """How a step is spread out and computed.

    stage_layers: layers of each pipeline stage. micro_batch: sequences; num_micro_batches: of each data-parallel rank.
    sequence_parallel: the residual stream is split over the tensor ranks. summed_bytes_per_value: of gradients as ZeRO
    1 to 3 sum them over the data-parallel ranks; left out, as they accumulate.
    These decide memory, and times leave them out: optimizer_bytes: the optimizer's fp32 state for each parameter (Adam
    8). reduce_bucket: elements of a buffer of gradients in ZeRO, at most; reduce_buffers: their number. compiled:
    layers are compiled by torch.compile, which makes no difference here on a CPU.
    """

    stage_layers: tuple[int, ...]
    micro_batch: int
    num_micro_batches: int
    tensor: int = 1
    data: int = 1
    zero_stage: int = 1
    recompute: bool = False
    bytes_per_value: int = 2
    gradient_bytes_per_value: int | None = None
    summed_bytes_per_value: int | None = None
    kept_whole: float = np.inf
    sequence_parallel: bool = False
    optimizer_bytes: int = 8
    reduce_bucket: int = 0
    reduce_buffers: int = 1
    compiled: bool = False

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient's value as it accumulates."""
        return self.gradient_bytes_per_value or self.bytes_per_value

    @property
    def summed_bytes(self) -> int:
        """Bytes of a gradient's value as ZeRO 1 to 3 sum it over ranks."""
        return self.summed_bytes_per_value or self.gradient_bytes

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.stage_layers)

    @property
    def stream_ranks(self) -> int:
        """Processes that share the residual stream of a sequence."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def sequences_per_rank(self) -> int:
        """Sequences of a step on each data-parallel rank."""
        return self.micro_batch * self.num_micro_batches

    @property
    def num_ranks(self) -> int:
        """Processes of the job."""
        return self.tensor * self.data * self.num_stages


@dataclass(frozen=True)
class Setting:
    """All that a plan needs besides the paths: model, layout, device, and what one step trains on.

    predicted_per_sequence: expected predicted positions of a sequence, which the head runs on. keep_up_to: active
    layers of a pipeline stage up to which none is recomputed. micro_batches: sequences of a micro batch in each phase;
    empty: the layout's. width: the share of each active layer that runs, for memory; None where layers run whole.
    """

    shape: ModelSection
    layout: Layout
    device: Device
    predicted_per_sequence: float
    keep_up_to: int = 0
    micro_batches: tuple[int, ...] = ()
    width: float | None = None

    @property
    def num_predicted(self) -> int:
        """Expected predicted positions of the global batch."""
        return round(self.layout.sequences_per_rank * self.layout.data * self.predicted_per_sequence)

    @property
    def steps(self) -> StepFlops:
        """The FLOPs of steps, by the whole job."""
        layout = self.layout
        layers = tuple(stages.stage_layers(layout.stage_layers))
        return StepFlops(self.shape, layout.sequences_per_rank * layout.data, layout.recompute, self.keep_up_to, layers)

    def flops(self, path_length: float) -> float:
        """Return the FLOPs of a step of this (expected) path length, by the whole job."""
        return self.steps.expected_flops(path_length, self.num_predicted)


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of steps goes; arrays of one shape (paths,)."""

    pipeline: np.ndarray
    gradients: np.ndarray
    gathers: np.ndarray
    copies: np.ndarray
    optimizer: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Seconds of a step."""
        return self.pipeline + self.gradients + self.gathers + self.copies + self.optimizer


def activity_table(paths: Iterable[LayerPath], combine: Callable[..., np.ndarray] = np.mean) -> np.ndarray:
    """Return which layers are active in each step, (steps, layers): 0.0 or 1.0, layers that run in parts included.

    combine: of several paths in one step: their mean, or np.max for what any of them runs.
    """
    return np.array([combine([_activity(draw) for draw in path.draws], axis=0) for path in paths])


def _activity(path: LayerPath) -> np.ndarray:
    row = np.zeros(path.num_layers)
    row[list(path.layers)] = 1.0
    return row


def _recomputed_in_stages(paths: Iterable[LayerPath], setting: Setting) -> np.ndarray:
    """Return how many layers of each pipeline stage run forward once more, (paths, stages); of several, the mean."""
    layout, rows = setting.layout, []
    for path in paths:
        active = active_in_stages(np.array([_activity(draw) for draw in path.draws]), layout.stage_layers)
        recomputes = layout.recompute & (active > setting.keep_up_to)
        rows.append((active * recomputes).mean(axis=0))
    return np.array(rows)


def active_in_stages(activity: np.ndarray, stage_layers: Sequence[int]) -> np.ndarray:
    """Return the number of active layers of each pipeline stage, (paths, stages), from an activity table."""
    assert sum(stage_layers) == activity.shape[-1], f"{stage_layers} for {activity.shape[-1]} layers"
    ranges = stages.stage_layers(stage_layers)
    return np.stack([activity[:, layers.start : layers.stop].sum(axis=1) for layers in ranges], axis=1)


def step_seconds(paths: Sequence[LayerPath], setting: Setting) -> StepSeconds:
    """Return the predicted times of a training step along each path, arrays (paths,).

    A skipped layer costs nothing anywhere (skipped_update freeze); one that any of a step's several paths runs takes a
    whole optimizer step. A layer that runs in part computes less, but its stream, its gradients and its optimizer step
    are whole.
    """
    shape, layout, device = setting.shape, setting.layout, setting.device
    active = active_in_stages(activity_table(paths), layout.stage_layers)
    trained = active_in_stages(activity_table(paths, np.max), layout.stage_layers)  # what any path runs
    layer = layout.micro_batch * layer_forward_flops(shape) / layout.tensor / device.flops_per_second
    sent_forward, sent_backward = tensor_collective_seconds(shape, layout, device)
    head = layout.micro_batch * setting.predicted_per_sequence * head_forward_flops(shape, 1)
    head_seconds = head / layout.tensor / device.flops_per_second
    share = np.array([[path.work / path.mean_length if path.mean_length else 1.0] for path in paths])
    forward_layer = share * layer + sent_forward
    # The backward pass has two products for each one of the forward pass.
    forward, backward = active * forward_layer, active * (2 * share * layer + sent_backward)
    backward += _recomputed_in_stages(paths, setting) * forward_layer
    forward[..., -1] += head_seconds
    backward[..., -1] += 2 * head_seconds
    stream_bytes = layout.micro_batch * shape.seq_length * shape.hidden_size * layout.bytes_per_value
    stream_bytes /= layout.stream_ranks
    transfer = device.latency_seconds + stream_bytes / device.link_bytes_per_second(layout.num_ranks)
    pipeline = pipeline_seconds(forward, backward, layout.num_micro_batches, transfer, schedule="deepspeed")
    run, trained, outer = (_stage_parameters(layers, shape, layout) for layers in (active, trained, 0 * active))
    # Not kept since the forward pass, a layer's weights are gathered again for the backward pass.
    gathered = run + np.maximum(0, run - outer - layout.kept_whole) if layout.zero_stage == 3 else trained
    # What happens in every micro batch is for the layers that it runs, what happens once for all that were run.
    return StepSeconds(
        pipeline.max(axis=-1),
        _gradient_seconds(run if layout.zero_stage >= 2 else trained, layout, device).max(axis=-1),
        _gather_seconds(gathered, layout, device).max(axis=-1),
        _copy_seconds(run, trained, layout, device).max(axis=-1),
        _optimizer_seconds(trained, layout, device).max(axis=-1),
    )


def tensor_collective_seconds(shape: ModelSection, layout: Layout, device: Device) -> tuple[float, float]:
    """Return the seconds of a layer's collectives over the tensor ranks, in the forward and in the backward pass.

    Of a micro batch. Two all-reduces in each pass, which send the stream twice; with sequence_parallel as many gathers
    and scatters, which send it once, in the backward pass two more gathers, as the inputs of the column linears are not
    kept, and the gradients of two norms, which are small (docs/scaling.md).
    """
    if layout.tensor == 1:
        return 0.0, 0.0
    stream_bytes = layout.micro_batch * shape.seq_length * shape.hidden_size * layout.bytes_per_value
    ring = (layout.tensor - 1) / layout.tensor * stream_bytes / device.link_bytes_per_second(layout.tensor)
    if not layout.sequence_parallel:
        reductions = 4 * ring + 2 * device.latency_seconds
        return reductions, reductions
    of_norms = 4 if shape.normalization == "layernorm" else 2
    return 4 * ring + 4 * device.latency_seconds, 6 * ring + (6 + of_norms) * device.latency_seconds


def _stage_parameters(active: np.ndarray, shape: ModelSection, layout: Layout) -> np.ndarray:
    """Return the parameters of one device of active layers, (paths, stages): those, embedding, head."""
    outer = [outer_parameters(shape, stage, layout.num_stages) for stage in range(layout.num_stages)]
    return (active * layer_parameters(shape) + outer) / layout.tensor


def _gradient_seconds(parameters: np.ndarray, layout: Layout, device: Device) -> np.ndarray:
    """Return the seconds of reducing over the data-parallel ranks; ZeRO 2 and 3 reduce at every micro batch.

    An all-reduce is a reduce-scatter and an all-gather. DeepSpeed reduces at ZeRO 1 and 2 by all-reduces, too
    (use_multi_rank_bucket_allreduce, its default), of which each rank then keeps its part.
    """
    width = layout.summed_bytes if layout.zero_stage else layout.gradient_bytes
    sent = parameters * width * (1 if layout.zero_stage == 3 else 2)
    return _data_parallel_seconds(sent, layout.num_micro_batches if layout.zero_stage >= 2 else 1, layout, device)


def _gather_seconds(parameters: np.ndarray, layout: Layout, device: Device) -> np.ndarray:
    """Return the seconds of ZeRO's gathers of weights: 1 and 2 once after the step, 3 at every micro batch."""
    times = {0: 0, 3: layout.num_micro_batches}.get(layout.zero_stage, 1)
    return _data_parallel_seconds(parameters * layout.bytes_per_value, times, layout, device)


def _data_parallel_seconds(sent: np.ndarray, times: int, layout: Layout, device: Device) -> np.ndarray:
    """Return the seconds of sending so many bytes, but for a rank's own part, so many times to data-parallel ranks."""
    if layout.data == 1:
        return np.zeros_like(sent)
    # Ranks count tensor fastest, then data, then pipeline.
    link = device.link_bytes_per_second(layout.tensor * layout.data)
    return times * (sent * (layout.data - 1) / layout.data / link + device.latency_seconds)


def _copy_seconds(run: np.ndarray, trained: np.ndarray, layout: Layout, device: Device) -> np.ndarray:
    """Return the seconds of copying gradients and weights through ZeRO's flat buffers.

    How often an element is written, in each micro batch that runs its layer and once in a step that trains it, was
    counted in DeepSpeed 0.19.8's ZeRO (tests/dist/test_proportional.py): into a bucket, divided, flattened for the
    reduction, and, for a rank's own part, back and flattened again.
    """
    if layout.data == 1:
        return np.zeros_like(trained)
    own = 1 / layout.data
    each, once = ((0, 3), (0, 3 + 4 * own), (3 + 2 * own, 2 * own), (4 + 2 * own, 3 * own))[layout.zero_stage]
    written = layout.num_micro_batches * each * run + once * trained
    width = layout.gradient_bytes_per_value or layout.bytes_per_value
    return 2 * width * written / device.memory_bytes_per_second


def _optimizer_seconds(parameters: np.ndarray, layout: Layout, device: Device) -> np.ndarray:
    shards = layout.data if layout.zero_stage >= 1 else 1
    return parameters / shards * OPTIMIZER_BYTES / device.memory_bytes_per_second
