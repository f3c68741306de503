"""Ranges of keys against masks made by hand from what each position of an example may see."""

import pytest
import torch

from raptr_ds.data.batch import MicroBatch, PackedSample, Sample, collate
from raptr_ds.model.key_ranges import dense_mask, key_ranges

T = 12
Example = tuple[int, int]  # length, prefix


def batch_of(rows: list[list[Example]], packed: bool) -> MicroBatch:
    samples = []
    for row in rows:
        zeros = [torch.zeros(length, dtype=torch.int64).numpy() for length, _ in row]
        parts = tuple(Sample(z, z[:1], z[:1], prefix) for z, (_, prefix) in zip(zeros, row, strict=True))
        samples.append(PackedSample(parts) if packed else parts[0])
    return collate(samples, range(len(rows)), T, pad_id=0)


def seen_by_hand(rows: list[list[Example]]) -> torch.Tensor:
    """Return (b, T, T): what the real positions see; False in the rows of padding."""
    seen = torch.zeros(len(rows), T, T, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for length, prefix in row:
            for query in range(length):
                for key in range(length):
                    seen[number, start + query, start + key] = key <= query or key < prefix
            start += length
    return seen


def is_real(rows: list[list[Example]]) -> torch.Tensor:
    return torch.arange(T) < torch.tensor([[sum(length for length, _ in row)] for row in rows])


CASES = {
    "prefix": (True, False, [[(T, 5)], [(T, 0)], [(T, T)], [(T, 1)]]),
    "prefix, padded": (True, False, [[(7, 3)], [(T, 4)], [(1, 1)]]),
    "packed": (True, True, [[(5, 2), (4, 0), (3, 3)], [(2, 1), (1, 1)], [(T, 6)]]),
    "both directions, padded": (False, False, [[(7, 7)], [(T, T)], [(1, 1)]]),
    "both directions, packed": (False, True, [[(5, 5), (4, 4), (3, 3)], [(2, 2), (1, 1)]]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_ranges_and_mask_are_those_made_by_hand(case: tuple[bool, bool, list[list[Example]]]) -> None:
    is_causal, packed, rows = case
    batch = batch_of(rows, packed)
    expected, real = seen_by_hand(rows), is_real(rows)
    ranges = key_ranges(batch, is_causal)
    assert ranges is not None
    position = torch.arange(T)
    by_query = (position >= ranges.first_key[..., None]) & (position < ranges.end_key[..., None])
    assert torch.equal(by_query[real], expected[real])
    assert by_query.any(2).all()  # no empty row, whose softmax would be NaN
    assert not (by_query & ~real[:, None, :])[real].any()  # no real position sees padding
    by_key = (position >= ranges.first_query[..., None]) & (position < ranges.end_query[..., None])
    assert torch.equal(by_key.transpose(1, 2), by_query)
    for bound in ranges:
        assert (bound.diff(dim=1) >= 0).all()  # what lets a block visit one run of blocks
    added = dense_mask(batch, is_causal, torch.float32)
    assert added is not None
    assert torch.equal((added == 0).expand(-1, -1, T, -1)[:, 0], by_query)
    assert set(added.unique().tolist()) <= {0.0, -torch.inf}


def test_full_sequences_in_both_directions_need_no_mask() -> None:
    batch = batch_of([[(T, T)], [(T, T)]], packed=False)
    assert key_ranges(batch, is_causal=False) is None
    assert dense_mask(batch, is_causal=False, dtype=torch.float32) is None
