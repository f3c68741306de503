"""The manifest of a checkpoint: what its tensor files hold, with checksums that show damage.

A checkpoint is a folder `step-00000123` with one safetensors file for each rank that writes, and manifest.json. The
keys in the tensor files are running numbers; names, kinds and geometries are only in the manifest.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raptr_ds.checkpoint.folder import MANIFEST
from raptr_ds.checkpoint.reshard import num_real_elements
from raptr_ds.config.sections import ModelSection
from raptr_ds.engine.fragments import Geometry
from raptr_ds.errors import CheckpointError
from raptr_ds.json_text import parse_json

FORMAT = 2
"""1 had the same fields, and other contents in one case: `_is_misnamed`."""
CHUNK_BYTES = 64 << 20

# Fields that may change when a run is continued; all others change what the weights mean.
_MAY_CHANGE = {"hidden_dropout", "attention_dropout", "init_method_std"}
_MAY_CHANGE_UNLESS = {"seq_length": "learned", "rotary_base": "rotary"}  # positions are of this kind


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was written: it is incomplete, altered or unreadable."""


@dataclass(frozen=True)
class TensorFile:
    """One file: its size in bytes and the checksums of its chunks of CHUNK_BYTES, in order."""

    size: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """Tensors of one geometry: a parameter's weight and its optimizer states; keys: kind -> key in the file."""

    name: str
    geometry: Geometry
    dtype: str
    file: str
    keys: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its tensors.

    step: finished steps. model: the whole ModelSection. run_state: the training loop's, plain JSON. layout: in which
    it was written, for information only. step_counts: optimizer steps by parameter name.
    """

    step: int
    model: dict[str, Any]
    run_state: dict[str, Any]
    loss_scaler: dict[str, float]
    layout: dict[str, int]
    step_counts: dict[str, float] = field(default_factory=dict)
    files: dict[str, TensorFile] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()

    def encode(self) -> bytes:
        """Return the manifest as canonical JSON with a checksum of itself."""
        content = {"format": FORMAT, **asdict(self)}
        return _canonical({**content, "checksum": checksum(_canonical(content))})

    @classmethod
    def decode(cls, raw: bytes) -> "Manifest":
        """Return the manifest in `raw`.

        Raises: DamagedCheckpointError if any byte differs from what was written; CheckpointError if this version cannot
        continue from the checkpoint.
        """
        try:
            content = parse_json(raw)
            # The text is compared as well: white space, for example, is not covered by the checksum.
            is_intact = raw == _canonical(content) and content.pop("checksum") == checksum(_canonical(content))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{MANIFEST} is not a manifest ({type(error).__name__})") from error
        if not is_intact:
            raise DamagedCheckpointError(f"{MANIFEST} does not match its own checksum")
        written = content.pop("format")
        if written not in {1, FORMAT}:
            raise CheckpointError(
                f"the format of {MANIFEST} is {written}, and this version of raptr_ds reads 1 and {FORMAT}. "
                "Continue the run with the version that wrote it."
            )
        if written == 1 and _is_misnamed(content):
            raise CheckpointError(
                f"{MANIFEST} is of an earlier version of raptr_ds, which under zero_optimization.round_robin_gradients="
                "true wrote weights and optimizer states under each other's names. Continue the run with the version "
                "that wrote it, in the same layout, or start it anew with raptr_ds.checkpoint.load=none."
            )
        if content.pop("missed_steps", None):
            raise CheckpointError(
                f"{MANIFEST} lists missed_steps: the earlier version of raptr_ds that wrote it, under "
                "raptr_ds.path.skipped_update=zero_grad, had not yet made these optimizer steps of skipped layers, and "
                "this version cannot make them. Continue the run with the version that wrote it, or start it anew with "
                "raptr_ds.checkpoint.load=none."
            )
        content["files"] = {name: TensorFile(f["size"], tuple(f["checksums"])) for name, f in content["files"].items()}
        content["entries"] = tuple(_entry(entry) for entry in content["entries"])
        manifest = cls(**content)
        for name in manifest.files:
            assert re.fullmatch(r"rank-\d{5,}\.safetensors", name), name  # never a path out of the folder
        return manifest

    def kinds(self) -> dict[str, set[str]]:
        """Return the kinds of tensor that the checkpoint has, by parameter name."""
        kinds: dict[str, set[str]] = {}
        for entry in self.entries:
            kinds.setdefault(entry.name, set()).update(entry.keys)
        return kinds


def checksum(data: bytes | memoryview) -> str:
    """Return the SHA-256 of data in hexadecimal; with a CPU's SHA instructions it is faster than BLAKE2b."""
    return hashlib.sha256(data).hexdigest()


def file_name(rank: int) -> str:
    """Return the name of a rank's tensor file."""
    return f"rank-{rank:05d}.safetensors"


def check_complete(entries: Iterable[Entry]) -> None:
    """Assert that the entries hold each element of each full tensor exactly once, as `Engine.owns` promises."""
    found: Counter[tuple[str, str]] = Counter()
    wanted: dict[tuple[str, str], int] = {}
    for entry in entries:
        for kind in entry.keys:
            found[entry.name, kind] += num_real_elements(entry.geometry)
            wanted[entry.name, kind] = math.prod(entry.geometry.full_shape)
    wrong = [f"{' '.join(key)}: {found[key]} of {numel}" for key, numel in wanted.items() if found[key] != numel]
    assert not wrong, f"elements written: {wrong[:5]}"


def check_model(manifest: Manifest, model: ModelSection, folder: Path) -> None:
    """Check that a checkpoint is of this model. Raises: CheckpointError with each field that differs."""
    ours, theirs = model.model_dump(mode="json"), manifest.model
    positions = {values.get("position_embedding") for values in (ours, theirs)}
    may_change = _MAY_CHANGE | {name for name, kind in _MAY_CHANGE_UNLESS.items() if positions != {kind}}
    different = [name for name in ours if name not in may_change and ours[name] != theirs.get(name)]
    if not different:
        return
    what = ", ".join(
        f"{name} is {json.dumps(theirs.get(name))} there and {json.dumps(ours[name])} here" for name in different
    )
    fix = " ".join(f"raptr_ds.model.{name}={json.dumps(theirs.get(name))}" for name in different)
    raise CheckpointError(
        f"{folder} is a checkpoint of another model: {what}. Set {fix} to continue it, or train this model in another "
        "folder (raptr_ds.train.save), or start anew with raptr_ds.checkpoint.load=none."
    )


def _entry(content: dict[str, Any]) -> Entry:
    geometry: dict[str, Any] = content["geometry"]
    shapes = {key: tuple(geometry[key]) for key in ("full_shape", "local_shape")}
    return Entry(**{**content, "geometry": Geometry(**{**geometry, **shapes})})


def _is_misnamed(content: dict[str, Any]) -> bool:
    """Return whether a checkpoint of format 1 was written by ZeRO 1 or 2 under round_robin_gradients, on several ranks.

    Its pieces of a layer are in another order than it says (PathZero12.holders of engine/path_zero.py).
    """
    zero = content["run_state"].get("identity", {}).get("config", {}).get("zero_optimization", {})
    shares = content["layout"].get("data", 1) > 1 and zero.get("stage") in {1, 2}
    return shares and bool(zero.get("round_robin_gradients"))


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode() + b"\n"
