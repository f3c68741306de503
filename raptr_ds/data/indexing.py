"""Prepare a data folder: tokenizer, indexed training and validation tokens, and a manifest that says what they are.

The work is done in FOLDER/.prepare and moved into place at the end, the manifest last: a folder with a manifest is whole.
After an interruption the same command goes on where the journal in .prepare says.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raptr_ds.data.corpus import ReadingCounts, Source, digest_of
from raptr_ds.data.encoding import encoded_batches
from raptr_ds.data.indexed import open_indexed, token_dtype
from raptr_ds.data.manifest import MANIFEST, TOKENIZER, Manifest, SplitCounts
from raptr_ds.data.split_writer import SplitWriter
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.data.tokenizer_training import TokenizerSettings, train_tokenizer
from raptr_ds.errors import DataError

WORK = ".prepare"
JOURNAL = "journal.json"
FORMAT = 1
BATCHES_PER_CHECKPOINT = 64

Report = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparationSettings:
    """What decides the bytes of a data folder, besides the text itself.

    validation_fraction: share of the documents held out, chosen by a hash of their content; at least
    `min_validation_tokens` are, as long as these are not more than a tenth of all.
    """

    tokenizer: TokenizerSettings = TokenizerSettings()
    tokenizer_path: str | None = None
    validation_fraction: float = 0.01
    min_validation_tokens: int = 16_384


def prepare(
    sources: Sequence[Source],
    output: Path,
    settings: PreparationSettings,
    *,
    workers: int = 1,
    overwrite: bool = False,
    report: Report = print,
    progress: Progress = lambda documents, text_bytes: None,
) -> Manifest:
    """Turn the documents of `sources` into a data folder, or return the manifest of what is already there.

    progress is called with the documents and bytes of text that are done.
    Raises: DataError for text or folders that cannot be used, ConfigError for an impossible vocabulary.
    """
    if not 0 < settings.validation_fraction < 1:
        raise DataError(f"--validation-fraction {settings.validation_fraction} must lie between 0 and 1. Use 0.01 to 0.1.")
    external = Tokenizer.load(settings.tokenizer_path) if settings.tokenizer_path else None
    fingerprint = digest_of(
        FORMAT,
        [source.fingerprint() for source in sources],
        (external.digest if external else repr(settings.tokenizer)),
        settings.validation_fraction,
        settings.min_validation_tokens,
    )
    finished = _finished(output, fingerprint, overwrite)
    if finished is not None:
        report(f"{output} is up to date: nothing to do.")
        return finished
    with _working_folder(output, fingerprint, report) as work:
        tokenizer = _tokenizer(sources, work, external, settings.tokenizer, report)
        writer, done = _encode(sources, work, tokenizer, settings, workers, report, progress)
        manifest = _finish(sources, output, work, tokenizer, settings, fingerprint, writer, done)
    return manifest


def _finished(output: Path, fingerprint: str, overwrite: bool) -> Manifest | None:
    """Return the manifest of a whole folder made from the same text with the same settings.

    Raises: DataError if it was made otherwise and is not to be overwritten.
    """
    if overwrite or not (output / MANIFEST).exists():
        return None
    manifest = Manifest.load(output)
    if manifest.fingerprint != fingerprint:
        raise DataError(
            f"{output} already holds data prepared from other text or with other settings ({manifest.summary()}). Choose "
            "another --output, or pass --overwrite to replace it."
        )
    tokenizer = Tokenizer.load(output / TOKENIZER)
    for split in ("train", "validation"):
        open_indexed(output / split, tokenizer.vocab_size)
    return manifest


@contextmanager
def _working_folder(output: Path, fingerprint: str, report: Report) -> Iterator[Path]:
    """Give the folder for unfinished work, emptied unless it belongs to this very preparation; only one at a time."""
    work = output / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to {output}: {error.strerror or error}. Choose an --output folder that you may write to."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is preparing {output}. Wait for it, or choose another --output.") from error
        journal = _read_journal(work)
        if journal.get("fingerprint") == fingerprint:
            report(f"going on with the interrupted preparation of {output}.")
        else:
            shutil.rmtree(work)
            work.mkdir()
            _write_journal(work, {"fingerprint": fingerprint})
        try:
            yield work
        except OSError as error:
            raise DataError(
                f"cannot write {error.filename or work}: {error.strerror or error}. Make room or choose another --output; "
                "the same command then goes on."
            ) from error
        shutil.rmtree(work)
    (output / ".lock").unlink(missing_ok=True)


def _read_journal(work: Path) -> dict[str, Any]:
    try:
        journal = json.loads((work / JOURNAL).read_text())
    except (OSError, ValueError):
        return {}  # a journal is written aside and renamed: none, or a broken one, means to begin anew
    return journal if isinstance(journal, dict) else {}


def _write_journal(work: Path, journal: dict[str, Any]) -> None:
    aside = work / (JOURNAL + ".new")
    with aside.open("w") as stream:
        json.dump(journal, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(work / JOURNAL)


def _tokenizer(
    sources: Sequence[Source], work: Path, external: Tokenizer | None, settings: TokenizerSettings, report: Report
) -> Tokenizer:
    path = work / TOKENIZER
    if path.exists():
        return Tokenizer.load(path)
    if external is None:
        begin = time.monotonic()
        counts = ReadingCounts()
        documents = (document for source in sources for document in source.documents(counts))
        tokenizer = train_tokenizer(documents, settings)
        seconds = time.monotonic() - begin
        report(f"trained a tokenizer of {tokenizer.vocab_size:,} pieces in {seconds:.1f} s.")
    else:
        tokenizer = external
    aside = path.with_suffix(".new")
    tokenizer.save(aside)
    aside.replace(path)
    return tokenizer


def _encode(
    sources: Sequence[Source],
    work: Path,
    tokenizer: Tokenizer,
    settings: PreparationSettings,
    workers: int,
    report: Report,
    progress: Progress,
) -> tuple[SplitWriter, dict[str, Any]]:
    """Encode all documents into the working folder, from where the journal says; return the writer and the counts."""
    journal = _read_journal(work)
    done = journal.get("done") or {"documents": 0, "text_bytes": 0, "seconds": 0.0, "splits": {}, "skipped": {}}
    writer = SplitWriter.resume(work, token_dtype(tokenizer.vocab_size), tokenizer.eos_id, done["splits"])
    if writer is None:
        done = {"documents": 0, "text_bytes": 0, "seconds": 0.0, "splits": {}, "skipped": {}}
        writer = SplitWriter(work, token_dtype(tokenizer.vocab_size), tokenizer.eos_id)
    elif done["documents"]:
        report(f"{done['documents']:,} documents are already encoded.")
    counts = ReadingCounts()
    begin = time.monotonic() - done["seconds"]
    with writer:
        batches = encoded_batches(sources, counts, tokenizer, settings.validation_fraction, workers, done["documents"])
        for number, batch in enumerate(batches, start=1):
            writer.append("validation", batch.validation)
            writer.append("train", batch.train)
            done["documents"] += batch.num_documents
            done["text_bytes"] += batch.text_bytes
            progress(done["documents"], done["text_bytes"])
            if number % BATCHES_PER_CHECKPOINT == 0:
                done["seconds"] = time.monotonic() - begin
                done["splits"] = writer.flush()
                _write_journal(work, journal | {"done": done})
    done["seconds"] = time.monotonic() - begin
    done["skipped"] = dict(counts.skipped)
    return writer, done


def _finish(
    sources: Sequence[Source],
    output: Path,
    work: Path,
    tokenizer: Tokenizer,
    settings: PreparationSettings,
    fingerprint: str,
    writer: SplitWriter,
    done: dict[str, Any],
) -> Manifest:
    if done["documents"] == 0:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in done["skipped"].items())
        raise DataError(
            f"there is no text in {', '.join(source.name for source in sources)}"
            f"{f' (skipped: {reasons})' if reasons else ''}. Check --input."
        )
    splits = writer.finish(settings.min_validation_tokens)
    manifest = Manifest(
        format=FORMAT,
        fingerprint=fingerprint,
        sources=[source.name for source in sources],
        settings=asdict(settings),
        vocab_size=tokenizer.vocab_size,
        tokenizer_digest=tokenizer.digest,
        dtype=token_dtype(tokenizer.vocab_size).name,
        documents=done["documents"],
        text_bytes=done["text_bytes"],
        seconds=done["seconds"],
        skipped=done["skipped"],
        splits={name: SplitCounts(**counts) for name, counts in splits.items()},
    )
    (output / MANIFEST).unlink(missing_ok=True)
    for name in (TOKENIZER, "train.bin", "train.idx", "validation.bin", "validation.idx"):
        (work / name).replace(output / name)
    manifest.save(output)
    return manifest
