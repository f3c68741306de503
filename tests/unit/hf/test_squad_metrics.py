"""SQuAD's metrics, on cases worked out by hand."""

import pytest

from raptr_ds.hf.squad_metrics import compute_exact, compute_f1, normalize_answer, stand_in


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        ("The white cat", "white cat.", 1, 1.0),
        ("in a barn", "a red barn", 0, 0.5),
        ("one two three", "three two", 0, 0.8),
        ("two two", "two", 0, 2 / 3),
        ("the", "", 1, 1.0),
        ("word", "", 0, 0.0),
    ],
)
def test_cases(gold: str, predicted: str, exact: int, f1: float) -> None:
    assert compute_exact(gold, predicted) == exact
    assert compute_f1(gold, predicted) == pytest.approx(f1)


def test_articles_within_words_stay() -> None:
    assert normalize_answer("An  Athens-based theatre, the A!") == "athensbased theatre"


def test_the_harness_finds_it() -> None:
    stand_in()
    import transformers.data.metrics.squad_metrics as theirs  # type: ignore[import-not-found]

    assert theirs.compute_f1("a b", "b") == 1.0
