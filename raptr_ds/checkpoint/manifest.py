"""What stands in a checkpoint: the manifest, which says what the tensor files hold and lets damage be seen.

A checkpoint is a folder `step-00000123` with one safetensors file for each rank that writes, and manifest.json. In the
tensor files keys are running numbers; names, kinds and places are in the manifest only.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raptr_ds.checkpoint.reshard import Geometry, num_real_elements
from raptr_ds.config.sections import ModelSection
from raptr_ds.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 64 << 20

# What changes what the weights mean. Dropout and the initial scale may differ from run to run, the length of sequences
# where positions are not learned.
_SHAPE_FIELDS = (
    "architecture",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "ffn_hidden_size",
    "activation",
    "normalization",
    "norm_epsilon",
    "position_embedding",
    "add_bias_linear",
    "tie_word_embeddings",
)


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was written: torn, truncated, altered or unreadable."""


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
    """All that a checkpoint says beside the tensors.

    model: the whole ModelSection. run_state: the loop's own, plain JSON. step_counts: optimizer steps by parameter
    name. layout: what wrote it, for people only.
    """

    step: int
    model: dict[str, Any]
    run_state: dict[str, Any]
    loss_scaler: dict[str, float]
    step_counts: dict[str, float]
    layout: dict[str, int]
    files: dict[str, TensorFile]
    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        """Return the manifest as JSON in one canonical form, with a checksum of itself."""
        content = {"format": FORMAT, **asdict(self)}
        return _canonical({**content, "checksum": checksum(_canonical(content))})

    @classmethod
    def decode(cls, raw: bytes) -> "Manifest":
        """Return the manifest in `raw`.

        Raises: DamagedCheckpointError if a single byte is not as it was written; CheckpointError for another format.
        """
        try:
            content = json.loads(raw)
            # The text is compared as well, so that no byte of it is outside the checksum.
            is_intact = raw == _canonical(content) and content.pop("checksum") == checksum(_canonical(content))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{MANIFEST} is no manifest ({type(error).__name__})") from error
        if not is_intact:
            raise DamagedCheckpointError(f"{MANIFEST} does not match its own checksum")
        if content.pop("format") != FORMAT:
            raise CheckpointError(
                f"{MANIFEST} has another format than {FORMAT}, the only one this version of raptr_ds reads. "
                "Continue with the version that wrote it."
            )
        if content.pop("missed_steps", None):
            raise CheckpointError(
                f"{MANIFEST} has missed_steps: an earlier version of raptr_ds wrote it under "
                "raptr_ds.path.skipped_update=zero_grad and put off optimizer steps of skipped layers, which this "
                "version does not do. Continue the run with the version that wrote it, or start it anew "
                "(raptr_ds.checkpoint.load=none)."
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
    """Return the SHA-256 of data in hexadecimal; with the CPU's SHA instructions 1.5 GB/s (BLAKE2b 0.5)."""
    return hashlib.sha256(data).hexdigest()


def file_name(rank: int) -> str:
    """Return the name of a rank's tensor file."""
    return f"rank-{rank:05d}.safetensors"


def check_complete(entries: Iterable[Entry]) -> None:
    """Assert that the entries hold each element of each full tensor exactly once, as ownership promises."""
    found: dict[tuple[str, str], int] = {}
    wanted: dict[tuple[str, str], int] = {}
    for entry in entries:
        numel = num_real_elements(entry.geometry)
        for kind in entry.keys:
            key = (entry.name, kind)
            found[key] = found.get(key, 0) + numel
            wanted[key] = math.prod(entry.geometry.full_shape)
    wrong = [f"{' '.join(key)}: {found[key]} of {numel}" for key, numel in wanted.items() if found[key] != numel]
    assert not wrong, f"elements written: {wrong[:5]}"


def check_model(manifest: Manifest, model: ModelSection, folder: Path) -> None:
    """Refuse a checkpoint of another model. Raises: CheckpointError naming each field that differs."""
    ours, theirs = model.model_dump(mode="json"), manifest.model
    fields: list[str] = list(_SHAPE_FIELDS)
    if ours["position_embedding"] == theirs.get("position_embedding"):
        fields.append("seq_length" if ours["position_embedding"] == "learned" else "rotary_base")
    different = [name for name in fields if ours[name] != theirs.get(name)]
    if not different:
        return
    what = ", ".join(f"{name} is {_json(theirs.get(name))} there and {_json(ours[name])} here" for name in different)
    mend = " ".join(f"raptr_ds.model.{name}={_json(theirs.get(name))}" for name in different)
    raise CheckpointError(
        f"{folder} is a checkpoint of another model: {what}. Set {mend} to continue it, or train this model in "
        "another folder (raptr_ds.train.save), or afresh (raptr_ds.checkpoint.load=none)."
    )


def _entry(content: dict[str, Any]) -> Entry:
    geometry: dict[str, Any] = content["geometry"]
    shapes = {key: tuple(geometry[key]) for key in ("full_shape", "local_shape")}
    return Entry(**{**content, "geometry": Geometry(**{**geometry, **shapes})})


def _json(value: Any) -> str:
    return json.dumps(value)


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode() + b"\n"
