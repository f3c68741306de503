"""Plan a run without launching it: python tools/plan.py RUN_FILE --processes N [--set KEY=VALUE ...] [--save 25%]

Prints, as Markdown: parameters; executed FLOPs, predicted time and memory of each phase, and the whole against the
standard run; and warnings where the layout wastes what the paths save, with what would be better. --save proposes a
schedule of four phases with that saving of FLOPs and plans it; --save best chooses one by name, by a law that is fitted
to the runs in experiments/results (docs/results.md), for a standard run of --tokens N. --micro-batches prints, instead
of a plan, the line of the run file that lets short paths use the memory of the full one. Times are for a datacentre GPU
unless --tflops or --measure is given; --measure times a few layers of the run's model on this machine, which takes half
a minute.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import _command_line
import torch
from _command_line import COUNT, above_zero

from raptr_ds.config.load import load_run_config
from raptr_ds.config.path_sections import RandomSection, RaptrSection, ScheduledSection
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import are_prepared, load_tokenizer
from raptr_ds.errors import ConfigError
from raptr_ds.markdown import markdown_table
from raptr_ds.paths.cost import layer_parameters, num_parameters
from raptr_ds.planner.advice import advice
from raptr_ds.planner.law import CONFIDENCE, OBJECTIVES, fit_law
from raptr_ds.planner.local_device import measure_this_machine
from raptr_ds.planner.memory import GIB, GPU_CONTEXT_BYTES
from raptr_ds.planner.peak import run_peak
from raptr_ds.planner.plan import RunPlan, even_schedules, keepable_layers, plan_run, propose_schedule
from raptr_ds.planner.results import RESULTS, read_results
from raptr_ds.planner.setting import proposed_micro_batches, scheduled_lengths, setting_of
from raptr_ds.planner.shortage import gib, shortage
from raptr_ds.planner.step_time import Device, Setting
from raptr_ds.runtime.method import path_method_of
from raptr_ds.runtime.out_of_memory import DeviceMemory

DEFAULT_VOCAB_SIZE = 32_000
DEFAULT_TFLOPS = 400.0
_NAMED_SCHEDULES = ("paper", "half")  # that experiments/results compares


def main() -> None:
    """Parse the command line, plan and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path, help="run file, as for training")
    parser.add_argument("--processes", type=COUNT, default=1, metavar="N", help="processes of the launch (default 1)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for training")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--tflops", type=above_zero, default=DEFAULT_TFLOPS, help="effective TFLOP/s of one device (default 400)"
    )
    speed.add_argument("--measure", action="store_true", help="measure what devices and links reach on this machine")
    parser.add_argument("--network", type=above_zero, default=40.0, help="GB/s of a device to others (default 40)")
    parser.add_argument(
        "--device",
        choices=("gpu", "cpu"),
        default="gpu",
        help="what a layer keeps depends on it (--measure: this one's)",
    )
    parser.add_argument(
        "--device-memory",
        "--memory",
        type=above_zero,
        metavar="GIB",
        help="memory of a device: print whether the run fits",
    )
    parser.add_argument(
        "--micro-batches", action="store_true", help="print raptr_ds.parallel.micro_batches for the run file instead"
    )
    parser.add_argument(
        "--save", metavar="PERCENT", help="propose a schedule that saves so much of the FLOPs: 25%%, or best"
    )
    parser.add_argument(
        "--tokens", metavar="N", help="--save best: tokens of a standard run, such as 20e9 (default: the run file's)"
    )
    arguments = parser.parse_args()
    device = Device(
        flops_per_second=arguments.tflops * 1e12,
        network_bytes_per_second=arguments.network * 1e9,
        is_gpu=arguments.device == "gpu",
    )
    if arguments.tokens is not None and arguments.save != "best":
        raise ConfigError("--tokens goes with --save best.")
    if arguments.micro_batches:
        given = {
            "--save": arguments.save is not None,
            "--device-memory": arguments.device_memory is not None,
            "--measure": arguments.measure,
        }
        if unused := [option for option, is_given in given.items() if is_given]:
            raise ConfigError(
                f"--micro-batches prints one line of the run file and plans nothing: remove {' and '.join(unused)}, or "
                "run the two one after the other."
            )
        print(_micro_batches(arguments))
        return
    config, notes = _load(arguments.run_file, arguments.set, arguments.processes)
    if arguments.measure:
        device = measure_this_machine(config, arguments.processes, device)
    notes.insert(0, _speeds(device, arguments.measure))
    if arguments.save is not None:
        if arguments.save == "best":
            schedule = _best_schedule(arguments, config, device, notes)
        else:
            schedule = _proposal(_fraction(arguments.save), config, device)
        notes.append(f"proposed: raptr_ds.path.schedule={schedule}")
        overrides = [*arguments.set, "raptr_ds.path.method=raptr", f"raptr_ds.path.schedule={schedule}"]
        config, _ = _load(arguments.run_file, overrides, arguments.processes)
    setting = setting_of(config, device)
    print("\n".join(_report(config, setting, plan_run(path_method_of(config), setting), notes)))
    if arguments.device_memory is not None:
        print(f"\n{_what_fits(config, device, arguments.device_memory)}")
    memory = _device_memory(arguments.device_memory) if device.is_gpu else None
    if memory is not None and (lines := shortage(config, memory)):
        print("\n" + "\n".join(lines))
    for line in advice(config, device):
        print(f"\n**Warning.** {line}")


