"""Token sequences laid out in rows, so that a beginning that several of them share is computed once.

A row is a tree: each token sees the tokens that lead to it, and all of a prefix that is seen in both directions.
Positions count along the sequence, not along the row, so what a token computes is what it would compute in its sequence
alone. Where a prefix is seen in both directions, each of its tokens depends on all of it, and only sequences with the
whole prefix in common share anything. Left to right, any common beginning is shared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

_LEAST_SHARED = 0.25
"""Share of a sequence that must be in the row already; with less, a mask over a longer row costs more than it saves."""


@dataclass(frozen=True)
class Scored:
    """Tokens of which the last num_scored are predicted, each from those before it.

    prefix_length: leading tokens that see each other in both directions; none of them is predicted.
    """

    tokens: Sequence[int]
    num_scored: int
    prefix_length: int = 0


@dataclass
class Row:
    """A tree of tokens, in one row. paths: for each member (its number), where its tokens are, but for the last one.

    A token that nothing is predicted from, the last of a sequence, is in no row.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: dict[int, np.ndarray] = field(default_factory=dict)
    new_from: dict[int, int] = field(default_factory=dict)

    def add(self, number: int, tokens: Sequence[int], shared: np.ndarray) -> np.ndarray:
        """Append a member behind what it shares with an earlier one, and return its path."""
        new = tokens[len(shared) :]
        path = np.concatenate([shared, np.arange(len(self.tokens), len(self.tokens) + len(new))])
        self.tokens += new
        self.positions += range(len(shared), len(tokens))
        self.paths[number], self.new_from[number] = path, len(shared)
        return path

    @property
    def is_chain(self) -> bool:
        """Whether every token follows the one before it, so that the row is one sequence."""
        return self.positions == list(range(len(self.positions)))


def lay_out(sequences: Sequence[Scored], longest_row: int) -> list[Row]:
    """Return rows that hold all of the sequences, the longest row first.

    No row of more than one sequence is longer than longest_row.
    """

    def in_order(number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        tokens, prefix = tuple(sequences[number].tokens), sequences[number].prefix_length
        return tokens[:prefix], tokens[prefix:]

    rows: list[Row] = []
    before: Scored | None = None
    path = np.zeros(0, np.int64)
    for number in sorted(range(len(sequences)), key=in_order):
        sequence = sequences[number]
        tokens = list(sequence.tokens[:-1])
        shared = _num_shared(before, sequence)
        added = len(tokens) - shared
        if shared < _LEAST_SHARED * len(tokens) or not shared or len(rows[-1].tokens) + added > longest_row:
            rows.append(Row())
            shared = 0
        path = rows[-1].add(number, tokens, path[:shared])
        before = sequence
    return sorted(rows, key=lambda row: len(row.tokens), reverse=True)


def _num_shared(before: Scored | None, sequence: Scored) -> int:
    """Return how many leading tokens compute the same in both, of those that are in a row."""
    if before is None or before.prefix_length != sequence.prefix_length:
        return 0
    pairs = zip(before.tokens[:-1], sequence.tokens[:-1], strict=False)
    shared = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if shared is None:
        shared = min(len(before.tokens), len(sequence.tokens)) - 1
    return shared if shared >= sequence.prefix_length else 0


def batch_inputs(
    rows: Sequence[Row], sequences: Sequence[Scored], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return tokens and positions (b, T), padded on the right, and the mask (b, 1, T, T) that is added to scores.

    The mask is None where the plain causal one is right: each row is one sequence, without a prefix.
    """
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        positions[index, : len(row.tokens)] = torch.tensor(row.positions)
    has_prefix = any(sequences[number].prefix_length for row in rows for number in row.paths)
    if not has_prefix and all(row.is_chain for row in rows):
        return tokens, torch.arange(longest).expand(len(rows), -1), None
    seen = np.broadcast_to(np.eye(longest, dtype=bool), (len(rows), longest, longest)).copy()  # no row may be empty
    for index, row in enumerate(rows):
        for number, path in row.paths.items():
            depth, start = np.arange(len(path)), row.new_from[number]
            both = depth[None, :] < sequences[number].prefix_length
            seen[index][path[start:, None], path[None, :]] = (depth[None, :] <= depth[start:, None]) | both
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~torch.from_numpy(seen), torch.finfo(dtype).min)
    return tokens, positions, mask[:, None]
