"""Models that other projects trained: what they lack is added, nothing else changes, and what cannot be is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.masked_lm import MaskedLM
from raptr_ds.data.tokenizer import MASK, MODES, NAMED_SPECIALS, Tokenizer, sentinel_name
from raptr_ds.errors import DataError
from raptr_ds.prepare.brought_tokenizer import bring_tokenizer
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.indexing import Preparation, PreparationSettings
from raptr_ds.prepare.tokenizer_training import TokenizerSettings
from tests.foreign_models import FOREIGN, LLAMA, T5, UNUSUAL, brought, foreign_model, normalized
from tests.made_up_text import TextSource, documents_of, made_up_text

TEXTS = [
    *UNUSUAL,
    "\n".join(UNUSUAL),
    made_up_text(1, 5),
    "",
    " ",
    "\n\n",
    "@@@ a<url>b <|user|>\n<url>",
    "unseen 漢字 Ж\0",
]


@pytest.fixture(params=FOREIGN)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_nothing_but_what_is_missing_changes(name: str, tmp_path: Path) -> None:
    model = foreign_model(FOREIGN[name])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = brought(model, tmp_path)
    ids = range(theirs.get_piece_size())
    assert tokenizer.pieces(ids) == theirs.id_to_piece(list(ids))
    num_compared = 0
    for line in (line for text in TEXTS for line in text.split("\n")):
        expected = theirs.encode(line)
        if theirs.unk_id() not in expected:
            assert tokenizer.encode(line).tolist() == expected, line
            num_compared += 1
    assert num_compared > len(UNUSUAL)


def test_decoding_gives_the_normalized_text(name: str, tmp_path: Path) -> None:
    model = foreign_model(FOREIGN[name])
    tokenizer, theirs = brought(model, tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert not tokenizer.is_special[tokens].any()
        assert tokenizer.decode(tokens) == normalized(theirs, FOREIGN[name], text)


def test_it_has_every_special_token(name: str, tmp_path: Path) -> None:
    tokenizer = brought(foreign_model(FOREIGN[name]), tmp_path)
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id, tokenizer.sep_id]
    ids += [tokenizer.mask_id, *tokenizer.mode_ids.values(), *tokenizer.sentinel_ids.tolist()]
    assert len(set(ids)) == len(ids)
    assert tokenizer.is_special[ids].all()
    assert len(tokenizer.sentinel_ids) == (5 if name == "special tokens as symbols" else 8)
    written = " ".join((*NAMED_SPECIALS, sentinel_name(0), "<s>", "</s>", "<pad>", "<unk>", "<0x0A>"))
    assert not tokenizer.is_special[tokenizer.encode(written)].any()


def test_pieces_are_known_by_what_they_are_for(tmp_path: Path) -> None:
    t5 = brought(foreign_model(T5), tmp_path)
    assert t5.pieces([t5.pad_id, t5.eos_id, t5.unk_id, t5.bos_id]) == ["<pad>", "</s>", "<unk>", "[BOS]"]
    assert (t5.pad_id, t5.eos_id, t5.unk_id) == (0, 1, 2)
    llama = brought(foreign_model(LLAMA), tmp_path)
    assert llama.pieces([llama.unk_id, llama.bos_id, llama.eos_id, llama.pad_id]) == ["<unk>", "<s>", "</s>", "[PAD]"]
    assert (llama.unk_id, llama.bos_id, llama.eos_id, llama.pad_id) == (0, 1, 2, 500)


def test_what_is_added_is_named(tmp_path: Path) -> None:
    path = tmp_path / "their.model"
    path.write_bytes(foreign_model(LLAMA))
    tokenizer, added = bring_tokenizer(path, 100)
    modes = ", ".join(MODES)
    assert added == (
        f"{path} has 500 pieces; added at the end: [PAD], [CLS], [SEP], {MASK}, {modes}, 100 sentinels; 607 in all."
    )
    assert tokenizer.vocab_size == 607
    path.write_bytes(foreign_model(FOREIGN["special tokens as symbols"]))
    assert (
        "special tokens now, which no text produces: [PAD], [CLS], [MASK], <extra_id_0>" in bring_tokenizer(path, 9)[1]
    )
    path.write_bytes(foreign_model(T5))
    assert "256 byte pieces" in bring_tokenizer(path, 9)[1]


def test_a_model_that_lacks_nothing_stays_as_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "our.model"
    for complete, own in ((tokenizer, 100), (brought(foreign_model(T5), tmp_path), 8)):
        complete.save(path)
        for num_sentinels in (0, own, 256):
            same, note = bring_tokenizer(path, num_sentinels)
            assert same.model == complete.model
            kept = f"{path} lacks nothing; it keeps its {own} sentinels."
            assert note == ("" if num_sentinels == own else kept)


def test_words_are_found_in_lines_without_a_first_space(tmp_path: Path) -> None:
    tokenizer = brought(foreign_model(FOREIGN["gemma"]), tmp_path)
    text = tokenizer.encode("\n".join(made_up_text(2, 30).replace(".", "").split())).astype(np.int64)
    (ends,) = np.nonzero(text == tokenizer.newline_id)
    begins = np.concatenate([[0], ends + 1])
    lengths = dict(zip(begins.tolist(), np.diff(begins, append=len(text) + 1).tolist(), strict=True))
    sample = MaskedLM(tokenizer, len(text) + 2, 0.15, True).sample(text.copy(), np.random.default_rng(0))
    predicted = set((sample.positions - 1).tolist())
    for begin, length in lengths.items():  # with the newline behind it, which counts as a word of its own
        word = set(range(begin, begin + length - 1))
        assert word <= predicted or not word & predicted


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({**LLAMA, "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
        ({**T5, "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix=true"),
        ({"model_type": "char"}, "model_type=char"),
        ({"model_type": "word"}, "model_type=word"),
        ({**T5, "user_defined_symbols": ["\ufb01"]}, "user_defined_symbols that its normalization changes such as"),
        ({**LLAMA, "user_defined_symbols": ["\n"]}, "pieces with a new line"),
    ],
    ids=str,
)
def test_options_that_cannot_be_honoured_are_refused_by_name(
    options: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as raised:
        brought(foreign_model(options), tmp_path)
    assert named in str(raised.value)
    assert "their.model" in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        (b"\x1a\x02\x28\x00", "escape_whitespaces=false"),
        (b"\x0a\x08\x0a\x04zzzz\x18\x05", "unused pieces such as zzzz"),
    ],
    ids=["escape", "unused"],
)
def test_settings_that_no_training_option_gives_are_refused_by_name(setting: bytes, named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named):  # as bytes: what is appended to a protocol buffer is merged into it
        brought(foreign_model(LLAMA) + setting, tmp_path)


def test_what_only_a_special_token_spoils_is_refused(tmp_path: Path) -> None:
    options = {**LLAMA, "add_dummy_prefix": False, "split_by_unicode_script": False, "user_defined_symbols": ["zz"]}
    model = foreign_model(options, ["[CLS]"] * 4 + ["[CLS]ab"])
    with pytest.raises(DataError, match=r"beside pieces that no text becomes such as \['\[CLS\]ab'\]"):
        brought(model, tmp_path)


@pytest.mark.parametrize("option", ["normalization_rule_tsv", "denormalization_rule_tsv"])
def test_rules_of_ones_own_are_refused_by_name(option: str, tmp_path: Path) -> None:
    (tmp_path / "rules.tsv").write_text("61 62\t63\n")
    options = {key: value for key, value in LLAMA.items() if key != "normalization_rule_name"}
    with pytest.raises(DataError, match=f"has {option}"):
        brought(foreign_model({**options, option: tmp_path / "rules.tsv"}), tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    model = foreign_model(LLAMA)
    for content in (b"", b"no model", b"\x0a\x02\xff\xff", model[:-5], model[:100], model[1:]):
        with pytest.raises(DataError, match=r"their\.model"):
            brought(content, tmp_path)


def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 5000), "a\0b"):
        with pytest.raises(DataError, match="cannot read the tokenizer"):
            bring_tokenizer(path, 8)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_folder_is_prepared_with_it(name: str, sources: list[FileSource], tmp_path: Path) -> None:
    model = foreign_model(FOREIGN[name])
    path = tmp_path / "their.model"
    path.write_bytes(model)
    printed: list[str] = []
    settings = PreparationSettings(TokenizerSettings(num_sentinels=16), str(path), 0.1, min_validation_tokens=100)
    documents = [text.replace("a", UNUSUAL[5]) for text in (made_up_text(seed, 2) for seed in range(20))]
    preparation = Preparation([TextSource(documents)], tmp_path / "data", settings, report=printed.append)
    manifest = preparation.run()
    assert any(line.startswith(f"{path} has ") and "16 sentinels" in line for line in printed)
    tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer.model")
    assert manifest.vocab_size == tokenizer.vocab_size == brought(model, tmp_path, 16).vocab_size
    assert manifest.tokenizer_digest == tokenizer.digest
    splits = [open_indexed(tmp_path / "data" / split, tokenizer.vocab_size) for split in ("train", "validation")]
    texts = sorted(tokenizer.decode(tokens[:-1]) for split in splits for tokens in documents_of(split))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert texts == sorted(normalized(theirs, FOREIGN[name], text) for text in documents)
    preparation.run()
    assert printed[-1].endswith("is up to date: nothing to do.")
    more = replace(settings, tokenizer=TokenizerSettings(num_sentinels=17))
    with pytest.raises(DataError, match="other settings"):
        replace(preparation, settings=more).run()