def _device_memory(given: float | None) -> DeviceMemory | None:
    """Return the memory that a rank has: of `given` GiB, or of this machine's GPU, None where there is none."""
    if given is not None:
        return DeviceMemory("the device", int(given * GIB))
    return DeviceMemory.of(torch.device("cuda")) if torch.cuda.is_available() else None


def _load(file: Path, overrides: Sequence[str], processes: int) -> tuple[RunConfig, list[str]]:
    """Return the run with a vocabulary, and where that came from."""
    config = load_run_config(file, overrides, processes)
    if are_prepared(config.data.path):
        return config.with_vocab_size(load_tokenizer(config.data).vocab_size), []
    if config.model.vocab_size:
        return config, []
    note = f"vocabulary: {DEFAULT_VOCAB_SIZE:,} assumed, as the data are not prepared here (raptr_ds.model.vocab_size)"
    return config.with_vocab_size(DEFAULT_VOCAB_SIZE), [note]


def _micro_batches(arguments: argparse.Namespace) -> str:
    """Return the line of the run file with the largest micro batch of each phase.

    Raises: ConfigError where a run may have no such line.
    """
    key = "raptr_ds.parallel.micro_batches"
    config, _ = _load(arguments.run_file, [*arguments.set, f"{key}=null"], arguments.processes)
    ones = [1] * len(scheduled_lengths(config))  # which fit any batch: a run file with them is refused
    try:
        _load(arguments.run_file, [*arguments.set, f"{key}={ones}"], arguments.processes)
    except ConfigError as error:  # where no sizes may be given; nobody wrote the ones
        raise ConfigError(f"--micro-batches: {error}".replace(f"{ones} (from --set)", f"{ones}")) from error
    sizes = list(proposed_micro_batches(config, arguments.device == "gpu"))
    return f"micro_batches: {sizes}  # in raptr_ds.parallel, or --set '{key}={sizes}'"


def _speeds(device: Device, measured: bool) -> str:
    network = f"{device.network_bytes_per_second / 1e9:g} GB/s between machines"
    if not measured:
        return (
            f"predicted at {device.flops_per_second / 1e12:g} effective TFLOP/s a device (--tflops; --measure tries "
            f"this machine) and {network}"
        )
    between = f"{device.machine_bytes_per_second / 1e9:.3g} GB/s between its devices, "
    links = between if device.ranks_per_machine > 1 else ""
    return (
        f"predicted at {device.flops_per_second / 1e12:.3g} effective TFLOP/s a device, its memory at "
        f"{device.memory_bytes_per_second / 1e9:.3g} GB/s, {links}as measured on this machine with "
        f"{device.ranks_per_machine} at work; {network}"
    )


