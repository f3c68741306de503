"""Which GPU a rank takes, and which one torch and DeepSpeed then use; what torch sees of GPUs is made up here."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raptr_ds.parallel import groups as module
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch


def start(monkeypatch: pytest.MonkeyPatch, launch: Launch, num_gpus: int) -> dict[str, Any]:
    """Start a rank that sees num_gpus; return what torch.distributed is initialized with."""
    given: dict[str, Any] = {}
    monkeypatch.setenv("LOCAL_RANK", str(launch.local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(set_device=device))
    monkeypatch.setattr(dist, "init_process_group", given.update)
    monkeypatch.setattr(module.RankDevice, "of", lambda device: device)
    for name in ("call_roll", "make_process_groups", "warm_up"):
        monkeypatch.setattr(module, name, lambda *_arguments: None)
    initialize_process_groups(launch, 1, 1)
    return given


@pytest.mark.parametrize(("num_gpus", "index"), [(8, 3), (1, 0)], ids=["all of the machine's", "its own only"])
def test_deepspeed_takes_the_gpu_that_torch_takes(monkeypatch: pytest.MonkeyPatch, num_gpus: int, index: int) -> None:
    given = start(monkeypatch, Launch(3, 3, 8, "127.0.0.1", 1, "tests"), num_gpus)
    assert given["set_device"] == given["device_id"] == torch.device("cuda", index)
    assert given["backend"] == "nccl"
    assert os.environ["LOCAL_RANK"] == str(index)


def test_a_lone_rank_binds_no_gpu_to_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    given = start(monkeypatch, Launch(0, 0, 1, "127.0.0.1", 1, "tests"), 1)
    assert given["set_device"] == torch.device("cuda", 0)
    assert given["device_id"] is None
