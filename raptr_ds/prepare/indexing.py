"""Prepare a data folder: tokenizer, indexed training and validation tokens, and a manifest that describes them.

The work is done in FOLDER/.prepare and moved into place at the end, the manifest last: a folder with a manifest is
complete. After an interruption the same command continues where the journal in .prepare says.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.manifest import MANIFEST, TOKENIZER, Manifest, SplitCounts
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.prepare.brought_tokenizer import bring_tokenizer
from raptr_ds.prepare.corpus import Source, digest_of
from raptr_ds.prepare.encoding import encoded_batches
from raptr_ds.prepare.index_writer import token_dtype
from raptr_ds.prepare.readers import ReadingCounts
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer
from raptr_ds.prepare.working_folder import Done, SplitWriter, WorkingFolder, working_folder
from raptr_ds.user_paths import exists

FORMAT = 1
BATCHES_PER_CHECKPOINT = 64


@dataclass(frozen=True)
class PreparationSettings:
    """What decides the bytes of a data folder, besides the text itself.

    tokenizer: how to train one, unless tokenizer_path names a finished one. validation_fraction: share of the documents
    held out, chosen by a hash of their content. At least min_validation_tokens tokens are held out, unless these are
    more than a tenth of all.
    """

    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    tokenizer_path: str | None = None
    validation_fraction: float = 0.01
    min_validation_tokens: int = 16_384


@dataclass(frozen=True)
class Preparation:
    """One data folder to be made.

    report: called with lines to print. progress: called with the documents and bytes of text that are done. packages:
    where the text was fetched from, for the manifest.
    """

    sources: Sequence[Source]
    output: Path
    settings: PreparationSettings
    workers: int = 1
    overwrite: bool = False
    report: Callable[[str], None] = print
    progress: Callable[[int, int], None] = lambda documents, text_bytes: None
    packages: Sequence[dict[str, Any]] = ()

    def run(self) -> Manifest:
        """Make the folder and return its manifest; a folder that is up to date stays as it is.

        Raises: DataError for text or folders that cannot be used, ConfigError for impossible settings.
        """
        fraction = self.settings.validation_fraction
        if not 0 < fraction < 1:
            raise ConfigError(f"--validation-fraction {fraction} must lie between 0 and 1. Use 0.01 to 0.1.")
        path = self.settings.tokenizer_path
        external, note = bring_tokenizer(path, self.settings.tokenizer.num_sentinels) if path else (None, "")
        fingerprint = self._fingerprint(external)
        finished = self._finished(fingerprint)
        if finished is not None:
            self.report(f"{self.output} is up to date: nothing to do.")
            return finished
        with working_folder(self.output, fingerprint, self.report) as work:
            if note:
                self.report(note)
            if work.done.documents:
                self.report(f"resuming: {work.done.documents:,} documents are already encoded.")
            tokenizer = self._tokenizer(work, external)
            self._encode(work, tokenizer)
            return self._finish(work, tokenizer, fingerprint)

    def _fingerprint(self, external: Tokenizer | None) -> str:
        """Return a digest of everything that decides the bytes of the folder."""
        settings = self.settings
        return digest_of(
            FORMAT,
            [source.fingerprint() for source in self.sources],
            external.digest if external else repr(settings.tokenizer),
            settings.validation_fraction,
            settings.min_validation_tokens,
        )

    def _finished(self, fingerprint: str) -> Manifest | None:
        """Return the manifest of a folder that is complete and up to date; None if there is none or to overwrite it.

        Raises: DataError if it was made from other text or with other settings.
        """
        if not exists(self.output / MANIFEST) or self.overwrite:
            return None
        manifest = Manifest.load(self.output)
        if manifest.fingerprint != fingerprint:
            raise DataError(
                f"{self.output} already holds data prepared from other text or with other settings "
                f"({_summary(manifest)}). Choose another --output, or pass --overwrite to replace it."
            )
        tokenizer = Tokenizer.load(self.output / TOKENIZER)
        for split in manifest.splits:
            open_indexed(self.output / split, tokenizer.vocab_size)
        return manifest

    def _tokenizer(self, work: WorkingFolder, external: Tokenizer | None) -> Tokenizer:
        path = work.path / TOKENIZER
        if path.exists():
            return Tokenizer.load(path)
        begin = time.monotonic()
        tokenizer = external or train_tokenizer(self.sources, self.settings.tokenizer)
        if external is None:
            seconds = time.monotonic() - begin
            self.report(f"trained a tokenizer of {tokenizer.vocab_size:,} pieces in {seconds:.1f} s.")
        write_atomically(path, tokenizer.model)
        return tokenizer

    def _encode(self, work: WorkingFolder, tokenizer: Tokenizer) -> None:
        """Encode all documents into the working folder, from where its journal says."""
        writer = SplitWriter(work.path, token_dtype(tokenizer.vocab_size), tokenizer.eos_id)
        if not writer.restore(work.done.sizes):
            work.done = Done()
        done = work.done
        begin = time.monotonic() - done.seconds
        counts = ReadingCounts()
        fraction = self.settings.validation_fraction
        batches = encoded_batches(
            self.sources, counts, tokenizer, fraction, workers=self.workers, skip_documents=done.documents
        )
        for number, batch in enumerate(batches, start=1):
            writer.append("validation", batch.validation)
            writer.append("train", batch.train)
            done.documents += batch.num_documents
            done.text_bytes += batch.text_bytes
            self.progress(done.documents, done.text_bytes)
            if number % BATCHES_PER_CHECKPOINT == 0:
                done.seconds = time.monotonic() - begin
                done.sizes = writer.sync()
                work.write_journal()
        done.seconds = time.monotonic() - begin
        done.skipped = dict(counts.skipped)
        if done.documents == 0:
            names = ", ".join(source.name for source in self.sources)
            raise DataError(f"there is no text in {names}{counts.summary()}. Check --input.")
        done.splits = writer.finish(self.settings.min_validation_tokens)

    def _finish(self, work: WorkingFolder, tokenizer: Tokenizer, fingerprint: str) -> Manifest:
        """Move the finished files, once they are on the disk, into the folder, the manifest last."""
        done = work.done
        manifest = Manifest(
            format=FORMAT,
            fingerprint=fingerprint,
            sources=[source.name for source in self.sources],
            settings=asdict(self.settings),
            vocab_size=tokenizer.vocab_size,
            tokenizer_digest=tokenizer.digest,
            dtype=token_dtype(tokenizer.vocab_size).name,
            documents=done.documents,
            text_bytes=done.text_bytes,
            seconds=done.seconds,
            skipped=done.skipped,
            splits={name: SplitCounts(**counts) for name, counts in done.splits.items()},
            packages=list(self.packages),
        )
        (self.output / MANIFEST).unlink(missing_ok=True)
        for name in (TOKENIZER, *(f"{split}.{suffix}" for split in done.splits for suffix in ("bin", "idx"))):
            with (work.path / name).open("rb") as written:
                os.fsync(written.fileno())
            (work.path / name).replace(self.output / name)
        write_atomically(self.output / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
        return manifest


def _summary(manifest: Manifest) -> str:
    """Return a description in one line."""
    tokens = sum(split.tokens for split in manifest.splits.values())
    sources = ", ".join(manifest.sources[:3]) + (", ..." if len(manifest.sources) > 3 else "")
    return f"{manifest.documents:,} documents, {tokens:,} tokens, vocabulary {manifest.vocab_size:,}, from {sources}"
