"""The loader: pure in (seed, step, rank), free of the layout, checked before the first step."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raptr_ds.data.batch import MicroBatch, StepBatch
from raptr_ds.data.loader import Loader, build_loader, load_tokenizer
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import DataError
from raptr_ds.prepare.indexing import Preparation, PreparationSettings
from tests.made_up_text import TextSource, made_up_text, text_of

SEQ_LENGTH = 64
TENSORS = [field.name for field in dataclasses.fields(MicroBatch) if field.name not in {"is_full", "segments"}]


def geometry(micro: int, accumulation: int, data_parallel: int) -> SimpleNamespace:
    size = micro * accumulation * data_parallel
    return SimpleNamespace(global_batch=size, micro_batch=micro, accumulation=accumulation, data_parallel=data_parallel)


def loader(path: Any, architecture: str = "bert", batch: Any = None, **changes: Any) -> Loader:
    """Build a loader; `changes` go to whichever section has the key."""
    data = SimpleNamespace(
        path=path if isinstance(path, dict) else str(path), tokenizer=None, packing=False, num_workers=0, prefetch=2
    )
    objective = SimpleNamespace(mask_rate=0.15, whole_word=False, denoisers="ul2")
    model = SimpleNamespace(architecture=architecture, seq_length=SEQ_LENGTH, vocab_size=0)
    run = {"seed": 1234, "dp_rank": 0}
    for key, value in changes.items():
        owner = next((section for section in (data, objective, model) if hasattr(section, key)), None)
        if owner is None:
            run[key] = value
        else:
            setattr(owner, key, value)
    return build_loader(data, objective, model, batch or geometry(12, 1, 1), **run)


def same(first: StepBatch, second: StepBatch) -> bool:
    pairs = list(zip(first.micro_batches, second.micro_batches, strict=True))
    same_tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in TENSORS)
    return same_tensors and all(a.is_full == b.is_full for a, b in pairs)


def by_sample(batches: list[StepBatch]) -> dict[int, tuple[list[int], ...]]:
    """Return everything that belongs to each sample, by its number."""
    found = {}
    for batch in (micro for step in batches for micro in step.micro_batches):
        rows = batch.positions // SEQ_LENGTH
        for row, number in enumerate(batch.sample_ids.tolist()):
            mine = rows == row
            found[number] = (
                batch.tokens[row].tolist(),
                (batch.positions[mine] - row * SEQ_LENGTH).tolist(),
                batch.targets[mine].tolist(),
                [int(batch.prefix_lengths[row]), int(batch.lengths[row])],
            )
    return found


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("kind", ["train", "validation"])
def test_samples_do_not_depend_on_the_layout(data_folder: Path, architecture: str, kind: str) -> None:
    def batches(micro: int, accumulation: int, data_parallel: int) -> dict[int, tuple[list[int], ...]]:
        shape = geometry(micro, accumulation, data_parallel)
        loaders = [loader(data_folder, architecture, shape, dp_rank=rank) for rank in range(data_parallel)]
        return by_sample([one.at(3) if kind == "train" else one.validation(3) for one in loaders])

    expected = batches(12, 1, 1)
    assert sorted(expected) == list(range(36, 48))
    for layout in ((1, 12, 1), (1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 1, 3), (6, 2, 1)):
        assert batches(*layout) == expected


def test_samples_go_to_ranks_and_micro_batches_by_position(data_folder: Path) -> None:
    shape = geometry(2, 3, 2)
    for rank in range(2):
        ids = [
            batch.sample_ids.tolist() for batch in loader(data_folder, batch=shape, dp_rank=rank).at(1).micro_batches
        ]
        assert ids == [[12 + (m * 2 + rank) * 2 + i for i in range(2)] for m in range(3)]


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_shapes_and_values(data_folder: Path, tokenizer: Tokenizer, architecture: str) -> None:
    for batch in loader(data_folder, architecture, geometry(5, 2, 1)).at(0).micro_batches:
        assert batch.tokens.shape == (5, SEQ_LENGTH)
        assert batch.positions.shape == batch.targets.shape
        assert batch.prefix_lengths.shape == batch.lengths.shape == batch.sample_ids.shape == (5,)
        assert all(getattr(batch, name).dtype == torch.int64 for name in TENSORS)
        assert batch.is_full == bool((batch.lengths == SEQ_LENGTH).all())
        assert (batch.positions.diff() > 0).all()
        assert batch.positions[0] >= 0
        assert batch.positions[-1] < 5 * SEQ_LENGTH
        place = torch.arange(SEQ_LENGTH)
        assert torch.equal(batch.tokens == tokenizer.pad_id, place >= batch.lengths[:, None])
        if architecture == "bert":
            assert torch.equal(batch.prefix_lengths, batch.lengths)
            assert not (batch.tokens.flatten()[batch.positions] == tokenizer.sep_id).any()
        else:
            assert (batch.prefix_lengths < batch.lengths).all()
            assert torch.equal(batch.tokens.flatten()[batch.positions + 1], batch.targets)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_step_at_any_time_is_the_same(data_folder: Path, workers: int) -> None:
    expected = [loader(data_folder).at(step) for step in range(8)]
    with loader(data_folder, num_workers=workers) as one:
        for step in (0, 1, 2, 7, 3, 4, 4, 0, 6, 5):
            assert same(one.at(step), expected[step])
            one.validation(step)
    assert not same(expected[0], expected[1])
    assert not same(loader(data_folder, seed=5).at(0), expected[0])


def test_validation_does_not_depend_on_the_seed_and_is_other_text(data_folder: Path) -> None:
    first = loader(data_folder)
    assert same(first.validation(0), loader(data_folder, seed=5).validation(0))
    assert not same(first.validation(0), first.validation(1))
    assert not same(first.validation(0), first.at(0))


def test_the_same_samples_whatever_the_batch_size(data_folder: Path) -> None:
    small = by_sample([loader(data_folder, batch=geometry(4, 1, 1)).at(step) for step in range(6)])
    large = by_sample([loader(data_folder, batch=geometry(8, 1, 1)).at(step) for step in range(3)])
    assert small == large


def test_micro_batches_of_other_sizes_hold_the_same_samples(data_folder: Path) -> None:
    """A step may be cut up in another way: each rank still has its share, and evaluation keeps the geometry's."""
    sizes, steps = {0: 6, 1: 3, 2: 1}, range(3)
    usual = [loader(data_folder, batch=geometry(1, 6, 2), dp_rank=rank) for rank in range(2)]
    other = [
        loader(
            data_folder, batch=geometry(1, 6, 2), dp_rank=rank, micro_batch_at=sizes.__getitem__, num_workers=workers
        )
        for rank, workers in ((0, 0), (1, 1))
    ]
    for step in steps:
        batches = [one.at(step) for one in other]
        assert [[len(m.tokens) for m in b.micro_batches] for b in batches] == [[sizes[step]] * (6 // sizes[step])] * 2
        assert by_sample(batches) == by_sample([one.at(step) for one in usual])
    for one in other:  # after a rollback: the micro batches are those of the step, the samples later ones
        moved = one.at(0, first_sample=2 * 12)
        assert {len(micro.tokens) for micro in moved.micro_batches} == {sizes[0]}
        assert moved.micro_batches[0].sample_ids.min() >= 2 * 12
    assert same(other[0].validation(0), usual[0].validation(0))
    for one in other:
        one.close()


def test_blends_take_their_share_of_each_folder(data_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    settings = PreparationSettings(tokenizer_path=str(data_folder / "tokenizer.model"))
    Preparation([TextSource(["0123456789 " * 2000])], other, settings, report=lambda line: None).run()
    blend = {str(data_folder): 3, str(other): 1.0}
    tokenizer = Tokenizer.load(data_folder / "tokenizer.model")
    one = loader(blend, batch=geometry(40, 1, 1), mask_rate=0.02)
    for batch in (*one.at(0).micro_batches, *one.validation(0).micro_batches):
        digits = sum("123" in text_of(tokenizer, row.numpy()) for row in batch.tokens)
        assert digits == 10


def test_a_corpus_shorter_than_a_sample_is_padded(data_folder: Path, tmp_path: Path) -> None:
    settings = PreparationSettings(tokenizer_path=str(data_folder / "tokenizer.model"))
    Preparation([TextSource([made_up_text(0, 1)])], tmp_path / "d", settings, report=lambda line: None).run()
    for architecture in ("bert", "ul2"):
        one = loader(tmp_path / "d", architecture)
        for batch in (*one.at(0).micro_batches, *one.validation(0).micro_batches):
            assert (batch.lengths < SEQ_LENGTH).any()
            assert len(batch.targets) > 0


def test_an_error_in_a_thread_surfaces_in_the_caller(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = loader(data_folder, num_workers=1)
    make = one._training_batch

    def fail_at_two(step: int, first_sample: int) -> StepBatch:
        if step == 2:
            raise DataError("damaged")
        return make(step, first_sample)

    monkeypatch.setattr(one, "_training_batch", fail_at_two)
    with one:
        one.at(0)
        one.at(1)
        with pytest.raises(DataError, match="damaged"):
            one.at(2)


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_errors_come_before_the_first_step(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist.*prepare_data\.py"):
        loader(tmp_path / "none")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        loader(tmp_path)
    with pytest.raises(DataError, match=r"100 sentinels .*seq_length=2048 needs"):
        loader(data_folder, "ul2", seq_length=2048)
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        loader(data_folder, tokenizer=str(tmp_path / "x.model"))
    folder = copy_of(data_folder, tmp_path)
    (folder / "validation.idx").write_bytes(b"")
    with pytest.raises(DataError, match=r"validation\.idx is truncated"):
        loader(folder)
    for damage in ("{", "[" * 100_000):
        (folder / "manifest.json").write_text(damage)
        with pytest.raises(DataError, match=r"manifest\.json is damaged"):
            loader(folder)


def test_another_tokenizer_than_the_data_were_prepared_with(data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "my data").mkdir()
    folder = copy_of(data_folder, tmp_path / "my data")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_digest": "0" * 32}))
    with pytest.raises(DataError, match=r"prepared with another tokenizer .digest 0{32}.") as refused:
        loader(folder)
    assert f"--output '{folder}' --overwrite" in str(refused.value)  # for a shell
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        loader({str(data_folder): 1, str(folder): 1})


def test_the_tokenizer_of_the_folder_is_found(data_folder: Path) -> None:
    section = SimpleNamespace(path=str(data_folder), tokenizer=None, num_workers=0, prefetch=2)
    assert load_tokenizer(section).vocab_size == 800


def test_every_rank_of_an_epoch_reads_all_text(data_folder: Path, tokenizer: Tokenizer) -> None:
    """With nothing masked away, the samples of one epoch hold the corpus, up to the rest of a window."""
    one = loader(data_folder, batch=geometry(1, 1, 1), mask_rate=1e-9)
    stream = one.training_samples._streams[0]
    seen = np.zeros(tokenizer.vocab_size, np.int64)
    for index in range(stream.windows_per_epoch):
        seen += np.bincount(stream.read(index), minlength=tokenizer.vocab_size)
    tokens = stream.tokens
    missing = np.bincount(tokens.read(0, len(tokens)), minlength=tokenizer.vocab_size) - seen
    assert (missing >= 0).all()
    assert missing.sum() == len(tokens) % stream.window
