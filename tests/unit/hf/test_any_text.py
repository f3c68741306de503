"""Any text through any tokenizer: ids in range, the promised text back, and the same ids and text in transformers."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizerFast

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import DataError
from raptr_ds.hf.tokenizer import tokenizer_to_hugging_face
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer
from raptr_ds.sentencepiece_model import read_sentencepiece_model
from tests.foreign_models import FOREIGN, SYMBOLS, UNUSUAL, brought, foreign_model, normalized
from tests.made_up_text import TextSource, made_up_text

OURS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SPELLS_SPECIAL = re.compile(r"\[[A-Z0-9]{3,4}\]|</?s>|<pad>|<unk>|<extra_id_\d+>", re.IGNORECASE)
# What texts are made of beside any character: words, spaces, marks that do and do not compose, and what looks special.
PARTS = [
    *SYMBOLS,
    *("the", "th", "othe", "e", "i"),
    *made_up_text(0, 1).split(" "),
    *(part for line in UNUSUAL for part in line.split(" ")),
    *("", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u2581", "\u3000", "\0", "\x01"),
    *("<0x41>", "<0x0A>", "<0x", "A>", "[MASK", "MASK]", "extra_id_0"),
    *map(chr, (*range(0x300, 0x330), 0x342, 0x345, 0x3099, 0x309A, 0xFF9E, 0xFF9F, 0x5B0, 0x5BC, 0x64E, 0x651, 0x654)),
    *(
        "a",
        "e",
        "i",
        "o",
        "E",
        "ê",
        "ẹ",
        "가",
        "\u1100",
        "\u1161",
        "\u11a8",
        "\u3131",
        "\u314f",
        "\uff45",
        "か",
        "\u0915",
    ),
]


@dataclass(frozen=True, repr=False)
class Case:
    """A tokenizer, its counterpart in transformers, and what sentencepiece itself is given to normalize with."""

    tokenizer: Tokenizer
    exported: PreTrainedTokenizerFast
    processor: SentencePieceProcessor
    options: dict[str, object]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    return {name: case_of(name, folder) for name in ("bpe", "unigram", *FOREIGN)}


def case_of(name: str, folder: Path) -> Case:
    if name in FOREIGN:
        options = FOREIGN[name]
        model = foreign_model(options)
        tokenizer = brought(model, folder)
    else:
        options = OURS
        settings = TokenizerSettings(vocab_size=500, num_sentinels=8, model_type="bpe" if name == "bpe" else "unigram")
        tokenizer = train_tokenizer([TextSource([made_up_text(0, 100), *UNUSUAL])], settings)
        model = tokenizer.model
    processor = SentencePieceProcessor(model_proto=model)
    return Case(tokenizer, tokenizer_to_hugging_face(tokenizer, "ul2", 100), processor, options)


def is_as_likely(case: Case, ids: list[int], other: list[int]) -> bool:
    """Return whether a unigram model may give either: sentencepiece adds up in float32, transformers in float64."""
    model = read_sentencepiece_model(case.tokenizer.model, case.tokenizer.origin)
    if model.model_type != "unigram" or case.tokenizer.decode(ids) != case.tokenizer.decode(other):
        return False
    processor = SentencePieceProcessor(model_proto=case.tokenizer.model)
    return math.isclose(sum(processor.get_score(ids)), sum(processor.get_score(other)), rel_tol=1e-5)


@given(text=st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=4)), max_size=12).map("".join))
@example("".join(UNUSUAL))
@example("\n".join(PARTS))
def test_any_text(cases: dict[str, Case], text: str) -> None:
    assume(not SPELLS_SPECIAL.search(text) and not set("\ufff0\ufff1") & set(text))
    for name, case in cases.items():
        ids = case.tokenizer.encode(text).tolist()
        assert all(0 <= token < case.tokenizer.vocab_size for token in ids)
        assert not case.tokenizer.is_special[ids].any()
        promised = normalized(case.processor, case.options, text)
        assert case.tokenizer.decode(ids) == promised, name
        assert case.exported.decode(ids) == promised, name
        exported = case.exported(text, verbose=False)["input_ids"]
        assert exported == ids or is_as_likely(case, ids, exported), name


@given(text=st.lists(st.one_of(st.text(max_size=3), st.sampled_from(["\ud800", "\udfff"])), max_size=5).map("".join))
def test_half_a_character_is_refused(cases: dict[str, Case], text: str) -> None:
    assume(any("\ud800" <= character < "\ue000" for character in text))
    for case in cases.values():
        with pytest.raises(DataError, match="half of a surrogate pair"):
            case.tokenizer.encode(text)
