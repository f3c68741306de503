"""The vocabulary split over tensor ranks, unevenly: each rank's loss and gradients are those of plain torch, in both
forms of the cross-entropy, and all ranks take the same one.
"""

import pytest
import torch
from torch.nn import functional

from tests.dist.workers import run_distributed

N, HIDDEN = 23, 8


def on_this_rank(launch, tensor: int, vocab: int, by_kernel: bool) -> dict[str, float]:
    """Return the largest differences from plain torch on this rank, relative to the largest element.

    by_kernel: in fp32, as the kernels compute, run by Triton's interpreter; else in fp64.
    """
    from raptr_ds.parallel import cross_entropy as module
    from raptr_ds.parallel.groups import initialize_process_groups
    from raptr_ds.parallel.word_embedding import padded_vocab_size

    groups = initialize_process_groups(launch, tensor, 1)
    module._has_kernel = lambda _hidden, _group: by_kernel
    generator = torch.Generator().manual_seed(1)
    rows = padded_vocab_size(vocab, groups)
    full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, HIDDEN), (rows, HIDDEN))]
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (N,), generator=generator)
    part = slice(groups.tensor_rank * rows // tensor, (groups.tensor_rank + 1) * rows // tensor)
    dtype = torch.float32 if by_kernel else torch.float64
    ours = [value.to(dtype, copy=True) for value in (full[0], full[1][part], bias[part])]
    plain = [full[0].clone(), full[1].clone(), bias.clone()]
    for value in (*ours, *plain):
        value.requires_grad_()
    losses = module.cross_entropy(*ours, targets, vocab_size=vocab, groups=groups)
    (losses * torch.arange(1, N + 1)).sum().backward()
    logits = functional.linear(*plain)[:, :vocab]
    expected = functional.cross_entropy(logits, targets, reduction="none")
    (expected * torch.arange(1, N + 1)).sum().backward()
    oracles = {"losses": expected, "hidden": plain[0].grad, "weight": plain[1].grad, "bias": plain[2].grad}
    found = {"losses": losses, "hidden": ours[0].grad, "weight": ours[1].grad, "bias": ours[2].grad}
    differences = {}
    for name, value in found.items():
        oracle, whole = oracles[name], oracles[name]
        assert value is not None
        assert oracle is not None
        assert whole is not None
        oracle = oracle[part] if name in {"weight", "bias"} else oracle
        differences[name] = ((value - oracle).abs().max() / whole.abs().max()).item()
    return differences


@pytest.mark.parametrize("by_kernel", [False, True], ids=["pieces", "kernel"])
@pytest.mark.parametrize(
    ("tensor", "vocab"), [(2, 61), (4, 61), (4, 9)]
)  # of the last the fourth rank has padding alone
def test_split_vocabulary(tensor: int, vocab: int, by_kernel: bool) -> None:
    for differences in run_distributed(on_this_rank, tensor, tensor, vocab, by_kernel):
        assert max(differences.values()) < (1e-6 if by_kernel else 1e-12), differences


def agreement(launch) -> list[bool]:
    """Return whether this rank takes the kernels where Triton is on every machine, and where it is on all but one."""
    from raptr_ds.parallel import cross_entropy as module
    from raptr_ds.parallel.groups import initialize_process_groups

    groups = initialize_process_groups(launch, 2, 1)
    found = []
    for without in (None, 1):
        module.triton_obstacle = lambda without=without: "not installed" if launch.rank == without else None
        module.all_have_triton.cache_clear()
        found.append(module.all_have_triton(groups.tensor, groups.device))
    return found


def test_ranks_that_share_a_vocabulary_take_the_same_form() -> None:
    assert run_distributed(agreement, 4) == [[True, False], [True, False], [True, True], [True, True]]