def _best_schedule(arguments: argparse.Namespace, config: RunConfig, device: Device, notes: list[str]) -> str:
    """Return the schedule to choose by the law, and add what is expected of it to the notes."""
    objective = config.model.architecture
    if objective not in OBJECTIVES:
        raise ConfigError(
            f"--save best: there is no law for {objective}: its losses in experiments/results do not follow one "
            "(docs/results.md). Ask for a saving, --save 25%, or see what was measured."
        )
    runs, layers = read_results(objective), config.model.num_layers * layer_parameters(config.model)
    try:
        law = fit_law(runs)
    except ValueError as error:
        raise ConfigError(
            f"--save best: {RESULTS} gives no law ({error}). Use it in a clone of the repository."
        ) from error
    total = config.train.steps * config.batch.global_batch * config.model.seq_length
    tokens = total if arguments.tokens is None else _count(arguments.tokens)
    model, standard, saved_by = law.longest_model, tokens / layers, _saving_of(config, device)
    savings = {name: saved_by(name) for name in _NAMED_SCHEDULES}
    notes.append(
        f"by a law fitted to {len(runs)} mean losses of {len(law.models)} small models (residual {law.residual:.3f}; "
        f"docs/results.md); numbers are for {model.replace(' x ', ' of width ')}. Here the layers have "
        f"{layers / 1e6:,.4g}M parameters, and a standard run of {tokens:.4g} tokens sees {standard:,.3g} for each"
    )
    notes.append(
        "schedules are compared for a model of this depth. In short runs models of fewer layers reached a lower loss "
        "for the same FLOPs than twelve layers by any schedule (docs/results.md, Shallower models)"
    )
    if layers > law.largest:
        notes.append(
            f"**extrapolated**: the largest model measured has {law.largest / 1e6:,.2g}M parameters in its layers, "
            f"this one {layers / law.largest:,.3g} times as many. Whether the law holds there is not known"
        )
    if standard > law.longest:
        notes.append(
            f"**extrapolated**: the longest standard run measured saw {law.longest:,.3g} tokens for each parameter, "
            "and intervals take the law for true beyond. It expected too much of longer runs before (docs/results.md)"
        )
    if standard < law.shortest:
        notes.append(
            f"**extrapolated**: the shortest standard run measured saw {law.shortest:,.2g} tokens for each parameter"
        )
    for name, saving in savings.items():
        notes.append(
            f"{name} saves {saving:.1%}; RaPTr's held-out loss less the standard one, {CONFIDENCE:.0%}: "
            f"{law.at_equal_flops(model, standard, saving)} at equal FLOPs, where RaPTr sees "
            f"{tokens / (1 - saving):.4g} tokens, {law.at_equal_tokens(model, standard, saving)} at equal tokens"
        )
    best = law.best_saving(model, standard, savings.values())
    if best is None:
        notes.append(
            f"neither is better than standard training with {CONFIDENCE:.0%} confidence; proposing the paper's "
            "schedule because of the paper's own results"
        )
        return "paper"
    return next(name for name, saving in savings.items() if saving == best)


def _count(text: str) -> float:
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise ConfigError(f"--tokens {text!r} is not a number of tokens above 0. Write --tokens 20e9.")
    return value


def _as_raptr(config: RunConfig) -> RaptrSection:
    """Return RaPTr's section with what the run's path has of it."""
    shared = (RaptrSection.model_fields.keys() & type(config.path).model_fields.keys()) - {"method"}
    return RaptrSection(**{key: getattr(config.path, key) for key in shared})


def _saving_of(config: RunConfig, device: Device) -> Callable[[str], float]:
    """Return what RaPTr saves of a run's FLOPs by a schedule."""
    setting, layers, raptr = setting_of(config, device), config.model.num_layers, _as_raptr(config)
    raptr.model_copy(update={"schedule": "-".join([str(layers)] * 4)}).checked(config.sizes)  # a split of four phases

    def saving_of(schedule: str) -> float:
        path = raptr.model_copy(update={"schedule": schedule}).checked(config.sizes)
        method = path_method_of(config, path)
        executed = setting.steps.flops_left(method, 0, setting.num_predicted)
        return 1 - executed / (method.num_steps * setting.flops(layers))

    return saving_of


def _proposal(saving: float, config: RunConfig, device: Device) -> str:
    layers, saving_of = config.model.num_layers, _saving_of(config, device)

    def saved_by(lengths: tuple[int, ...]) -> float:
        return saving_of("-".join(map(str, lengths)))

    least = max(1, len(_as_raptr(config).fixed_in(layers)))
    lengths = propose_schedule(layers, least, saving, saved_by)
    if lengths is None:
        most, half = max(map(saved_by, even_schedules(layers, least))), saving_of("half")
        remedies = ["ask for less", "fix fewer layers", "shorten the full-model warm-up"]
        remedies += [f"set raptr_ds.path.schedule=half, which saves {half:.1%}"] if half > most else []
        raise ConfigError(
            f"--save {saving:.1%}: four evenly growing phases that end at {layers} layers save at most "
            f"{max(most, 0):.1%} of the FLOPs here. To go on, {', '.join(remedies[:-1])}, or {remedies[-1]}."
        )
    return "-".join(map(str, lengths))


def _what_fits(config: RunConfig, device: Device, memory_gib: float) -> str:
    """Return with how much recomputation the run fits."""
    method, parallel = path_method_of(config), config.parallel
    if parallel.micro_batches:  # which exclude recomputation
        peak = run_peak(method, setting_of(config, device)).memory.total
        return f"- {memory_gib:g} GiB {'hold' if peak <= memory_gib * GIB else 'do not hold'} the run's micro_batches"
    parallel = parallel.model_copy(update={"activation_checkpointing": True})
    setting = setting_of(replace(config, parallel=parallel), device)
    count, deepest = keepable_layers(method, setting, memory_gib * GIB), max(setting.layout.stage_layers)
    if count is None:
        least = run_peak(method, replace(setting, keep_up_to=0)).memory.total
        return f"- {memory_gib:g} GiB do not hold the run: it needs {gib(least)} even with all layers recomputed"
    if count == deepest:
        return f"- {memory_gib:g} GiB hold the full path without recomputation"
    return (
        f"- {memory_gib:g} GiB hold {count} active layers of a pipeline stage without recomputation, of {deepest}: "
        f"raptr_ds.parallel.activation_checkpointing=true keep_activations_up_to={count}"
    )


