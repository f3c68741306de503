"""The manifest: every byte counts, and a checkpoint of another model is refused in words."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from raptr_ds.checkpoint.manifest import (
    DamagedCheckpointError,
    Entry,
    Manifest,
    TensorFile,
    check_complete,
    check_model,
)
from raptr_ds.config.sections import ModelSection
from raptr_ds.engine.fragments import Geometry
from raptr_ds.errors import CheckpointError, Exit

Model = Callable[..., ModelSection]
HALF = Geometry((4, 2), 0, 0, 2, (2, 2), 0, 4)
OTHER_HALF = dataclasses.replace(HALF, start=2)


@pytest.fixture
def manifest(small_model: Model) -> Manifest:
    entries = tuple(Entry("w", at, "F32", "rank-00000.safetensors", {"weight": "0"}) for at in (HALF, OTHER_HALF))
    return Manifest(
        step=5,
        model=small_model().model_dump(mode="json"),
        run_state={"tokens": 12, "rate": 0.1, "nested": {"a": [1, None]}},
        loss_scaler={"cur_scale": 256.0},
        step_counts={"w": 5.0},
        layout={"tensor": 2, "pipeline": 1, "data": 1},
        files={"rank-00000.safetensors": TensorFile(100, ("ab",))},
        entries=entries,
    )


def test_it_comes_back_as_it_was(manifest: Manifest) -> None:
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.kinds() == {"w": {"weight"}}


def test_no_bit_of_it_can_flip_unseen(manifest: Manifest) -> None:
    raw = manifest.encode()
    for position in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            with pytest.raises(DamagedCheckpointError):
                Manifest.decode(bytes(flipped))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"{}", b"[]", b"null", b"7\n", b'{"checksum": "00"}\n', b"\xff\xfe", b"[" * 9999]
)
def test_other_text_is_no_manifest(raw: bytes) -> None:
    with pytest.raises(DamagedCheckpointError):
        Manifest.decode(raw)


def test_every_torn_end_is_seen(manifest: Manifest) -> None:
    raw = manifest.encode()
    for length in range(len(raw)):
        with pytest.raises(DamagedCheckpointError):
            Manifest.decode(raw[:length])


def test_another_format_is_refused_and_not_called_damage(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raptr_ds.checkpoint.manifest.FORMAT", 3)
    raw = manifest.encode()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format") as caught:
        Manifest.decode(raw)
    assert not isinstance(caught.value, DamagedCheckpointError)
    assert json.loads(raw)["format"] == 3


def test_steps_that_an_earlier_version_put_off_are_not_lost_silently(manifest: Manifest) -> None:
    assert Manifest.decode(written_earlier(manifest, missed_steps={})) == manifest
    with pytest.raises(CheckpointError, match=r"missed_steps.*the version that wrote it") as caught:
        Manifest.decode(written_earlier(manifest, missed_steps={"3": [0.1, 0.2]}))
    assert not isinstance(caught.value, DamagedCheckpointError)


@pytest.mark.parametrize(
    ("zero", "data", "is_refused"),
    [
        ({"stage": 1, "round_robin_gradients": True}, 2, True),
        ({"stage": 2, "round_robin_gradients": True}, 3, True),
        ({"stage": 2, "round_robin_gradients": True}, 1, False),
        ({"stage": 2, "round_robin_gradients": False}, 2, False),
        ({"stage": 2}, 2, False),
        ({"stage": 0}, 2, False),
    ],
)
def test_weights_that_format_1_has_under_other_names_are_refused(
    manifest: Manifest, zero: dict[str, object], data: int, is_refused: bool
) -> None:
    made = {
        "layout": {**manifest.layout, "data": data},
        "run_state": {"identity": {"config": {"zero_optimization": zero}}},
    }
    now = dataclasses.replace(manifest, **made)  # type: ignore[arg-type]
    assert Manifest.decode(now.encode()) == now
    raw = written_earlier(now, format=1)
    if not is_refused:
        assert Manifest.decode(raw) == now
        return
    with pytest.raises(CheckpointError, match=r"round_robin_gradients.*checkpoint\.load=none") as caught:
        Manifest.decode(raw)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_format_1_is_read(manifest: Manifest) -> None:
    assert Manifest.decode(written_earlier(manifest, format=1)) == manifest


def written_earlier(manifest: Manifest, **changes: object) -> bytes:
    """Return the manifest as an earlier version wrote it."""
    content = {**json.loads(manifest.encode()), **changes}
    del content["checksum"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode() + b"\n").hexdigest()
    return json.dumps({**content, "checksum": digest}, sort_keys=True).encode() + b"\n"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_layers": 2}, ["num_layers is 1 there and 2 here", "raptr_ds.model.num_layers=1"]),
        ({"vocab_size": 9}, ["vocab_size is 7 there and 9 here"]),
        ({"seq_length": 16}, ["seq_length is 8 there and 16 here"]),
        ({"architecture": "ul2"}, ['architecture is "bert" there and "ul2" here', "activation"]),
    ],
)
def test_another_model_is_refused_by_field(
    manifest: Manifest, small_model: Model, changes: dict[str, object], names: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_model(manifest, small_model(**changes), Path("runs/a/checkpoints/step-00000005"))
    assert caught.value.exit_code == Exit.USER_ERROR
    assert "runs/a/checkpoints/step-00000005" in str(caught.value)
    for name in names:
        assert name in str(caught.value)


def test_what_does_not_touch_the_weights_may_change(manifest: Manifest, small_model: Model) -> None:
    check_model(manifest, small_model(hidden_dropout=0.3, attention_dropout=0.0, init_method_std=0.5), Path())
    rotary = dataclasses.replace(manifest, model=small_model(position_embedding="rotary").model_dump(mode="json"))
    check_model(rotary, small_model(position_embedding="rotary", seq_length=16), Path())
    with pytest.raises(CheckpointError, match="rotary_base"):
        check_model(rotary, small_model(position_embedding="rotary", rotary_base=500.0), Path())


def test_elements_without_or_with_two_writers_are_our_fault(manifest: Manifest) -> None:
    check_complete(manifest.entries)
    with pytest.raises(AssertionError, match="w weight: 4 of 8"):
        check_complete(manifest.entries[:1])
    with pytest.raises(AssertionError, match="w weight: 12 of 8"):
        check_complete((*manifest.entries, manifest.entries[0]))
