"""What everything else stands on: versions that are supported, imports, process groups, and the device's peak."""

import importlib
import pkgutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
import torch.distributed as dist

import raptr_ds
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.launch import prepare_imports
from raptr_ds.runtime.utilization import peak_flops
from tests.gpu.kit.measured_device import DEVICE

Record = Callable[[str, object], None]
PACKAGES = ("torch", "triton", "deepspeed", "megatron-core", "transformers", "numpy", "pydantic", "sentencepiece")


def test_versions(record_property: Record) -> None:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    record_property("finding", ", ".join(f"{name} {number}" for name, number in found.items()))
    assert "2.11" <= found["torch"][:4] <= "2.13", f"torch {found['torch']}: 2.11 to 2.13 are supported"
    missing = {name for name, number in found.items() if number == "missing"}
    assert missing <= ({"triton"} if DEVICE.type == "cpu" else set())


def test_every_module_can_be_imported(record_property: Record) -> None:
    prepare_imports(DEVICE.type == "cuda")
    start = time.perf_counter()
    names = [module.name for module in pkgutil.walk_packages(raptr_ds.__path__, "raptr_ds.")]
    for name in names:
        importlib.import_module(name)
    assert len(names) > 50
    record_property("finding", f"{len(names)} modules in {time.perf_counter() - start:.1f} s")


def test_process_groups_reduce_and_send(groups: ProcessGroups, record_property: Record) -> None:
    """The device's backend in every group, and gloo in the one for the host's messages."""
    start = time.perf_counter()
    assert dist.get_backend(groups.world) == ("nccl" if DEVICE.type == "cuda" else "gloo")
    assert dist.get_backend(groups.control) == "gloo"
    ones = torch.ones(8, device=groups.device)
    for group in (groups.world, groups.tensor, groups.data, groups.pipeline):
        dist.all_reduce(ones, group=group)
    assert ones.sum().item() == 8.0
    words: list[object] = ["sent"]
    dist.broadcast_object_list(words, src=0, group=groups.control)
    assert words == ["sent"]
    backend = dist.get_backend(groups.world)
    record_property("finding", f"{backend} and gloo in {time.perf_counter() - start:.1f} s")


def test_the_devices_peak_is_known(record_property: Record) -> None:
    if DEVICE.type == "cpu":
        pytest.skip("a CPU's peak is not known")
    properties = torch.cuda.get_device_properties(DEVICE)
    record_property(
        "finding",
        f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {properties.multi_processor_count} "
        f"multiprocessors, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    )
    assert peak_flops(properties.name, "bf16") is not None, f"{properties.name} is not in runtime/utilization.py"