def _fraction(text: str) -> float:
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise ConfigError(
            f"--save {text!r} is not a share of the FLOPs between 0 and 1. Write --save 25%, --save 0.25 "
            "or --save best."
        )
    return value


def _report(config: RunConfig, setting: Setting, plan: RunPlan, notes: list[str]) -> list[str]:
    layout, path = setting.layout, config.path
    schedule = f" {path.schedule}" if isinstance(path, ScheduledSection) else ""
    if isinstance(path, RaptrSection) and path.width_schedule:
        schedule += f" by {path.width_schedule} of {config.model.num_attention_heads} heads"
    sampling = f", {path.sampling} sampling" if isinstance(path, RandomSection) else ""
    over = f" over {path.balance_stages} stages" if isinstance(path, RandomSection) and path.balance_stages else ""
    lines = [
        f"- {config.model.architecture}, {config.model.num_layers} layers x {config.model.hidden_size}: "
        f"{num_parameters(setting.shape) / 1e6:,.1f}M parameters, vocabulary {config.model.vocab_size:,}, "
        f"{config.precision}",
        f"- {layout.num_ranks} processes: tensor {layout.tensor} x pipeline {layout.num_stages} "
        f"{list(layout.stage_layers)} x data {layout.data}, ZeRO {layout.zero_stage}; micro batches of "
        f"{layout.micro_batch}, {layout.num_micro_batches} a step; "
        f"recomputation {'on' if layout.recompute else 'off'}",
        f"- paths: {path.method}{schedule}{sampling}{over}",
        *(f"- {note}" for note in notes),
        *_kept_whole(setting),
    ]
    rows = [
        [
            phase.phase.index,
            f"{phase.phase.num_steps:,}",
            f"{phase.path_length:.4g}" + (f" x {phase.width:.0%}" if phase.width < 1 else ""),
            *(f"{value:.4g}" for value in (phase.step_flops / 1e15, phase.step_seconds)),
            f"{plan.full_step_seconds / phase.step_seconds:.2f}",
            f"{plan.full_step_flops / phase.step_flops:.2f}",
            f"{phase.phase.num_steps * phase.step_seconds / 3600:,.4g}",
        ]
        for phase in plan.phases
    ]
    head = ["phase", "steps", "path length", "PFLOP a step", "seconds a step", "speed-up", "by FLOPs", "hours"]
    lines += ["", *markdown_table(head, rows)]
    standard = plan.num_steps * plan.full_step_seconds / 3600
    lines += [
        "",
        f"- FLOPs: {plan.flops:.4g} executed, {plan.flops_saved:.1%} less than the standard run's",
        f"- time: {plan.seconds / 3600:,.4g} h, {plan.seconds_saved:.1%} less than the standard run's "
        f"{standard:,.4g} h",
        "",
        f"Memory of the fullest rank at its peak, GiB, on a {'GPU' if setting.device.is_gpu else 'CPU'}"
        f"{_counted_as(setting)}:",
        "",
    ]
    parts = ["weights", "gradients", "optimizer", "activations", "total"]
    rows = [
        [
            phase.phase.index,
            phase.layout.micro_batch,
            "yes" if phase.layout.recompute else "no",
            phase.peak.stage,
            *(f"{getattr(phase.memory, part) / GIB:.2f}" for part in parts),
        ]
        for phase in plan.phases
    ]
    return [*lines, *markdown_table(["phase", "micro batch", "recomputed", "pipeline stage", *parts], rows)]


def _counted_as(setting: Setting) -> str:
    """Return what the memory of a GPU is counted with."""
    if not setting.device.is_gpu:
        return ""
    layers = "compiled" if setting.layout.compiled else "not compiled"
    return (
        f" (attention in one kernel, layers {layers}; the total has {GPU_CONTEXT_BYTES / GIB:.1f} GiB for context and "
        "workspaces, an estimate)"
    )


def _kept_whole(setting: Setting) -> list[str]:
    """Return the line on weights that ZeRO 3 keeps whole, if there are any."""
    layout = setting.layout
    if layout.zero_stage < 3 or layout.data == 1:
        return []
    kept = min(layout.kept_whole, num_parameters(setting.shape) / layout.tensor)
    return [
        f"- ZeRO 3 keeps up to {kept / 1e6:,.4g}M parameters whole between a micro batch's forward and backward pass, "
        f"{gib(kept * layout.bytes_per_value)}, and gathers only others twice; "
        "zero_optimization.stage3_max_live_parameters and stage3_max_reuse_distance, both, set how many"
    ]


if __name__ == "__main__":
    _command_line.run(main)
