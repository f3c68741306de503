"""A device with too little memory: what is printed before and after, in figures that hold; the host with too little."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raptr_ds.config.load import load_run_config
from raptr_ds.errors import DeviceMemoryError
from raptr_ds.parallel.groups import lone_process_groups
from raptr_ds.planner.shortage import MemoryNeed, explanation, shortage
from raptr_ds.runtime import planner_process
from raptr_ds.runtime.out_of_memory import DeviceMemory, is_out_of_memory, memory_errors_explained, planned_need

GIB = 1 << 30
RUN_FILE = Path(__file__).parents[3] / "deepspeed_configs" / "ul2_1b_raptr.json"
TENSOR = "raptr_ds.parallel.tensor_model_parallel_size"
PIPELINE = "raptr_ds.parallel.pipeline_model_parallel_size"


def run(*overrides: str, processes: int = 1):
    return load_run_config(RUN_FILE, ["raptr_ds.model.vocab_size=32000", *overrides], processes)


def saved_by(lines: list[str]) -> dict[str, float]:
    """Return the GiB that each line promises, by its setting."""
    found = [re.fullmatch(r"(.*): ([\d.]+) GiB less", line) for line in lines]
    return {match[1]: float(match[2]) for match in found if match is not None}


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, []),
        (4, []),
        (4, ["zero_optimization.stage=0", f"{TENSOR}=2"]),
        (8, [f"{PIPELINE}=4", "raptr_ds.parallel.activation_checkpointing=true"]),
    ],
)
def test_what_would_help_saves_what_it_says(processes, overrides, on_gpu):
    """Each setting is tried: the plan of the run with it is smaller by the number given."""
    now = MemoryNeed.of(run(*overrides, processes=processes), 0, on_gpu)
    promised = saved_by(now.remedies())
    assert len(promised) == len(now.remedies()) >= 2
    assert list(promised.values()) == sorted(promised.values(), reverse=True)
    for text, saved in promised.items():
        setting = re.search(r"[a-z_.]+=\w+", text)
        assert setting is not None
        ranks = re.search(r"on (\d+) times the processes", text)
        times = 2 if "twice the processes" in text else int(ranks[1]) if ranks else 1
        changed = run(*overrides, setting[0], processes=processes * times)
        after = MemoryNeed.of(changed, 0, on_gpu)
        assert (now.memory.total - after.memory.total) / GIB == pytest.approx(saved, abs=0.006), text


def test_a_device_that_is_too_small_is_named_with_what_would_help():
    need = MemoryNeed.of(run(), 0, on_gpu=True)
    assert shortage(run(), DeviceMemory("large", int(need.memory.total) + 1)) == []
    first, *remedies = shortage(run(), DeviceMemory("A small GPU", 10 * GIB))
    for part in (f"{need.memory.total / GIB:.2f} GiB", "A small GPU", "10.00 GiB", "17.91 GiB optimizer state"):
        assert part in first
    assert any("activation_checkpointing=true" in line for line in remedies)


def test_of_a_pipeline_the_fullest_rank_counts():
    layers = "raptr_ds.parallel.pipeline_layers=[4,20]"
    last = MemoryNeed.of(run(f"{PIPELINE}=2", layers, processes=2), 1, on_gpu=True)
    assert last.memory.total > 1.5 * MemoryNeed.of(last.config, 0, on_gpu=True).memory.total
    assert shortage(last.config, DeviceMemory("A GPU", int(last.memory.total) + 1)) == []
    assert (
        f"{last.memory.total / GIB:.2f} GiB"
        in shortage(last.config, DeviceMemory("A GPU", int(last.memory.total) - 1))[0]
    )


def test_the_parts_are_in_order_and_all_there():
    need = MemoryNeed.of(run(), 0, on_gpu=True)
    sizes = [float(part.split()[0]) for part in need.parts()]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == pytest.approx(need.memory.total / GIB, abs=0.03)
    assert any("24 layers and 8 sequences, of them logits" in part for part in need.parts())
    assert not any("logits" in part for part in MemoryNeed.of(run(f"{PIPELINE}=2", processes=2), 0, True).parts())


def test_memory_in_pieces_is_named_where_there_is_much_of_it():
    whole = DeviceMemory("A GPU", 80 * GIB, allocated=77 * GIB, reserved=79 * GIB)
    pieces = DeviceMemory("A GPU", 80 * GIB, allocated=60 * GIB, reserved=79 * GIB)
    assert "expandable_segments" not in "\n".join(explanation(run(), 0, whole))
    assert "expandable_segments:True: torch held 19.00 GiB that no tensor used" in "\n".join(
        explanation(run(), 0, pieces)
    )


@pytest.mark.parametrize("device", [None, DeviceMemory("A GPU", 80 * GIB, allocated=60 * GIB, reserved=79 * GIB)])
def test_the_trainer_asks_the_planner_as_a_program_of_its_own(device):
    config = run(f"{PIPELINE}=2", "raptr_ds.path.schedule=6-12-24", processes=4)
    assert planned_need(config, 1, 4, device) == explanation(config, 1, device)


def test_where_the_planner_fails_the_message_says_how_to_run_it(monkeypatch):
    monkeypatch.setattr(planner_process, "_SECONDS", 0.001)
    (line,) = planned_need(run(processes=4), 0, 4, None)
    assert "python tools/plan.py RUN_FILE --processes 4" in line


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_which_errors_are_a_devices_want_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


def take_too_much_host_memory() -> None:
    with lone_process_groups() as groups:
        on_gpu = replace(groups, rank=3, device=torch.device("cuda", 3))
        with memory_errors_explained(run(processes=4), on_gpu, lambda: 0):
            torch.empty(1 << 58)


def test_want_of_host_memory_is_no_matter_of_the_gpus_plan():
    with pytest.raises(DeviceMemoryError) as caught:
        take_too_much_host_memory()
    assert caught.value.exit_code == 2
    first, fix = str(caught.value).splitlines()
    assert first.startswith("rank 3's machine, not its GPU, ran out of memory before the end of the first step")
    assert "1152921504606846976 bytes" in first
    assert fix == "Give the job more memory (Slurm: --mem), or start fewer processes on a machine."
