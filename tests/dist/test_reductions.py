"""In which precision gradients are summed over ranks."""

import pytest
import torch

from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from tests.dist.counting import counting
from tests.dist.trajectory import Case, batch_at, build_engine, process_groups
from tests.dist.workers import run_distributed


def types_of_sums(launch: Launch, case: Case) -> set[torch.dtype]:
    """Return the types of what a training step sums over ranks, numbers apart."""
    groups = process_groups(launch, case)
    engine = build_engine(case, groups)
    with counting(engine.optimizer) as counter:
        engine.train_step(batch_at(case, groups, 0), LayerPath.full(case.num_layers), 0, case.learning_rate)
    return counter.summed_types


@pytest.mark.parametrize("overlap", [False, True], ids=["at the end", "overlapped"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("in_fp32", [False, True], ids=["bf16", "fp32"])
def test_gradients_are_summed_over_ranks_as_they_accumulate(stage: int, in_fp32: bool, overlap: bool) -> None:
    case = Case(precision="bf16", accumulate_in_fp32=in_fp32, zero=stage, overlap=overlap)
    expected = {torch.float32 if in_fp32 else torch.bfloat16}
    assert run_distributed(types_of_sums, 2, case) == [expected] * 2
