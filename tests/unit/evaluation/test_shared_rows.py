"""Rows in which sequences share their beginnings: each token sees what it sees in its sequence alone, and no more."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from raptr_ds.evaluation.shared_rows import Scored, batch_inputs, lay_out

_TOKENS = st.lists(st.integers(1, 3), min_size=2, max_size=12)


@st.composite
def _sequences(draw: st.DrawFn) -> list[Scored]:
    """Sequences over three tokens, so that many share a beginning; some with a prefix."""
    found = []
    for tokens in draw(st.lists(_TOKENS, min_size=1, max_size=8)):
        num_scored = draw(st.integers(1, len(tokens) - 1))
        has_prefix = draw(st.booleans())
        found.append(Scored(tokens, num_scored, len(tokens) - num_scored if has_prefix else 0))
    return found


def _seen_alone(sequence: Scored) -> np.ndarray:
    """Return (T, T): whether a token sees another, written out."""
    length = len(sequence.tokens) - 1
    return np.array([[k <= q or k < sequence.prefix_length for k in range(length)] for q in range(length)])


@given(_sequences(), st.integers(1, 40))
def test_every_sequence_is_in_a_row_as_it_is_alone(sequences: list[Scored], longest_row: int) -> None:
    rows = lay_out(sequences, longest_row)
    assert sorted(number for row in rows for number in row.paths) == list(range(len(sequences)))
    tokens, positions, mask = batch_inputs(rows, sequences, torch.float64)
    for index, row in enumerate(rows):
        assert len(row.tokens) <= longest_row or len(row.paths) == 1
        for number, path in row.paths.items():
            alone = sequences[number]
            assert tokens[index, path].tolist() == list(alone.tokens[:-1])
            assert positions[index, path].tolist() == list(range(len(path)))
            if mask is None:
                assert path.tolist() == list(range(len(path)))
                assert alone.prefix_length == 0
                continue
            seen = (mask[index, 0] == 0).numpy()
            assert np.array_equal(seen[np.ix_(path, path)], _seen_alone(alone))
            others = np.setdiff1d(np.arange(seen.shape[1]), path)
            assert not seen[np.ix_(path, others)].any()


def test_choices_of_one_question_compute_their_context_once() -> None:
    context = list(range(10, 30))
    sequences = [Scored([*context, *choice], len(choice), 20) for choice in ([1, 2, 3], [4], [1, 2, 5], [6])]
    (row,) = lay_out(sequences, 100)
    assert len(row.tokens) == 20 + 2  # of [1, 2, 3] and [1, 2, 5] the last token is no input, and the others are shared


def test_a_prefix_that_others_begin_with_is_computed_anew() -> None:
    """Seen in both directions, its tokens depend on those that follow; left to right they do not."""
    short, long = list(range(10, 20)), list(range(10, 26))

    def computed(prefixes: tuple[int, int]) -> int:
        sequences = [Scored([*short, 1], 1, prefixes[0]), Scored([*long, 1], 1, prefixes[1])]
        return sum(len(row.tokens) for row in lay_out(sequences, 100))

    assert computed((10, 16)) == 26
    assert computed((0, 0)) == 16


def test_equal_requests_are_computed_once() -> None:
    (row,) = lay_out([Scored([5, 6, 7], 1, 2)] * 3, 100)
    assert len(row.tokens) == 2
    assert set(row.paths) == {0, 1, 2}
