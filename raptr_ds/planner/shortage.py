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

from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.planner.memory import RankMemory, logits_bytes, rank_memory
from raptr_ds.planner.setting import reduce_buffers_of, setting_of
from raptr_ds.planner.step_time import Device, Setting
from raptr_ds.runtime.method import path_method_of
from raptr_ds.runtime.out_of_memory import DeviceMemory

_GIB = 1 << 30
_FRAGMENTED = 0.05  # of the device's memory, reserved by torch but unused: from there on it is mentioned


@dataclass(frozen=True)
class MemoryNeed:
    """What a rank of one pipeline stage holds at the peak of the run's longest paths, and what would lower it."""

    config: RunConfig
    setting: Setting
    stage: int
    num_active: int

    @classmethod
    def of(cls, config: RunConfig, stage: int, on_gpu: bool, longest: int | None = None) -> "MemoryNeed":
        """Return the need of a run whose vocabulary's size is known; longest: layers of the path, if not the run's."""
        setting = setting_of(config, Device(is_gpu=on_gpu))
        layout = setting.layout
        if longest is None:
            phases = path_method_of(config).phases.phases
            longest = max(phase.path_length or config.model.num_layers for phase in phases)
        num_active = min(longest, layout.stage_layers[stage])
        recompute = layout.recompute and num_active > setting.keep_up_to
        setting = replace(setting, layout=replace(layout, recompute=recompute))
        return cls(config, setting, stage, num_active)

    @classmethod
    def fullest(cls, config: RunConfig) -> "MemoryNeed":
        """Return the need of the pipeline stage that needs most of a GPU."""
        stages = range(config.parallel.pipeline_model_parallel_size)
        return max((cls.of(config, stage, on_gpu=True) for stage in stages), key=lambda need: need.memory.total)

    @property
    def memory(self) -> RankMemory:
        """The bytes, by kind."""
        return rank_memory(self.setting, self.stage, self.num_active)

    def parts(self) -> list[str]:
        """Return what is held, the largest first."""
        memory, layout = self.memory, self.setting.layout
        what = f"activations of {self.num_active} layers and {layout.micro_batch} sequences"
        if self.stage == layout.num_stages - 1:
            what += f", of them logits {gib(logits_bytes(self.setting))}"
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
        now = self.memory.total
        saved = [(now - replace(self, setting=setting).memory.total, text) for text, setting in self._alternatives()]
        return [f"{text}: {gib(size)} less" for size, text in sorted(saved, reverse=True) if size > 0]

    def _alternatives(self) -> Iterator[tuple[str, Setting]]:
        layout, model = self.setting.layout, self.config.model

        def changed(**values: int | bool) -> Setting:
            other = replace(layout, **values)  # type: ignore[arg-type]
            buffers = reduce_buffers_of(self.config, self.setting.device.is_gpu, other.zero_stage, other.data)
            compiled = layout.compiled and other.zero_stage <= 2  # both as the run would derive them
            return replace(self.setting, layout=replace(other, compiled=compiled, reduce_buffers=buffers))

        if layout.micro_batch > 1:
            half, twice = layout.micro_batch // 2, 2 * layout.num_micro_batches
            yield (
                f"train_micro_batch_size_per_gpu={half}",
                changed(micro_batch=half, num_micro_batches=twice),
            )
        if not layout.recompute:
            yield "raptr_ds.parallel.activation_checkpointing=true (a third more work)", changed(recompute=True)
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
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"


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
