"""Indexed tokens: the same bytes as megatron-core's, and every kind of damage is an error that names the file."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from raptr_ds.data.indexed import HEADER, open_indexed
from raptr_ds.errors import DataError
from raptr_ds.prepare.index_writer import token_dtype, write_index
from tests.made_up_text import documents_of

VOCAB_SIZE = 800


def write(prefix: Path, documents: list[list[int]], dtype: np.dtype) -> None:
    prefix.with_suffix(".bin").write_bytes(b"".join(np.array(document, dtype).tobytes() for document in documents))
    write_index(prefix.with_suffix(".idx"), np.array([len(document) for document in documents]), dtype)


@pytest.mark.parametrize("vocab_size", [800, 100_000])
@pytest.mark.filterwarnings("ignore")
def test_bytes_are_those_of_megatron(tmp_path: Path, vocab_size: int) -> None:
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 800, rng.integers(1, 50)).tolist() for _ in range(20)]
    write(tmp_path / "ours", documents, token_dtype(vocab_size))
    dtype = megatron.DType.optimal_dtype(vocab_size)
    assert np.dtype(dtype) == token_dtype(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    ours = open_indexed(tmp_path / "theirs", vocab_size)
    assert [document.tolist() for document in documents_of(ours)] == documents
    assert [theirs[number].tolist() for number in range(len(documents))] == documents
    assert ours.tokens.read(0, len(ours.tokens)).tolist() == [token for document in documents for token in document]


@pytest.fixture
def split(data_folder: Path, tmp_path: Path) -> Path:
    for suffix in ("bin", "idx"):
        shutil.copy(data_folder / f"train.{suffix}", tmp_path)
    return tmp_path / "train"


def refused(split: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        open_indexed(split, VOCAB_SIZE)
    assert str(split) in str(caught.value)
    assert "prepare_data.py" in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "content", "match"),
    [
        (".bin", None, r"cannot read .*train\.bin"),
        (".idx", None, r"cannot read .*train\.idx"),
        (".bin", b"", r"train\.bin is truncated: 0 bytes"),
        (".idx", b"", r"train\.idx is truncated"),
        (".idx", b"not an index, but long enough to be", "not an index of tokens"),
    ],
)
def test_missing_and_empty_files(split: Path, suffix: str, content: bytes | None, match: str) -> None:
    path = split.with_suffix(suffix)
    path.unlink() if content is None else path.write_bytes(content)
    refused(split, match)


def test_no_documents_and_no_tokens(split: Path) -> None:
    write(split, [], token_dtype(VOCAB_SIZE))
    refused(split, "empty")
    write(split, [[], []], token_dtype(VOCAB_SIZE))
    refused(split, "empty")


def test_every_truncation_is_noticed(split: Path) -> None:
    for suffix in (".bin", ".idx"):
        path = split.with_suffix(suffix)
        content = path.read_bytes()
        for size in {0, 1, HEADER.size - 1, HEADER.size, len(content) // 2, len(content) - 1, len(content) - 2}:
            path.write_bytes(content[:size])
            refused(split, "truncated|damaged")
        path.write_bytes(content + b"\0\0")
        refused(split, "longer|damaged")
        path.write_bytes(content)
    open_indexed(split, VOCAB_SIZE)


def test_every_bit_of_the_index_matters(split: Path) -> None:
    path = split.with_suffix(".idx")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    places = {*range(HEADER.size + 40), *rng.integers(0, len(content), 200).tolist()}
    for place in sorted(places):
        for bit in rng.permutation(8)[:3].tolist():
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            # Only the boundaries of documents, which training does not read, may change unnoticed.
            if place < len(content) - 8 * (open_lengths(content) + 1):
                refused(split, "damaged|truncated|not an index|holds tokens of kind|empty|longer")


def open_lengths(content: bytes) -> int:
    return HEADER.unpack(content[: HEADER.size])[3]


def test_ids_outside_the_vocabulary(split: Path) -> None:
    with pytest.raises(DataError, match=r"token id \d+, outside the tokenizer's vocabulary of 300"):
        open_indexed(split, 300)
    write(split, [[5, -1]], np.dtype(np.int32))
    refused(split, "token id -1")


def test_damage_that_the_check_at_opening_missed_is_found(tmp_path: Path) -> None:
    tokens = np.zeros(3 << 20, np.uint16)  # more than are checked
    tokens[1500] = 500
    tokens.tofile(tmp_path / "train.bin")
    write_index(tmp_path / "train.idx", np.array([len(tokens)]), tokens.dtype)
    opened = open_indexed(tmp_path / "train", 500)
    assert not opened.tokens.read(0, 1500).any()
    with pytest.raises(
        DataError, match=r"train\.bin holds the token id 500, outside the tokenizer's vocabulary of 500"
    ):
        opened.tokens.read(0, 1501)


def test_a_file_that_becomes_shorter_is_an_error_and_no_signal(split: Path) -> None:
    """A mapped file would end the process by SIGBUS."""
    opened = open_indexed(split, VOCAB_SIZE)
    whole = opened.tokens.read(0, len(opened.tokens))
    first = opened.document(0).tolist()
    os.truncate(split.with_suffix(".idx"), 0)
    assert opened.document(0).tolist() == first
    os.truncate(split.with_suffix(".bin"), 1001)
    assert opened.tokens.read(100, 300).tolist() == whole[100:400].tolist()
    with pytest.raises(DataError, match=r"train\.bin has become shorter.*before token 600 of"):
        opened.tokens.read(300, 300)
    with pytest.raises(DataError, match=r"train\.bin has become shorter"):
        opened.document(len(opened.lengths) - 1)


def test_every_token_of_a_small_file_is_checked(split: Path) -> None:
    good = split.with_suffix(".bin").read_bytes()
    for token in (0, 1023, 1024, 5000, len(good) // 2 - 1):
        damaged = bytearray(good)
        damaged[2 * token : 2 * token + 2] = b"\xff\xff"
        split.with_suffix(".bin").write_bytes(damaged)
        refused(split, "holds the token id 65535")
