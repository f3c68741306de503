"""The tied embedding's gradient over two stages: the bits of an all-reduce, and few rows on the way back."""

import pytest
import torch
import torch.distributed as dist

from raptr_ds.data.batch import Sample, StepBatch, collate
from raptr_ds.engine.tied_gradient import TiedGradient
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.parallel.word_embedding import WordEmbedding
from tests.dist.counting import Counter
from tests.dist.workers import run_distributed

VOCAB, HIDDEN, PAD = 61, 8, 3
TOKENS = ([5, 60, 5, 17], [17, 2, 44], [30, 31, 59, 0])  # of a micro batch each, the second one padded
ROWS = sorted({PAD, *(token for tokens in TOKENS for token in tokens)})


def sum_gradients(
    launch: Launch, tensor: int, pipeline: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor, int]] | None:
    """Return (sum, the all-reduce's, bytes sent) of two steps on this rank; None on a stage in the middle."""
    groups = initialize_process_groups(launch, tensor, pipeline)
    embedding = WordEmbedding(VOCAB, HIDDEN, groups)
    if groups.embedding is None:
        return None
    tied = TiedGradient(embedding, groups, dtype)
    samples = [Sample(torch.tensor(t).numpy(), torch.tensor([0]).numpy(), torch.tensor([1]).numpy(), 0) for t in TOKENS]
    batch = StepBatch(tuple(collate([sample], [0], 4, PAD) for sample in samples))
    rows = torch.tensor(ROWS)
    rows = rows[(rows >= embedding.vocab_start_index) & (rows < embedding.vocab_end_index)]
    results = []
    for step in range(2):
        generator = torch.Generator().manual_seed(100 * step + launch.rank)
        gradient = torch.randn(embedding.weight.shape, generator=generator).to(dtype)
        if groups.is_first_stage:  # only rows that occur have a gradient
            some = gradient[rows - embedding.vocab_start_index]
            gradient.zero_()[rows - embedding.vocab_start_index] = some
        expected = gradient.clone()
        dist.all_reduce(expected, group=groups.embedding)
        with Counter() as counter:
            tied.begin(batch)
            for _ in batch.micro_batches:
                tied.before_backward()
            tied.reduce(gradient)
        results.append((gradient, expected, counter.largest_bytes.get("send", 0)))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 2), (1, 3)])
def test_the_sum_is_that_of_an_all_reduce(tensor: int, pipeline: int, dtype: torch.dtype) -> None:
    outcomes = run_distributed(sum_gradients, tensor * pipeline, tensor, pipeline, dtype)
    assert [outcome is None for outcome in outcomes] == [
        0 < rank // tensor < pipeline - 1 for rank in range(tensor * pipeline)
    ]
    sent = [0, 0]
    for rank, outcome in enumerate(outcomes):
        for found, expected, num_bytes in outcome or ():
            assert found.any()
            assert torch.equal(found, expected)
            sent[rank >= tensor] += num_bytes
    row = HIDDEN * dtype.itemsize
    assert sent == [2 * len(ROWS) * row, 2 * -(-VOCAB // tensor) * tensor * row]
