"""What the tensor ranks share by vocabulary: the word embedding, whose weight the head may use too, and an output bias.

A lookup's gradient is a few hundred rows. Where the head uses the weight too, autograd makes a whole table of zeros for
them and adds that to the head's table: on a CPU, with a small model, 1% to 2% of a step at half the path. Here the rows
are added to the head's table itself, which is nobody else's (cross_entropy.py makes it anew).
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import mark_shard, megatron_arguments
from raptr_ds.parallel.megatron_core import VocabParallelEmbedding
from raptr_ds.parallel.sequence import sum_over_ranks


def padded_vocab_size(vocab_size: int, groups: ProcessGroups) -> int:
    """Return the vocabulary rows including the padding that makes the tensor ranks' shares equal."""
    tensor = groups.topology.tensor
    return -(-vocab_size // tensor) * tensor


def vocab_bias(vocab_size: int, groups: ProcessGroups) -> nn.Parameter:
    """Return an output bias split over the tensor ranks by vocabulary."""
    bias = nn.Parameter(torch.zeros(padded_vocab_size(vocab_size, groups) // groups.topology.tensor))
    mark_shard(bias, 0, vocab_size, groups)
    return bias


class WordEmbedding(VocabParallelEmbedding):
    """Megatron-core's, which can also hand its weight on; forward: (b, T) ids -> (b, T, hidden).

    With sequence parallelism it returns this rank's part of the sequences, (b, T / tensor, hidden).
    """

    def __init__(self, vocab_size: int, hidden_size: int, groups: ProcessGroups) -> None:
        super().__init__(padded_vocab_size(vocab_size, groups), hidden_size, **megatron_arguments(groups))
        self.is_split, self.is_along_sequence = groups.topology.tensor > 1, groups.sequence_parallel
        self.group = groups.tensor
        mark_shard(self.weight, 0, vocab_size, groups)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the rows of (b, T) ids, summed over the ranks, each of which has those of its ids."""
        here, is_elsewhere = self._here(tokens)
        return self._sum(functional.embedding(here, self.weight), is_elsewhere)

    def with_weight(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return forward's result, and the weight (rows here, hidden) for the head, with one gradient for both uses.

        The gradient's bits are those of two separate uses. They stay separate on a GPU, where finding the different
        tokens would make the host wait for their number, and at ZeRO 3 (its parameters have a ds_id): what it gathers
        is only to be used by modules that it can watch.
        """
        if self.weight.device.type != "cpu" or hasattr(self.weight, "ds_id"):
            return self(tokens), self.weight
        here, is_elsewhere = self._here(tokens)
        rows, weight = _RowsAndWeight.apply(here, self.weight)
        return self._sum(rows, is_elsewhere), weight

    def _here(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the ids counted from this rank's first, 0 where another rank has them, and where that is if it is."""
        if not self.is_split:
            return tokens, None
        is_elsewhere = (tokens < self.vocab_start_index) | (tokens >= self.vocab_end_index)
        return (tokens - self.vocab_start_index).masked_fill(is_elsewhere, 0), is_elsewhere

    def _sum(self, rows: torch.Tensor, is_elsewhere: torch.Tensor | None) -> torch.Tensor:
        if is_elsewhere is None:
            return rows
        return sum_over_ranks(rows.masked_fill(is_elsewhere[..., None], 0.0), None, self.group, self.is_along_sequence)


class _RowsAndWeight(torch.autograd.Function):
    """A lookup, and the weight once more."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # pyright: ignore
        ctx.save_for_backward(tokens)
        return functional.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:  # pyright: ignore
        by_rows, by_weight = gradients
        different, places = torch.unique(ctx.saved_tensors[0], return_inverse=True)
        # Rows of one token are summed before they meet the head's, as autograd would: in 16 bits that is not the same.
        sums = torch.ops.aten.embedding_dense_backward(by_rows, places, len(different), -1, False)
        return None, by_weight.index_add_(0, different, sums)
