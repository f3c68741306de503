"""The order of text: bijections, epochs that read everything once, blends in exact proportion."""

from fractions import Fraction

import numpy as np
import pytest

from raptr_ds.data.indexed import TokenFile
from raptr_ds.data.token_stream import Mixture, Permutation, TokenStream


class Numbers(TokenFile):
    """The numbers from 0 on as tokens, without a file."""

    def __init__(self, num_tokens: int) -> None:
        self._values = np.arange(num_tokens, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._values)

    def read(self, first: int, count: int) -> np.ndarray:
        return self._values[first : first + count]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_a_permutation_is_a_bijection(size: int) -> None:
    permutation = Permutation(size, 1234, 0, "test")
    assert sorted(map(permutation, range(size))) == list(range(size))


def test_permutations_are_pure_and_differ_by_seed_epoch_and_purpose() -> None:
    def order(seed: int, epoch: int, purpose: str) -> list[int]:
        return list(map(Permutation(500, seed, epoch, purpose), range(500)))

    orders = [order(1, 0, "a"), order(2, 0, "a"), order(1, 1, "a"), order(1, 0, "b")]
    assert order(1, 0, "a") == orders[0]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            same = sum(a == b for a, b in zip(first, second, strict=True))
            assert same < 10  # one is expected; ten has a chance of 1e-7


def test_a_permutation_mixes() -> None:
    """Places are uniform: means of a first tenth over many seeds, and no order is left among neighbours."""
    first = [Permutation(1000, seed, 0, "")(place) for seed in range(200) for place in range(10)]
    assert abs(np.mean(first) - 499.5) < 5 * 1000 / np.sqrt(12 * len(first))  # five standard deviations
    order = np.array(list(map(Permutation(1000, 1, 0, ""), range(1000))))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.16


@pytest.mark.parametrize(("num_tokens", "window"), [(1000, 10), (1003, 10), (17, 16), (31, 16), (16, 16)])
def test_an_epoch_reads_every_token_once(num_tokens: int, window: int) -> None:
    stream = TokenStream(Numbers(num_tokens), window, 1, "train 0")
    count = stream.windows_per_epoch
    assert count == num_tokens // window
    for epoch in range(3):
        tokens = [stream.read(epoch * count + place) for place in range(count)]
        assert all((np.diff(found) % num_tokens == 1).all() for found in tokens)
        seen = np.bincount(np.concatenate(tokens), minlength=num_tokens)
        assert seen.max() == 1
        assert seen.sum() == count * window
    assert stream.read(10**15).shape == (window,)


def test_epochs_differ_and_any_window_can_be_read_alone() -> None:
    stream = TokenStream(Numbers(1000), 10, 1, "train 0")
    first, second = ([stream.read(i).tolist() for i in range(start, start + 100)] for start in (0, 100))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    fresh = TokenStream(Numbers(1000), 10, 1, "train 0")
    assert fresh.read(157).tolist() == second[57]
    assert TokenStream(Numbers(1000), 10, 2, "train 0").read(157).tolist() != second[57]


def test_a_corpus_shorter_than_a_window_is_one_window() -> None:
    stream = TokenStream(Numbers(7), 100, 1, "validation 0")
    assert [sorted(stream.read(i).tolist()) for i in range(3)] == [list(range(7))] * 3


@pytest.mark.parametrize("weights", [[1], [1, 1], [3, 1], [0.5, 0.3, 0.2], [1, 2, 3, 4], [70, 20, 7, 3], [0.1, 1e-3]])
def test_blends_are_in_exact_proportion(weights: list[float]) -> None:
    mixture = Mixture({f"corpus {i}": weight for i, weight in enumerate(weights)})
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    counts = [0] * len(weights)
    for sample in range(3000):
        corpus_number, index = mixture.locate(sample)
        assert index == counts[corpus_number]  # every sample of every corpus comes once, in order
        counts[corpus_number] += 1
        wanted = [share * (sample + 1) for share in shares]
        assert all(abs(count - want) < len(weights) for count, want in zip(counts, wanted, strict=True))
        if all(want.denominator == 1 for want in wanted):
            assert counts == wanted


def test_a_blend_is_a_function_of_relative_weights() -> None:
    first, second = Mixture({"a": 0.3, "b": 0.7}), Mixture({"a": 30, "b": 70})
    assert [first.locate(s) for s in range(500)] == [second.locate(s) for s in range(500)]
    number, index = first.locate(10**15)
    assert (number, index // 10**13) in {(0, 30), (1, 70), (0, 29), (1, 69)}
