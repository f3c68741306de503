"""The clock of a rank's own work, by the device's time, read without waiting for the device once more."""

import time

import pytest
import torch

from raptr_ds.engine.work_clock import WorkClock


def _work(products: int) -> torch.Tensor:
    square = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(products):
        square = square @ square * 1e-4
    return square.sum()


def test_only_the_devices_own_work_is_counted() -> None:
    clock = WorkClock(torch.device("cuda", torch.cuda.current_device()), is_on=True)
    _work(3).item()
    seconds = []
    for waited in (0, 300, 0):
        clock.begin_step()
        clock.start()
        _work(100)
        with clock.waiting():
            _work(waited)
        result = _work(100)
        clock.stop()
        result.item()  # where a step's result is read
        torch.cuda.set_sync_debug_mode("error")
        try:
            seconds.append(clock.end_step())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert seconds[1] == pytest.approx((seconds[0] + seconds[2]) / 2, rel=0.3)  # not 2.5 times as long


def test_a_slow_host_counts_too() -> None:
    clock = WorkClock(torch.device("cuda", torch.cuda.current_device()), is_on=True)
    torch.cuda.synchronize()
    clock.begin_step()
    with clock.working():
        time.sleep(0.1)
    torch.cuda.synchronize()
    assert 0.1 <= clock.end_step() < 0.3
