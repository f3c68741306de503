"""What a run needs of a device's memory by the plan: a warning where that is more than it has, and what would help.

python -m raptr_ds.planner.shortage --stage S --processes N [--gpu NAME TOTAL ALLOCATED RESERVED] < resolved run file

prints the explanation for a rank that has run out of memory (raptr_ds/runtime/out_of_memory.py starts it).
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from raptr_ds.config.elastic import largest_fitting
from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.planner.memory import GIB, RankMemory, logits_bytes
from raptr_ds.planner.peak import Peak, run_peak
from raptr_ds.planner.setting import reduce_buffers_of, setting_of
from raptr_ds.planner.step_time import Device, Setting
from raptr_ds.runtime.method import path_method_of
from raptr_ds.runtime.out_of_memory import DeviceMemory

_FRAGMENTED = 0.05  # of the device's memory, reserved by torch but unused: from there on it is mentioned


@dataclass(frozen=True)
class MemoryNeed:
    """What the fullest rank of some pipeline stages holds at the run's peak, and what would lower it.

    setting: the run's own, whatever changes from phase to phase left out.
    """

    config: RunConfig
    setting: Setting
    stages: tuple[int, ...]
    peak: Peak

    @classmethod
    def of(cls, config: RunConfig, stage: int, on_gpu: bool) -> "MemoryNeed":
        """Return the need of one pipeline stage of a run whose vocabulary's size is known."""
        return cls._of(config, (stage,), on_gpu)

    @classmethod
    def fullest(cls, config: RunConfig) -> "MemoryNeed":
        """Return the need of the pipeline stage that needs most of a GPU."""
        return cls._of(config, tuple(range(config.parallel.pipeline_model_parallel_size)), on_gpu=True)

    @classmethod
    def _of(cls, config: RunConfig, stages: tuple[int, ...], on_gpu: bool) -> "MemoryNeed":
        setting = setting_of(config, Device(is_gpu=on_gpu))
        return cls(config, setting, stages, run_peak(path_method_of(config), setting, stages))

    @property
    def memory(self) -> RankMemory:
        """The bytes, by kind."""
        return self.peak.memory

    def parts(self) -> list[str]:
        """Return what is held, the largest first."""
        peak, memory, layout = self.peak, self.memory, self.peak.setting.layout
        what = f"activations of {peak.num_active} layers and {layout.micro_batch} sequences"
        if peak.stage == layout.num_stages - 1:
            what += f", of them logits {gib(logits_bytes(peak.setting))}"
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer state": memory.optimizer,
            what: memory.activations,
            "context and workspaces (an estimate)": memory.context,
        }
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        return [f"{gib(size)} {name}" for name, size in ordered if size]

    def remedies(self) -> list[str]:
        """Return the settings that would lower the peak, each with by how much, the best first."""
        now, method = self.memory.total, path_method_of(self.config)
        saved = [
            (now - run_peak(method, setting, self.stages).memory.total, text) for text, setting in self._alternatives()
        ]
        return [f"{text}: {gib(size)} less" for size, text in sorted(saved, reverse=True) if size > 0]

    def _alternatives(self) -> Iterator[tuple[str, Setting]]:
        layout, model = self.setting.layout, self.config.model

        def changed(**values: int | bool) -> Setting:
            other = replace(layout, **values)  # type: ignore[arg-type]
            buffers = reduce_buffers_of(self.config, self.setting.device.is_gpu, other.zero_stage, other.data)
            compiled = layout.compiled and other.zero_stage <= 2  # both as the run would derive them
            return replace(self.setting, layout=replace(other, compiled=compiled, reduce_buffers=buffers))

        yield from self._smaller_micro_batches()
        if not layout.recompute and not self.config.parallel.micro_batches:  # the two exclude each other
            yield "raptr_ds.parallel.activation_checkpointing=true (a third more work)", changed(recompute=True)
        if self.setting.keep_up_to:
            text = "raptr_ds.parallel.keep_activations_up_to=0 (a third more work on short paths)"
            yield text, replace(self.setting, keep_up_to=0)
        highest = 1 if layout.num_stages > 1 else 3
        for zero_stage in range(max(1, layout.zero_stage + 1), highest + 1):
            if layout.data > 1:
                text = f"zero_optimization.stage={zero_stage} over the {layout.data} data-parallel ranks"
                yield text, changed(zero_stage=zero_stage)
            else:
                text = f"twice the processes, with zero_optimization.stage={zero_stage} over 2 data-parallel ranks"
                yield text, changed(zero_stage=zero_stage, data=2)
        sizes = range(2 * layout.tensor, model.num_attention_heads + 1, layout.tensor)
        for tensor in sizes:
            if model.num_attention_heads % tensor == 0 and model.ffn_hidden_size % tensor == 0:
                times = tensor // layout.tensor
                text = f"raptr_ds.parallel.tensor_model_parallel_size={tensor} on {times} times the processes"
                yield text, changed(tensor=tensor)
                break

    def _smaller_micro_batches(self) -> Iterator[tuple[str, Setting]]:
        """Yield the setting with micro batches of half the size, where they can be halved."""
        setting, layout, own = self.setting, self.setting.layout, self.config.parallel.micro_batches
        sizes = {
            size: largest_fitting(max(1, size // 2), layout.sequences_per_rank, self.config.path.paths_per_step)
            for size in (layout.micro_batch, *setting.micro_batches)
        }
        half, halves = sizes[layout.micro_batch], tuple(sizes[size] for size in setting.micro_batches)
        texts = [f"train_micro_batch_size_per_gpu={half}"] if len(own) < len(halves) else []
        texts += [f"raptr_ds.parallel.micro_batches={[sizes[size] for size in own]}"] if own else []
        smaller = replace(layout, micro_batch=half, num_micro_batches=layout.sequences_per_rank // half)
        if halves != setting.micro_batches:
            yield " and ".join(texts), replace(setting, layout=smaller, micro_batches=halves)


def shortage(config: RunConfig, device: DeviceMemory) -> list[str]:
    """Return a warning if the plan of the run's fullest rank needs more memory than a GPU has; else nothing."""
    need = MemoryNeed.fullest(config)
    if need.memory.total <= device.total:
        return []
    return [
        f"**Warning.** By the plan the fullest rank needs about {gib(need.memory.total)} of memory, and {device.name} "
        f"has {gib(device.total)} ({'; '.join(need.parts())}). What would help:",
        *(f"- {line}" for line in need.remedies()),
    ]


def explanation(config: RunConfig, stage: int, device: DeviceMemory | None) -> list[str]:
    """Return what a device that ran out of memory needed by the plan, and what would help."""
    need = MemoryNeed.of(config, stage, on_gpu=device is not None)
    there = "" if device is None else f" of {gib(device.total)} ({device.name})"
    lines = [
        f"By the plan this rank needs about {gib(need.memory.total)}{there}: {'; '.join(need.parts())}.",
        "What would help, by the same plan:",
        *(f"  {line}" for line in need.remedies()),
    ]
    if device is not None and (unused := device.reserved - device.allocated) > _FRAGMENTED * device.total:
        lines.append(
            f"  the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True: torch held {gib(unused)} that "
            "no tensor used"
        )
    return lines


def gib(size: float) -> str:
    """Return a size in bytes for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def main() -> None:
    """Print the explanation for the run file on standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, required=True, help="pipeline stage of the rank")
    parser.add_argument("--processes", type=int, required=True, help="processes of the run")
    parser.add_argument(
        "--gpu",
        nargs=4,
        metavar=("NAME", "TOTAL", "ALLOCATED", "RESERVED"),
        help="the device and its memory in bytes; left out: a CPU",
    )
    arguments = parser.parse_args()
    device = None
    if arguments.gpu is not None:
        name, *sizes = arguments.gpu
        device = DeviceMemory(name, *map(int, sizes))
    print("\n".join(explanation(run_on_standard_input(arguments.processes), arguments.stage, device)))


def run_on_standard_input(processes: int) -> RunConfig:
    """Return the run whose resolved run file the trainer writes to this process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(sys.stdin.read(), encoding="utf-8")
        return load_run_config(file, world_size=processes)


if __name__ == "__main__":
    main()
