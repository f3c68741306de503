"""The tokenizer: nothing is lost, special tokens cannot be written, and what is missing is named."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from raptr_ds.data.tokenizer import NAMED_SPECIALS, Tokenizer, sentinel_name
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, sample_documents, train_tokenizer
from tests.full_disk import largest_file
from tests.made_up_text import TextSource, text_of

LINES = ["the cat sat on the mat and the dog sat on the log"] * 20


@pytest.mark.parametrize(
    "text",
    ["", "one", "  two  spaces ", "a\n\n\tb \n", "日本語 \U0001f40d", "a\0b", "\r\n", " ", "\n", "1234 5.6"],
)
def test_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert text_of(tokenizer, tokenizer.encode(text)) == text


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    written = " ".join((*NAMED_SPECIALS, sentinel_name(0), sentinel_name(99), "<0x0A>", "<unk>", "<s>"))
    tokens = tokenizer.encode(written + "\n" + written.replace(" ", ""))
    assert not tokenizer.is_special[tokens].any()
    assert text_of(tokenizer, tokens).split("\n")[0] == written


def test_ids_are_where_they_should_be(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_id == 0
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id]
    ids += [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, *tokenizer.mode_ids.values()]
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert processor.id_to_piece(ids) == list(NAMED_SPECIALS)
    assert processor.id_to_piece(tokenizer.sentinel_ids.tolist()) == [sentinel_name(i) for i in range(100)]
    assert int(tokenizer.is_special.sum()) == len(NAMED_SPECIALS) + 100
    assert not set(tokenizer.text_ids.tolist()) & {*ids, *tokenizer.sentinel_ids.tolist()}


def test_a_file_that_is_replaced_is_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.model"
    file.write_text("the old one")
    with largest_file(len(tokenizer.model) - 1), pytest.raises(OSError, match="File too large"):
        tokenizer.save(file)
    assert file.read_text() == "the old one"
    tokenizer.save(file)
    assert Tokenizer.load(file).digest == tokenizer.digest


def test_words_start_at_spaces_and_lines(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("zebra quixotic\nzebra")
    starts = tokenizer.starts_word[tokens]
    words = np.split(tokens, np.flatnonzero(starts)[1:])
    assert [text_of(tokenizer, word) for word in words] == ["zebra", "quixotic", "\n", "zebra"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(model_type: str) -> None:
    settings = TokenizerSettings(num_sentinels=8, model_type=model_type)  # type: ignore[arg-type]
    first, second = (train_tokenizer([TextSource(LINES)], settings) for _ in range(2))
    assert first.model == second.model
    assert first.digest == second.digest


def test_vocabulary_too_large_gives_the_largest() -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size 5000 is too large .* largest possible is (\d+)") as caught:
        train_tokenizer([TextSource(LINES)], TokenizerSettings(vocab_size=5000, num_sentinels=8))
    largest = int(str(caught.value).split("possible is ")[1].split(".")[0])
    assert train_tokenizer([TextSource(LINES)], TokenizerSettings(largest, 8)).vocab_size == largest
    assert train_tokenizer([TextSource(LINES)], TokenizerSettings(None, 8)).vocab_size == largest


@pytest.mark.parametrize("size", [20, 275])
def test_vocabulary_too_small_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"--vocab-size {size} .*Raise"):
        train_tokenizer([TextSource(LINES)], TokenizerSettings(vocab_size=size, num_sentinels=8))


def test_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([TextSource([])], TokenizerSettings())


def test_foreign_model_names_what_is_missing() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=18, user_defined_symbols=["[MASK]"], minloglevel=2
    )
    with pytest.raises(DataError, match=r"lacks \[PAD\].*\[MASK\].*byte_fallback.*--tokenizer FILE"):
        Tokenizer(model.getvalue(), "foreign.model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        Tokenizer(b"something else", "foreign.model")
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.load("/nowhere/x.model")


def test_the_sample_takes_a_share_of_every_source() -> None:
    large, small = TextSource(["x" * 10] * 1000), TextSource(["y" * 10] * 3)
    sample = "".join(sample_documents([large, small], 200))
    assert sample.count("y") == 30
    assert 170 <= sample.count("x") <= 180
