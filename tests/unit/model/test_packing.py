"""Packed sequences: losses and gradients are those of the examples run one by one, unpadded."""

import numpy as np
import pytest
import torch

from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch, PackedSample, Sample, collate
from raptr_ds.errors import ConfigError
from raptr_ds.hf.model import hugging_face_inputs, to_hugging_face
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath

SEQ_LENGTH = 24
LENGTHS = ((7, 12, 5), (3, 9), (20,))  # a row filled to its end, one with padding, one with one example
PATH = LayerPath((0, 2), 3)


def model_of(architecture: str, **changes: str) -> ModelSection:
    section = {
        "architecture": architecture,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": SEQ_LENGTH,
        "vocab_size": 61,
        "init_method_std": 0.1,
    }
    return ModelSection(**{**section, **changes})  # type: ignore[arg-type]


def examples(architecture: str) -> list[list[Sample]]:
    rng = np.random.default_rng(4)
    rows = []
    for lengths in LENGTHS:
        rows.append([])
        for length in lengths:
            positions = np.sort(rng.choice(length, 2, replace=False)).astype(np.int64)
            prefix = length if architecture == "bert" else int(rng.integers(1, length))
            tokens = rng.integers(0, 61, length).astype(np.int64)
            rows[-1].append(Sample(tokens, positions, rng.integers(0, 61, 2).astype(np.int64), prefix))
    return rows


def losses_and_gradients(stage: Stage, batches: list[MicroBatch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return each prediction's loss, and the gradient of a sum of them with a weight for each."""
    stage.zero_grad(set_to_none=True)
    losses = torch.cat([stage(batch.tokens, batch, PATH, None) for batch in batches])
    (losses * torch.arange(1, len(losses) + 1)).sum().backward()
    return losses.detach(), {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("bert", {}), ("ul2", {}), ("bert", {"position_embedding": "rotary"}), ("ul2", {"position_embedding": "learned"})],
    ids=["bert", "ul2", "bert-rotary", "ul2-learned"],
)
def test_a_packed_batch_is_its_examples_one_by_one(
    groups: ProcessGroups, architecture: str, changes: dict[str, str]
) -> None:
    stage = build_stage(model_of(architecture, **changes), groups, range(3), recompute=False, seed=3).double()
    rows = examples(architecture)
    packed = collate([PackedSample(tuple(row)) for row in rows], range(3), SEQ_LENGTH, pad_id=0)
    alone = [collate([part], [0], len(part.tokens), pad_id=0) for row in rows for part in row]
    losses, gradients = losses_and_gradients(stage, [packed])
    expected_losses, expected = losses_and_gradients(stage, alone)
    # fp64, and rotary's fp32 table the same for both: only sums in another order are left.
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() < 1e-12 * scale + 1e-14, name


def test_one_example_in_a_sequence_is_the_plain_sequence(groups: ProcessGroups) -> None:
    for architecture in ("bert", "ul2"):
        stage = build_stage(model_of(architecture), groups, range(3), recompute=False, seed=3)
        (sample,) = examples(architecture)[2]
        plain, packed = (collate([one], [5], SEQ_LENGTH, pad_id=0) for one in (sample, PackedSample((sample,))))
        (losses, _), (expected, _) = (losses_and_gradients(stage, [batch]) for batch in (packed, plain))
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_the_transformers_twin_is_told_the_same(groups: ProcessGroups, architecture: str) -> None:
    model = model_of(architecture)
    stage = build_stage(model, groups, range(3), recompute=False, seed=3)
    batch = collate([PackedSample(tuple(row)) for row in examples(architecture)], range(3), SEQ_LENGTH, pad_id=0)
    twin = to_hugging_face(model, {name: p.detach() for name, p in stage.named_parameters()})
    with torch.no_grad():
        loss = stage(batch.tokens, batch, LayerPath.full(3), None).mean().item()
        assert twin(**hugging_face_inputs(model, batch)).loss.item() == pytest.approx(loss, abs=2e-5)


def test_esm_has_no_mask_for_packed_documents() -> None:
    model = model_of("bert", position_embedding="rotary")
    batch = collate([PackedSample(tuple(row)) for row in examples("bert")], range(3), SEQ_LENGTH, pad_id=0)
    with pytest.raises(ConfigError, match=r"EsmForMaskedLM .*raptr_ds\.data\.packing"):
        hugging_face_inputs(model, batch)


def test_a_batch_moves_with_its_segments() -> None:
    batch = collate([PackedSample(tuple(row)) for row in examples("ul2")], range(3), SEQ_LENGTH, pad_id=0)
    moved = batch.to(torch.device("meta"))
    assert moved.segments is not None
    assert {t.device.type for t in (moved.tokens, moved.segments.ids, moved.segments.in_prefix)} == {"meta"}
    assert batch.segments is not None
    assert batch.segments.ids[1].tolist() == [0] * 3 + [1] * 9 + [-1] * 12
    assert batch.segments.positions[0].tolist() == [*range(7), *range(12), *range(5)]
