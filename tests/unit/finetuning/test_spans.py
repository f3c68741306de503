"""Windows of long contexts, the places of answers in them, and the likeliest spans."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.finetuning.spans import OUTSIDE, Window, best_answers, positions_of, windows_of
from raptr_ds.finetuning.task import Example
from raptr_ds.hf.tokenizer import tokenizer_to_hugging_face
from tests.made_up_text import made_up_text

CONTEXT = "one two three four"
OFFSETS = [(OUTSIDE, OUTSIDE)] * 3 + [(0, 3), (4, 7), (8, 13), (14, 18), (OUTSIDE, OUTSIDE)]


def a_window(offsets: list[tuple[int, int]], example: int = 0) -> Window:
    return Window(example, {}, np.array(offsets))


def logits(**places: float) -> np.ndarray:
    values = np.zeros(len(OFFSETS))
    for place, value in places.items():
        values[int(place.removeprefix("at"))] = value
    return values


def best(starts: np.ndarray, ends: np.ndarray, **options: object) -> str:
    examples = [Example("q", CONTEXT)]
    settings = {"may_be_empty": False, **options}
    return best_answers([a_window(OFFSETS)], starts[None], ends[None], examples, **settings)[0]  # type: ignore[arg-type]


def test_the_likeliest_span_by_hand() -> None:
    assert best(logits(at4=5), logits(at5=5)) == "two three"
    assert best(logits(at1=9, at4=5), logits(at2=9, at5=5)) == "two three"  # the question is no answer
    assert best(logits(at5=5, at3=3), logits(at4=5)) == "one two"  # 3 + 5: an end before its beginning is none
    assert best(logits(at3=5), logits(at6=5, at4=4), longest=2) == "one two"
    assert best(logits(at0=9, at4=5), logits(at0=9, at5=5), may_be_empty=True) == ""
    assert best(logits(at0=4, at4=5), logits(at0=4, at5=5), may_be_empty=True) == "two three"
    assert best(logits(at0=9, at4=5), logits(at0=9, at5=5), may_be_empty=False) == "two three"


def test_the_best_window_decides() -> None:
    windows = [a_window(OFFSETS), a_window([(OUTSIDE, OUTSIDE), (8, 13), (14, 18), *[(OUTSIDE, OUTSIDE)] * 5])]
    starts, ends = np.zeros((2, 8)), np.zeros((2, 8))
    starts[0, 3] = ends[0, 3] = 2
    starts[1, 2] = ends[1, 2] = 3
    examples = [Example("q", CONTEXT)]
    assert best_answers(windows, starts, ends, examples, may_be_empty=False) == ["four"]
    starts[:, 0] = 8  # sure that there is none in the first; in the second not
    starts[1, 0] = -9
    assert best_answers(windows, starts, ends, examples, may_be_empty=True) == ["four"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_against_every_span(seed: int, longest: int) -> None:
    rng = np.random.default_rng(seed)
    starts, ends = rng.normal(size=8), rng.normal(size=8)
    spans = [(starts[i] + ends[j], i, j) for i in range(3, 7) for j in range(i, 7) if j - i < longest]
    _, first, last = max(spans)
    expected = CONTEXT[OFFSETS[first][0] : OFFSETS[last][1]]
    assert best(starts, ends, longest=longest) == expected


def test_places_of_answers_give_the_answers_back(tokenizer: Tokenizer) -> None:
    """Of a real tokenizer: the tokens of an answer cover it, and no more than the words around it."""
    theirs = tokenizer_to_hugging_face(tokenizer, "bert", 32)
    context = made_up_text(3, 12)
    rng = np.random.default_rng(0)
    found, num_windows = 0, 0
    for _ in range(20):
        begin = int(rng.integers(0, len(context) - 12))
        answer = context[begin : begin + 10].strip()
        begin = context.index(answer, begin)
        example = Example("what is it", context, start=begin, answers=(answer,))
        windows = windows_of([example], theirs, 32, first=0)
        num_windows = len(windows)
        for window in windows:
            assert len(window.inputs["input_ids"]) <= 32
            first, last = positions_of(window, example)
            if (first, last) == (0, 0):
                continue
            found += 1
            text = context[window.offsets[first, 0] : window.offsets[last, 1]]
            assert answer in text
            inner = context[window.offsets[first, 1] : window.offsets[last, 0]]
            assert inner in answer or first == last
            starts, ends = np.zeros(32), np.zeros(32)
            starts[first], ends[last] = 1, 1
            assert best_answers([window], starts[None], ends[None], [example], False) == [text.strip()]
    assert num_windows > 3
    assert found >= 20  # every answer is in a window


def test_windows_cover_the_context_and_a_long_question_is_cut(tokenizer: Tokenizer) -> None:
    theirs = tokenizer_to_hugging_face(tokenizer, "bert", 32)
    context = made_up_text(5, 6)
    example = Example(made_up_text(6, 4), context)
    windows = windows_of([example], theirs, 32, first=7)
    covered = np.zeros(len(context), bool)
    for window in windows:
        assert window.example == 7
        inside = window.offsets[window.offsets[:, 0] != OUTSIDE]
        for begin, end in inside:
            covered[begin:end] = True
    assert all(covered[i] or context[i].isspace() for i in range(len(context)))
    for one, other in pairwise(windows):
        shared = set(map(tuple, one.offsets.tolist())) & set(map(tuple, other.offsets.tolist()))
        assert len(shared - {(OUTSIDE, OUTSIDE)}) == pytest.approx(8, abs=1)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_question_of_any_characters_leaves_room(tokenizer: Tokenizer, normalized: bool) -> None:
    """A character may be several tokens (its bytes, or what it is normalized to), and a question is cut before it."""
    theirs = tokenizer_to_hugging_face(tokenizer, "bert", 64)
    if normalized:
        theirs.backend_tokenizer.normalizer = normalizers.NFKC()
    characters = st.one_of(st.sampled_from("ab \t漢😀ﷺ"), st.characters(codec="utf-8"))

    @given(st.text(characters, max_size=30), st.text(characters, max_size=60), st.integers(8, 64))
    @example("é", "one two", 8)
    @example("😀ﷺ", "one two three four", 8)
    def check(question: str, context: str, max_length: int) -> None:
        for window in windows_of([Example(question, context)], theirs, max_length):
            assert len(window.inputs["input_ids"]) <= max_length
            beside = np.count_nonzero(window.offsets[:, 0] == OUTSIDE)
            assert beside <= max_length // 4 + 3

    check()


@pytest.mark.parametrize("answer", [" one", "one ", " two ", " three", "three ", " one two three ", "two"])
def test_spaces_around_an_answer_do_not_hide_it(tokenizer: Tokenizer, answer: str) -> None:
    theirs = tokenizer_to_hugging_face(tokenizer, "bert", 32)
    context = " one two three "
    question = Example("which", context, start=context.index(answer), answers=(answer,))
    (window,) = windows_of([question], theirs, 32)
    first, last = positions_of(window, question)
    assert context[window.offsets[first, 0] : window.offsets[last, 1]].strip() == answer.strip()
