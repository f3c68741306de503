"""Devices that cannot train together are refused before training, with the alternative."""

import pytest

from raptr_ds.parallel.roll_call import RankDevice, device_problem

CPU, A, B = RankDevice(None, False), RankDevice("GPU-a", True), RankDevice("GPU-b", True)


@pytest.mark.parametrize("devices", [[CPU], [CPU, CPU], [A], [A, B]])
def test_devices_that_fit(devices: list[RankDevice]) -> None:
    assert device_problem(devices) is None


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ([A, B, A], "ranks 0, 2 of 3 share one GPU (GPU-a)"),
        ([A, CPU], "ranks 1 of 2 have no GPU"),
        ([RankDevice("GPU-a", False)], "ranks 0 of 1 has no NCCL"),
    ],
)
def test_devices_that_do_not_fit(devices: list[RankDevice], said: str) -> None:
    problem = device_problem(devices)
    assert problem is not None
    assert said in problem
    assert "CUDA_VISIBLE_DEVICES" in problem
