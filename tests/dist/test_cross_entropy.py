"""The vocabulary split over tensor ranks, unevenly: each rank's loss and gradients are those of plain torch."""

import pytest
import torch
from torch.nn import functional

from tests.dist.workers import run_distributed

N, HIDDEN, VOCAB = 23, 8, 61


def on_this_rank(launch, tensor: int) -> dict[str, float]:
    """Return the largest differences from plain torch on this rank, relative to the largest element."""
    from raptr_ds.parallel.cross_entropy import cross_entropy
    from raptr_ds.parallel.groups import initialize_process_groups
    from raptr_ds.parallel.word_embedding import padded_vocab_size

    groups = initialize_process_groups(launch, tensor, 1)
    generator = torch.Generator().manual_seed(1)
    rows = padded_vocab_size(VOCAB, groups)
    full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, HIDDEN), (rows, HIDDEN))]
    bias = torch.randn(rows, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (N,), generator=generator)
    part = slice(groups.tensor_rank * rows // tensor, (groups.tensor_rank + 1) * rows // tensor)
    ours = [full[0].clone(), full[1][part].clone(), bias[part].clone()]
    plain = [full[0].clone(), full[1].clone(), bias.clone()]
    for value in (*ours, *plain):
        value.requires_grad_()
    losses = cross_entropy(*ours, targets, vocab_size=VOCAB, groups=groups)
    (losses * torch.arange(1, N + 1)).sum().backward()
    logits = functional.linear(*plain)[:, :VOCAB]
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


@pytest.mark.parametrize("tensor", [2, 4])
def test_split_vocabulary(tensor: int) -> None:
    for differences in run_distributed(on_this_rank, tensor, tensor):
        assert max(differences.values()) < 1e-12, differences
