"""The word embedding that hands its weight on: rows and gradient have the bits of plain torch's two separate uses."""

import pytest
import torch
from torch.nn import functional

from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.parallel.word_embedding import WordEmbedding, padded_vocab_size
from tests.dist.workers import run_distributed

HIDDEN, VOCAB = 8, 61
TOKENS = torch.tensor([[5, 60, 5, 30, 0], [31, 5, 60, 44, 30]])  # often the same, and on every rank's part


def on_this_rank(launch: Launch, tensor: int, dtype: torch.dtype) -> dict[str, bool]:
    """Return what has plain torch's bits on this rank."""
    groups = initialize_process_groups(launch, tensor, 1)
    generator = torch.Generator().manual_seed(1)
    num_rows = padded_vocab_size(VOCAB, groups)
    part = slice(groups.tensor_rank * num_rows // tensor, (groups.tensor_rank + 1) * num_rows // tensor)
    whole, by_head = (torch.randn(num_rows, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    by_rows = torch.randn(*TOKENS.shape, HIDDEN, generator=generator).to(dtype)

    plain = whole.clone().requires_grad_()
    expected = functional.embedding(TOKENS, plain)
    ((plain * by_head).sum() + (expected * by_rows).sum()).backward()

    embedding = WordEmbedding(VOCAB, HIDDEN, groups).to(dtype)
    with torch.no_grad():
        embedding.weight.copy_(whole[part])
    rows, weight = embedding.with_weight(TOKENS)
    assert weight.grad_fn is rows.grad_fn or tensor > 1, "two uses of the weight where there should be one"
    ((weight * by_head[part]).sum() + (rows * by_rows).sum()).backward()
    assert plain.grad is not None
    assert embedding.weight.grad is not None
    return {
        "rows": torch.equal(rows, expected),
        "forward": torch.equal(embedding(TOKENS), expected),
        "weight": torch.equal(weight, whole[part]),
        "gradient": torch.equal(embedding.weight.grad, plain.grad[part]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_bits_are_plain_torchs(tensor: int, dtype: torch.dtype) -> None:
    for same in run_distributed(on_this_rank, tensor, tensor, dtype):
        assert all(same.values()), same
