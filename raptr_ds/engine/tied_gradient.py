"""The tied embedding's gradient, summed over the first and the last pipeline stage while the pipeline drains.

Each of the two stages has a gradient for its copy of the word embedding and needs the sum. An all-reduce would wait for
the first stage, which finishes last, and send every row both ways. But the last stage, which has the head, has its
gradient one backward pass earlier, and the first stage has gradients only for the rows of its tokens. So the last stage
sends all rows while the first still computes, and the first sends a few rows back. The sum of two numbers has one
rounding, so both stages get the same bits as from an all-reduce.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.data.batch import StepBatch
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.transfer import without_waiting


class TiedGradient:
    """Sums the gradient on a rank of the first or the last stage."""

    def __init__(self, embedding: Any, groups: ProcessGroups, dtype: torch.dtype) -> None:
        """embedding: this tensor rank's part of the word embedding; dtype: of the gradient where it accumulates."""
        assert groups.embedding is not None, "only the first and the last stage have a copy"
        self._weight: nn.Parameter = embedding.weight
        self._first_row, self._end_row = embedding.vocab_start_index, embedding.vocab_end_index
        self._is_first, self._group, self._dtype = groups.is_first_stage, groups.embedding, dtype
        ranks = dist.get_process_group_ranks(groups.embedding)
        self._other = ranks[-1] if self._is_first else ranks[0]
        self._rows = torch.empty(0, dtype=torch.int64)  # of the step's tokens, counted from this rank's first
        self._arriving: tuple[torch.Tensor, Any] | None = None
        self._passes_left = 0

    def begin(self, batch: StepBatch) -> None:
        """Begin a step on `batch`, which is on the host and the same on both stages."""
        tokens = torch.cat([micro.tokens.flatten() for micro in batch.micro_batches])
        rows = tokens.bincount().nonzero().flatten()
        self._rows = rows[(rows >= self._first_row) & (rows < self._end_row)] - self._first_row
        self._passes_left = len(batch.micro_batches)

    def before_backward(self) -> None:
        """Prepare for a micro batch's backward pass; before the last one the first stage begins to receive.

        Not earlier: the last stage sends only after its last gradient has reached the first stage.
        """
        self._passes_left -= 1
        if self._is_first and self._passes_left == 0:
            arriving = torch.empty_like(self._weight, dtype=self._dtype)
            self._arriving = arriving, dist.irecv(arriving, self._other, group=self._group)

    def reduce(self, gradient: torch.Tensor) -> None:
        """Add the other stage's gradient to this one's, in place, after all backward passes.

        Shapes: gradient (rows of this tensor rank, H).
        """
        assert gradient.dtype == self._dtype, (gradient.dtype, self._dtype)
        rows = without_waiting(self._rows, gradient.device)
        if self._is_first:
            assert self._arriving is not None, "reduced before the last backward pass"
            (arriving, received), self._arriving = self._arriving, None
            own = gradient[rows]
            sent = self._send(own)
            received.wait()
            gradient.add_(arriving)
            sent.wait()
        else:
            sent = self._send(gradient)
            arriving = gradient.new_empty(len(rows), gradient.shape[1])
            dist.recv(arriving, self._other, group=self._group)
            sent.wait()
            gradient.index_add_(0, rows, arriving)

    def _send(self, tensor: torch.Tensor) -> Any:
        return dist.isend(tensor, self._other, group=self._group)
