"""The manifest of a data folder: what it was made of, and with which tokenizer."""

import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from raptr_ds.errors import DataError
from raptr_ds.json_text import parse_json
from raptr_ds.user_paths import is_folder, read_error

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class SplitCounts:
    """Size of one split."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """What tools/prepare_data.py wrote into a folder.

    fingerprint: digest of text and settings. packages: what was fetched for it (--corpus): name, version, licence and
    sha256 of each.
    """

    format: int
    fingerprint: str
    sources: list[str]
    settings: dict[str, Any]
    vocab_size: int
    tokenizer_digest: str
    dtype: str
    documents: int
    text_bytes: int
    seconds: float
    skipped: dict[str, int]
    splits: dict[str, SplitCounts]
    packages: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of a data folder.

        Raises: DataError if the folder or the manifest is missing or damaged.
        """
        path = folder / MANIFEST
        fix = f"Prepare it: python tools/prepare_data.py --input TEXT --output {shlex.quote(str(folder))}"
        if not is_folder(folder):
            raise DataError(f"the data folder {folder} does not exist. {fix}")
        try:
            content = parse_json(path.read_text())
            content["splits"] = {name: SplitCounts(**counts) for name, counts in content["splits"].items()}
            content.setdefault("packages", [])  # absent in folders made by versions without --corpus
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except FileNotFoundError as error:
            raise DataError(
                f"the folder {folder} has no {MANIFEST}: it is not a finished data folder. {fix}"
            ) from error
        except OSError as error:
            raise read_error(path, error) or DataError(
                f"cannot read {path}: {error.strerror or error}. Check its permissions."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). {fix} --overwrite") from error
