"""The cost model's Device from this machine: what is measured becomes speeds, which a plan uses."""

import subprocess
import sys
from pathlib import Path

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths.cost import layer_parameters, step_flops
from raptr_ds.planner.measure import DeviceProbe
from raptr_ds.planner.step_time import Device
from tests.dist.workers import run_distributed

REPOSITORY = Path(__file__).parents[3]
RUN_FILE = REPOSITORY / "deepspeed_configs" / "bert_quickstart.json"
SMALL = ["train_batch_size=4", "train_micro_batch_size_per_gpu=2", "raptr_ds.model.num_layers=6"]
SMALL += ["raptr_ds.model.hidden_size=32", "raptr_ds.model.seq_length=16"]


ALONE = {"training": 0.5, "optimizer": 0.25}
TOGETHER = {**ALONE, "small message": 0.001, "large message": 0.011}


def measured_with(launch: Launch, seconds: dict[str, float], *overrides: str) -> Device:
    """Return the Device that follows from times of each piece."""
    config = load_run_config(RUN_FILE, [*SMALL, *overrides], launch.world_size).with_vocab_size(90)
    probe = DeviceProbe(config, initialize_process_groups(launch, 1, 1))
    probe.sample()
    assert probe.times.keys() == seconds.keys()
    assert all(samples[0] > 0 for samples in probe.times.values())
    probe.times = {name: [0.5 * value, value, 9 * value] for name, value in seconds.items()}  # the median counts
    return probe.device(Device())


def test_speeds_follow_from_the_times() -> None:
    shape = load_run_config(RUN_FILE, SMALL, 1).with_vocab_size(90).model
    device = run_distributed(measured_with, 1, ALONE)[0]
    # Four of the six layers and the head, on one micro batch of two sequences with 2 predictions each (15% of 16).
    assert device.flops_per_second == pytest.approx(step_flops(shape, 4, 2, 4) / 0.5)
    assert device.memory_bytes_per_second == pytest.approx(30 * 4 * layer_parameters(shape) / 0.25)
    assert device.ranks_per_machine == 1
    assert (device.machine_bytes_per_second, device.latency_seconds) == (300e9, 10e-6)  # nobody to send to


def test_links_are_measured_by_what_the_layout_sends() -> None:
    shape = load_run_config(RUN_FILE, SMALL, 1).with_vocab_size(90).model
    data = run_distributed(measured_with, 2, TOGETHER)
    assert data[0] == data[1]
    # An all-reduce over two ranks sends the message once: a layer's gradients, fp32.
    assert data[0].machine_bytes_per_second == pytest.approx(layer_parameters(shape) * 4 / 0.010)
    assert (data[0].latency_seconds, data[0].ranks_per_machine) == (0.001, 2)
    pipeline = "raptr_ds.parallel.pipeline_model_parallel_size=2"
    stages = run_distributed(measured_with, 2, TOGETHER, pipeline)[0]
    assert stages.machine_bytes_per_second == pytest.approx(2 * 16 * 32 * 4 / 0.010)  # the residual stream
    assert stages.flops_per_second == pytest.approx(step_flops(shape, 4, 2, 4) / 0.5)


def test_tensor_ranks_compute_beside_their_reductions() -> None:
    """Four layers with two reductions of the stream in each direction, 0.011 s each, are not computing."""
    shape = load_run_config(RUN_FILE, SMALL, 1).with_vocab_size(90).model
    tensor = "raptr_ds.parallel.tensor_model_parallel_size=2"
    device = run_distributed(measured_with, 2, TOGETHER, tensor)[0]
    assert device.flops_per_second == pytest.approx(step_flops(shape, 4, 2, 4) / 2 / (0.5 - 4 * 2 * 2 * 0.011))
    assert device.memory_bytes_per_second == pytest.approx(30 * (4 * layer_parameters(shape) // 2) / 0.25)


def test_a_plan_says_what_was_measured() -> None:
    command = [sys.executable, "tools/plan.py", str(RUN_FILE), "--measure", "--set", *SMALL]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "as measured on this machine with 1 at work" in done.stdout
    assert "GB/s between its devices" not in done.stdout
