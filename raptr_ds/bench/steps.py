"""Step times: a model at several path lengths beside the same model in other stacks, in turns where memory allows."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from raptr_ds.bench.others import HuggingFaceStack, MegatronLayersStack
from raptr_ds.bench.ours import OurEntrant
from raptr_ds.bench.samples import Entrant, Measured, Step, measure_memory, time_step
from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import StepBatch
from raptr_ds.data.loader import Loader
from raptr_ds.errors import ConfigError
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.cost import num_parameters
from raptr_ds.planner.peak import Peak
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.shortage import gib
from raptr_ds.planner.step_time import Device
from raptr_ds.rng import stream
from raptr_ds.runtime.out_of_memory import DeviceMemory, is_out_of_memory

WARMUP_ROUNDS = 2
MEMORY_ROUNDS = 3


@dataclass(frozen=True)
class Options:
    """How to measure.

    clock: `wall`, or `cpu`, the process's own CPU time, which a busy machine disturbs less, and which excludes waiting
    for other ranks. one_at_a_time: build, measure and free each entrant before the next, even if all fit in memory.
    compile_others: Hugging Face's model by torch.compile.
    """

    repetitions: int
    clock: str = "wall"
    one_at_a_time: bool = False
    compile_others: bool = False


@dataclass(frozen=True)
class StepBenchmark:
    """What was measured. paths: our rows, the full path first; others: other stacks' rows; absent: why some have none.

    has_loader: whether the batches came from prepared data, so that waiting for them was measured. why_apart: why the
    entrants were measured one after another; None where all took turns. planned_bytes: the peak of our full path by the
    memory plan, if a GPU's was measured with nothing else in its memory.
    """

    num_parameters: int
    num_predictions: int
    paths: list[Measured]
    others: list[Measured]
    absent: dict[str, str]
    options: Options
    has_loader: bool
    why_apart: str | None = None
    planned_bytes: float | None = None


def measure_steps(
    config: RunConfig, groups: ProcessGroups, batch: StepBatch, options: Options, loader: Loader | None = None
) -> StepBenchmark:
    """Measure the full path, 3/4 and 1/2 of it, and in one process other stacks: one step of each in every round.

    The order is random, so that other load on the machine, and what a row leaves behind in caches, affects all equally.
    The first rounds are not counted. Memory is measured in separate rounds at the end, as measuring it slows a step
    down: from a known start, it requests every page from the system again (up to a tenth of its time on a CPU). If
    three models do not fit in the device's memory, by the plan or when tried, they are measured one after another; the
    rows of one that does not fit even then have a message instead of samples.
    All ranks call it. config: with the vocabulary's size. loader: asked for each step's batch, as in training.
    """
    entrants = _entrants(config, groups, batch, loader, options.compile_others)
    device, absent = DeviceMemory.of(groups.device), {}
    is_alone = len(entrants) == 1
    why_apart = "as asked for" if options.one_at_a_time else _do_not_fit(config, device, is_alone)
    if why_apart is None and not _in_turns(entrants, groups, options, absent):
        why_apart = "side by side they ran out of memory"
    if why_apart is not None:
        for entrant in entrants:
            if not _in_turns([entrant], groups, options, absent):
                needed = _needed_bytes(config, entrant.name, device is not None)
                for row in entrant.rows:
                    row.out_of_memory = _out_of_memory(needed, device)
    ours, *others = entrants
    has_own_peak = device is not None and (is_alone or why_apart is not None)
    need = _full_path(config, has_own_peak, groups.pipeline_rank).memory
    return StepBenchmark(
        num_parameters=num_parameters(config.model),
        num_predictions=batch.num_predictions,
        paths=ours.rows,
        others=[row for other in others if other.name not in absent for row in other.rows],
        absent=absent,
        options=options,
        has_loader=loader is not None,
        why_apart=None if is_alone else why_apart,
        planned_bytes=need.total - need.context if has_own_peak else None,
    )


def _entrants(
    config: RunConfig, groups: ProcessGroups, batch: StepBatch, loader: Loader | None, compile_others: bool
) -> list[Entrant]:
    """Return ours first, and in one process the others with the same weights; nothing is built yet."""
    ours = OurEntrant(config, groups, _layout_name(groups), batch, loader)
    if groups.topology.world_size > 1:
        return [ours]
    weights = ours.initial_weights
    hugging_face = HuggingFaceStack(config, batch, weights, compile_others)
    return [ours, hugging_face, MegatronLayersStack(config, batch, weights, groups)]


def _in_turns(entrants: list[Entrant], groups: ProcessGroups, options: Options, absent: dict[str, str]) -> bool:
    """Build the entrants, measure them in turns and free them; return whether the memory was enough.

    Entrants that cannot be built are added to `absent`. Of several processes, one that runs out of memory raises.
    """
    fits = False
    try:
        built = []
        for entrant in entrants:
            try:
                entrant.build()
                built.append(entrant)
            except ConfigError as error:
                if isinstance(entrant, OurEntrant):
                    raise
                absent[entrant.name] = str(error)
        _measure(built, groups, options)
        fits = True
    except RuntimeError as error:
        if not is_out_of_memory(error) or groups.topology.world_size > 1:
            raise
        for row in (row for entrant in entrants for row in entrant.rows):
            row.forget()
    # After the except block: the error's frames refer to what is to be freed.
    for entrant in entrants:
        entrant.close()
    torch._dynamo.reset()  # compiled code refers to what it was compiled for
    gc.collect()
    if groups.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _measure(entrants: list[Entrant], groups: ProcessGroups, options: Options) -> None:
    for number in range(WARMUP_ROUNDS + options.repetitions):
        for entrant in entrants:
            entrant.begin_round(is_first_to_count=number == WARMUP_ROUNDS)
        for measured, step in _round(number, entrants):
            time_step(measured, groups, number >= WARMUP_ROUNDS, options.clock, step)
    for entrant in entrants:
        entrant.end_of_timing()
    for number in range(MEMORY_ROUNDS):
        for measured, step in _round(number, entrants):
            measure_memory(measured, groups.device, step)


def _round(number: int, entrants: list[Entrant]) -> Iterator[tuple[Measured, Step]]:
    """Yield the steps of a round, each with its row, in random order."""
    turns = [entrant for entrant in [*entrants[1:], *entrants[:1]] for _ in entrant.rows]
    for chosen in stream(0, "bench turns", number).permutation(len(turns)):
        yield turns[chosen].next_step()


def _layout_name(groups: ProcessGroups) -> str:
    """Return a layout in short: TP2, PP2, TP2 PP2, one process."""
    topology = groups.topology
    parts = {"TP": topology.tensor, "PP": topology.pipeline, "DP": topology.data}
    return " ".join(f"{name}{size}" for name, size in parts.items() if size > 1) or "one process"


def _do_not_fit(config: RunConfig, device: DeviceMemory | None, is_alone: bool) -> str | None:
    """Return why three models do not fit in a device's memory together by the plan; None where they do.

    They need three times what stays between steps, and once what a step needs, of the one that needs most.
    """
    if device is None or is_alone:
        return None
    memory = _full_path(config, on_gpu=True).memory
    stays = memory.weights + memory.gradients + memory.optimizer
    needed = 2 * stays + _needed_bytes(config, HuggingFaceStack.name, on_gpu=True)
    if needed <= device.total:
        return None
    return f"side by side they need about {gib(needed)} of {gib(device.total)}"


def _needed_bytes(config: RunConfig, name: str, on_gpu: bool) -> float:
    """Return about what an entrant needs: ours by the plan, another by the plan without compiled layers.

    Hugging Face computes the logits of all positions, and from them in fp32 the loss and its gradient.
    """
    need = _full_path(config, on_gpu)
    if name == OurEntrant.name:
        return need.memory.total
    plain = replace(need.setting, layout=replace(need.setting.layout, compiled=False))
    total = replace(need, setting=plain).memory.total
    if not name.startswith(HuggingFaceStack.name):
        return total
    shape, layout = plain.shape, plain.layout
    return total + layout.micro_batch * shape.seq_length * shape.vocab_size * (layout.bytes_per_value + 2 * 4)


def _out_of_memory(needed_bytes: float, device: DeviceMemory | None) -> str:
    there = "" if device is None else f" of {gib(device.total)}"
    return f"out of memory: needs about {gib(needed_bytes)}{there}"


def _full_path(config: RunConfig, on_gpu: bool, stage: int = 0) -> Peak:
    """Return what a rank holds along the full path."""
    setting = setting_of(config, Device(is_gpu=on_gpu))
    return Peak.along(setting, stage, setting.layout.stage_layers[stage])
