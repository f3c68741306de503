"""The tokenizer in transformers: the ids that pretraining has, special tokens and pairs included, and text back."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from raptr_ds.data import masked_lm
from raptr_ds.data.denoisers import replace_spans
from raptr_ds.data.tokenizer import WORD_BOUNDARY, Tokenizer
from raptr_ds.errors import DataError
from raptr_ds.hf.tokenizer import SAMPLE_TEXTS, check_same_ids, tokenizer_to_hugging_face
from raptr_ds.sentencepiece_model import read_sentencepiece_model
from tests.foreign_models import LLAMA, UNUSUAL, brought, foreign_model
from tests.made_up_text import made_up_text

TEXTS = [
    "the cat sat on the mat",
    "  two spaces before,  two between and two after  ",
    "first line\nsecond line\n\nafter an empty one\n",
    "\n\nempty lines first",
    "\tindented\n    four spaces\n",
    "unseen: \u4f60\u597d \U0001f600 \u00e9\u00e8",
    "digits 1234567890 and (punctuation) [brackets] <angles>",
    "",
]
WORD, OTHER_WORD = "a", "d"


def as_it_comes_back(tokenizer: Tokenizer, text: str) -> str:
    """Return what a tokenizer keeps of a text in which only tabs, ellipses and spaces are not as T5 has them."""
    if not read_sentencepiece_model(tokenizer.model, tokenizer.origin).remove_extra_whitespaces:
        return text
    lines = text.replace("\t", " ").replace("\u2026", "...").split("\n")
    return "\n".join(" ".join(filter(None, line.split(" "))) for line in lines)


@pytest.fixture
def for_bert(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return tokenizer_to_hugging_face(tokenizer, "bert", 24)


@pytest.fixture
def for_ul2(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return tokenizer_to_hugging_face(tokenizer, "ul2", 24)


def ids_of(exported: PreTrainedTokenizerFast, text: str) -> list[int]:
    return exported(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_and_text_are_ours(tokenizer: Tokenizer, for_ul2: PreTrainedTokenizerFast, text: str) -> None:
    ids = for_ul2(text)["input_ids"]
    assert ids == tokenizer.encode(text).tolist()
    assert for_ul2.decode(ids) == as_it_comes_back(tokenizer, text)


def test_ids_of_much_text_are_ours(tokenizer: Tokenizer, for_ul2: PreTrainedTokenizerFast, prose: list[str]) -> None:
    lines = [line for topic in prose[30:60] for line in topic.splitlines() if line.strip()]
    assert len(lines) > 500
    check_same_ids(tokenizer, for_ul2, [*lines, *prose[60:70], *SAMPLE_TEXTS, *UNUSUAL])
    decoded = [for_ul2.decode(ids_of(for_ul2, line)) for line in lines]
    assert decoded == [as_it_comes_back(tokenizer, line) for line in lines]


def test_a_special_token_in_a_text_stands_for_a_piece(tokenizer: Tokenizer, for_ul2: PreTrainedTokenizerFast) -> None:
    """As where pretraining replaces a piece: it takes the word boundary before it along, and nothing else."""
    ids = {piece: token for token, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))}
    space = (
        []
        if read_sentencepiece_model(tokenizer.model, tokenizer.origin).remove_extra_whitespaces
        else [ids[WORD_BOUNDARY]]
    )
    continued, newline = [ids[OTHER_WORD]], [tokenizer.newline_id]
    word, other = tokenizer.encode(WORD).tolist(), tokenizer.encode(OTHER_WORD).tolist()
    specials = tokenizer.pieces(np.flatnonzero(tokenizer.is_special))
    assert len(specials) == 18
    for name in specials:
        special = [ids[name]]
        written_as_decoded = {
            name: special,
            f"{name} d": [*special, *other],
            f"{name}d": [*special, *continued],
            f"a {name}": [*word, *special],
            f"a {name} d": [*word, *special, *other],
            f"a {name}d": [*word, *special, *continued],
            f"a  {name}": [*word, *space, *special],
            f" {name} ": [*space, *special, *space],
            f"a\n{name}\nd": [*word, *newline, *special, *newline, *other],
            f"a \n {name} d": [*word, *space, *newline, *space, *special, *other],
            f"{name} {name} a {name}": [*special, *special, *word, *special],
            f"a {name} [S2S] d": [*word, *special, ids["[S2S]"], *other],
        }
        without_a_space = {
            f"a{name} d": [*word, *special, *other],
            f"a{name}d": [*word, *special, *continued],
            f"{name}{name}d": [*special, *special, *continued],
        }
        for text, expected in [*written_as_decoded.items(), *without_a_space.items()]:
            assert ids_of(for_ul2, text) == expected, text
            assert ids_of(for_ul2, for_ul2.decode(expected)) == expected, text
            if special != [tokenizer.unk_id]:  # which no text has; sentencepiece shows it as a question mark
                assert for_ul2.decode(expected, skip_special_tokens=True) == tokenizer.decode(expected), text
        for text, expected in written_as_decoded.items():
            assert for_ul2.decode(expected) == as_it_comes_back(tokenizer, text)


def test_masked_samples_come_back_from_their_text(
    tokenizer: Tokenizer, for_bert: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_lm, "MASKED_SHARE", 1.0)
    objective = masked_lm.MaskedLM(tokenizer, 200, 0.15, whole_word=True)
    rng = np.random.default_rng(0)
    for seed in range(20):
        text = made_up_text(seed, 4)
        sample = objective.sample(tokenizer.encode(text).astype(np.int64), rng, room=4096)
        masked = for_bert.decode(sample.tokens)
        assert masked.count("[MASK]") == len(sample.positions) > 0
        assert ids_of(for_bert, masked) == sample.tokens.tolist()
        inside = masked.removeprefix("[CLS] ").removesuffix(" [SEP]")
        assert for_bert(inside, verbose=False)["input_ids"] == sample.tokens.tolist()


def test_samples_with_sentinels_come_back_from_their_text(
    tokenizer: Tokenizer, for_ul2: PreTrainedTokenizerFast
) -> None:
    for seed in range(20):
        tokens = tokenizer.encode(made_up_text(seed, 3))
        words = np.append(np.flatnonzero(tokenizer.starts_word[tokens]), len(tokens))
        starts, ends = words[2:-3:4], words[4:-1:4]
        inputs, targets = replace_spans(tokens, starts[:8], (ends - starts)[:8], tokenizer.sentinel_ids)
        sample = [tokenizer.mode_ids["[NLU]"], *inputs.tolist(), *targets.tolist(), tokenizer.eos_id]
        assert ids_of(for_ul2, for_ul2.decode(sample)) == sample


def test_a_pair_is_as_bert_has_it(tokenizer: Tokenizer, for_bert: PreTrainedTokenizerFast) -> None:
    first, second = tokenizer.encode("the cat").tolist(), tokenizer.encode("a mat").tolist()
    cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
    one = for_bert("the cat")
    assert one["input_ids"] == [*cls, *first, *sep]
    assert one["token_type_ids"] == [0] * (len(first) + 2)
    pair = for_bert("the cat", "a mat", return_special_tokens_mask=True)
    assert pair["input_ids"] == [*cls, *first, *sep, *second, *sep]
    assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert pair["special_tokens_mask"] == [1, *[0] * len(first), 1, *[0] * len(second), 1]
    assert pair["attention_mask"] == [1] * len(pair["input_ids"])
    assert pair.sequence_ids() == [None, *[0] * len(first), None, *[1] * len(second), None]
    assert for_bert.num_special_tokens_to_add(pair=True) == 3
    assert for_bert("the cat", "a mat", add_special_tokens=False)["input_ids"] == [*first, *second]
    assert for_bert.decode(pair["input_ids"]) == "[CLS] the cat [SEP] a mat [SEP]"
    assert for_bert(["the cat"], [""])["input_ids"] == [[*cls, *first, *sep, *sep]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_of_a_pair(tokenizer: Tokenizer, for_bert: PreTrainedTokenizerFast, side: str) -> None:
    for_bert.truncation_side = side
    texts = "the cat sat on the mat and slept", "it was a mat"
    first, second = (tokenizer.encode(text).tolist() for text in texts)
    assert len(first) > len(second) > 4

    def cut(ids: list[int], length: int) -> list[int]:
        return ids[:length] if side == "right" else ids[len(ids) - length :]

    def pair(*parts: list[int]) -> list[int]:
        return [tokenizer.cls_id, *parts[0], tokenizer.sep_id, *parts[1], tokenizer.sep_id]

    length = len(first) + len(second)  # three ends: three tokens too many
    for strategy, parts in {
        "only_first": (cut(first, len(first) - 3), second),
        "only_second": (first, cut(second, len(second) - 3)),
        "longest_first": (cut(first, len(first) - 3), second),
    }.items():
        assert for_bert(*texts, truncation=strategy, max_length=length)["input_ids"] == pair(*parts), strategy
    assert len(for_bert("the cat " * 40, truncation=True)["input_ids"]) == 24  # the model's length


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_a_batch_of_pairs(tokenizer: Tokenizer, for_bert: PreTrainedTokenizerFast, side: str) -> None:
    for_bert.padding_side = side
    pairs = [("the cat sat", "on a mat"), ("a", "d")]
    singles = [for_bert(*pair) for pair in pairs]
    batch = for_bert([first for first, _ in pairs], [second for _, second in pairs], padding=True)
    longest = len(singles[0]["input_ids"])
    for row, single in enumerate(singles):
        missing = longest - len(single["input_ids"])
        for key, filler in {"input_ids": tokenizer.pad_id, "token_type_ids": 0, "attention_mask": 0}.items():
            padding = [filler] * missing
            assert batch[key][row] == (single[key] + padding if side == "right" else padding + single[key]), key


def test_the_default_side_of_padding(for_bert: PreTrainedTokenizerFast, for_ul2: PreTrainedTokenizerFast) -> None:
    assert (for_bert.padding_side, for_ul2.padding_side) == ("right", "left")
    assert "token_type_ids" not in for_ul2("the cat")


def test_offsets_lead_to_the_text(tokenizer: Tokenizer, for_bert: PreTrainedTokenizerFast) -> None:
    texts = "the cat [MASK] here,\n  on line two [MASK]", "and [MASK]ing"
    pair = for_bert(*texts, return_offsets_mapping=True)
    pieces = tokenizer.pieces(pair["input_ids"])
    masks = []
    for piece, (start, end), sequence in zip(pieces, pair["offset_mapping"], pair.sequence_ids(), strict=True):
        if sequence is None:
            assert (start, end) == (0, 0)
        elif piece == "[MASK]":
            masks.append(texts[sequence][start:end])
        elif piece != "<0x0A>":
            assert texts[sequence][start:end].strip() == piece.strip(WORD_BOUNDARY)
    assert masks == ["[MASK]"] * 3


def test_other_ids_are_refused_with_the_first_difference(prose: list[str], tmp_path: Path) -> None:
    tokenizer = brought(foreign_model(LLAMA), tmp_path)
    other = brought(foreign_model(LLAMA, made_up_text(1, 200).split("\n")), tmp_path)
    with pytest.raises(DataError, match=r"their\.model.*'(?s:.*)tokens here and") as raised:
        check_same_ids(tokenizer, tokenizer_to_hugging_face(other, "bert", 24), [made_up_text(1, 3), *prose])
    assert made_up_text(1, 1)[:20] in str(raised.value)
