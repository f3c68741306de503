"""What a run is made of, and what differs where it continues."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.data.digest import corpus_digest
from raptr_ds.errors import CheckpointError, DataError
from raptr_ds.runtime.identity import IDENTITY, Identity, changes_since

CONFIG = {"train_batch_size": 8, "raptr_ds": {"train": {"seed": 1, "save": "a"}, "log": {"interval": 1}}}
HERE = Identity("t1", "c1", CONFIG)
FOLDER = Path("run/checkpoints/step-00000009")


def recorded(**changes: Any) -> dict[str, Any]:
    return {IDENTITY: {**asdict(HERE), **changes}}


def test_the_same_run_has_no_changes() -> None:
    changes = changes_since(recorded(), HERE, FOLDER)
    assert (changes.keys, changes.corpus, changes.lines) == ({}, None, [])


def test_another_tokenizer_is_refused_with_both_digests_and_the_ways_out() -> None:
    with pytest.raises(
        CheckpointError, match=r"step-00000009 was trained.*digest t0.*digest t1.*--tokenizer FILE.*none"
    ):
        changes_since(recorded(tokenizer="t0"), HERE, FOLDER)


def test_another_corpus_is_a_warning_with_both_digests() -> None:
    changes = changes_since(recorded(corpus="c0"), HERE, FOLDER)
    assert changes.corpus == ("c0", "c1")
    (line,) = changes.lines
    assert line.startswith("warning: the corpus is another than the checkpoint's (digest c0 there, c1 here)")


def test_keys_that_matter_are_listed_and_others_are_not() -> None:
    there = {"train_batch_size": 4, "raptr_ds": {"train": {"seed": 2, "save": "b"}, "log": {"interval": 7}}}
    changes = changes_since(recorded(config=there), HERE, FOLDER)
    assert changes.keys == {"raptr_ds.train.seed": (2, 1), "train_batch_size": (4, 8)}
    assert changes.lines == [
        "changed since the checkpoint: raptr_ds.train.seed=2, now 1",
        "changed since the checkpoint: train_batch_size=4, now 8",
    ]


def test_a_key_that_an_earlier_version_did_not_have_had_its_default() -> None:
    there = {"train_batch_size": 8, "raptr_ds": {"train": {"save": "a"}, "path": {"method": "raptr"}}}
    path = {"method": "raptr", "fixed_layers": [0, -1]}
    here = Identity("t1", "c1", {**CONFIG, "raptr_ds": {"train": {"seed": 1234, "save": "a"}, "path": path}})
    assert changes_since(recorded(config=there), here, FOLDER).keys == {}


@pytest.mark.parametrize(
    ("before", "now", "is_change"),
    [([4, 8], [12], True), ([4, 8], [6, 6], True), ([6, 6], [12], False), ([3, 3, 3, 3], [6, 6], False)],
)
def test_other_layers_of_stages_are_listed_where_paths_are_balanced_over_them(
    before: list[int], now: list[int], is_change: bool
) -> None:
    def config(layers: list[int], path: dict[str, Any]) -> dict[str, Any]:
        return {"raptr_ds": {"model": {"num_layers": 12}, "parallel": {"pipeline_layers": layers}, "path": path}}

    for path, expected in (({"balance_stages": 2}, is_change), ({}, False)):
        here = Identity("t1", "c1", config(now, path))
        changes = changes_since(recorded(config=config(before, path)), here, FOLDER)
        assert changes.keys == ({"raptr_ds.parallel.pipeline_layers": (before, now)} if expected else {})


def test_a_key_without_effect_that_an_earlier_version_kept_is_no_change() -> None:
    kept = {"zero_allow_untested_optimizer": True, "gradient_predivide_factor": 1.0}
    assert changes_since(recorded(config={**CONFIG, **kept}), HERE, FOLDER).keys == {}
    there = {**CONFIG, **kept, "prescale_gradients": True}
    assert changes_since(recorded(config=there), HERE, FOLDER).keys == {"prescale_gradients": (True, None)}


def test_a_checkpoint_of_an_earlier_version_is_not_compared_and_that_is_printed() -> None:
    (line,) = changes_since({"step": 3}, HERE, FOLDER).lines
    assert "does not record its tokenizer and corpus" in line


def folder_of(path: Path, content: bytes) -> str:
    path.mkdir()
    for name in ("train.idx", "train.bin", "validation.idx", "validation.bin"):
        (path / name).write_bytes(name.encode() + content)
    return str(path)


def test_the_corpus_is_its_content_weights_and_order(tmp_path: Path) -> None:
    one, copy, other = (
        folder_of(tmp_path / name, content)
        for name, content in (("1", b"a" * 999), ("2", b"a" * 999), ("3", b"b" * 999))
    )
    assert corpus_digest({one: 1.0}) == corpus_digest({copy: 1})
    different = [{one: 1.0}, {other: 1.0}, {one: 2.0}, {one: 1.0, other: 1.0}, {other: 1.0, one: 1.0}]
    assert len({corpus_digest(folders) for folders in different}) == len(different)
    for name in ("train.idx", "validation.bin"):
        path = Path(copy) / name
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        assert corpus_digest({one: 1.0}) != corpus_digest({copy: 1.0}), name
        path.write_bytes(path.read_bytes()[:-1] + b"a")
    (Path(copy) / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin"):
        corpus_digest({copy: 1.0})


def test_of_a_large_file_the_beginning_the_end_and_what_lies_between_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raptr_ds.data.digest._MAX_BLOCKS", 5)
    monkeypatch.setattr("raptr_ds.data.digest._BLOCK_BYTES", 10)
    folder = folder_of(tmp_path / "data", bytes(1000))
    path, first = Path(folder) / "train.bin", corpus_digest({folder: 1.0})
    content = path.read_bytes()
    for place in (0, 9, len(content) - 1, len(content) // 4):
        path.write_bytes(content[:place] + b"!" + content[place + 1 :])
        assert corpus_digest({folder: 1.0}) != first, place
    path.write_bytes(content + b"\0")
    assert corpus_digest({folder: 1.0}) != first
    path.write_bytes(content)
    assert corpus_digest({folder: 1.0}) == first
