"""The loader: a step's batch is a pure function of (seed, step, data-parallel rank), prepared ahead in threads."""

import shlex
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from raptr_ds.config.batch import BatchGeometry
from raptr_ds.config.run import RunConfig
from raptr_ds.config.sections import DataSection, ModelSection, ObjectiveSection
from raptr_ds.data.batch import PackedSample, Sample, StepBatch, collate
from raptr_ds.data.denoisers import MixtureOfDenoisers, denoisers_of, mean_predictions
from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.manifest import TOKENIZER, Manifest
from raptr_ds.data.masked_lm import MaskedLM, num_masked
from raptr_ds.data.packed_documents import PackedDocuments
from raptr_ds.data.token_stream import Mixture, TokenStream
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import DataError
from raptr_ds.rng import stream
from raptr_ds.user_paths import is_folder

# Validation does not depend on the run's seed, so that evaluation losses of different seeds compare.
VALIDATION_SEED = 20240213


Objective = MaskedLM | MixtureOfDenoisers | PackedDocuments


class Samples:
    """Sample number s of a split, for any s >= 0: a pure function of (seed, s)."""

    def __init__(
        self, folders: Mapping[str, float], split: str, objective: Objective, tokenizer: Tokenizer, seed: int
    ) -> None:
        """Open and check the split in every folder.

        Raises: DataError if a folder's files cannot be used.
        """
        self._objective, self._split, self._seed = objective, split, seed
        self._mixture = Mixture(folders)
        corpora = [open_indexed(Path(folder) / split, tokenizer.vocab_size).tokens for folder in folders]
        self._streams = [
            TokenStream(tokens, objective.window, seed, f"{split} {number}") for number, tokens in enumerate(corpora)
        ]

    def __getitem__(self, number: int) -> Sample | PackedSample:
        corpus, index = self._mixture.locate(number)
        rng = stream(self._seed, "sample", self._split, number)
        return self._objective.sample(self._streams[corpus].read(index), rng)


@dataclass(eq=False)
class Loader:
    """Makes the batches of one data-parallel rank, for any step in any order; a context manager that ends its threads.

    A step reads the run's samples from `first_sample` on: sample g of them (0 <= g < global_batch) belongs to micro
    batch m, rank r and row i with g = (m * data_parallel + r) * micro_batch + i. Its text and mask depend on its number
    in the run alone.

    num_workers: threads that keep the next `prefetch` steps ready; 0: none. micro_batch_at: sequences per micro batch
    of a training step; evaluation has the geometry's.
    """

    training_samples: Samples
    validation_samples: Samples
    geometry: BatchGeometry
    dp_rank: int
    seq_length: int
    pad_id: int
    num_workers: int
    prefetch: int
    micro_batch_at: Callable[[int], int]

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.geometry.data_parallel, (self.dp_rank, self.geometry.data_parallel)
        self._threads = ThreadPoolExecutor(self.num_workers, "batches") if self.num_workers else None
        self._ahead: dict[tuple[int, int], Future[StepBatch]] = {}

    def at(self, step: int, first_sample: int | None = None) -> StepBatch:
        """Return the micro batches of step `step` (0-based).

        first_sample: of the step; by default step * global_batch, which it is unless a run has left samples out or
        has changed its batch.
        Raises: DataError for damaged tokens, also if the batch was prepared ahead in a thread.
        """
        size = self.geometry.global_batch
        first = step * size if first_sample is None else first_sample
        if self._threads is None:
            return self._training_batch(step, first)
        ready = self._ahead.pop((step, first), None)
        wanted = [(step + later, first + later * size) for later in range(1, 1 + self.prefetch)]
        for other in [key for key in self._ahead if key not in wanted]:
            self._ahead.pop(other).cancel()
        for other in wanted:
            if other not in self._ahead:
                self._ahead[other] = self._threads.submit(self._training_batch, *other)
        return ready.result() if ready is not None else self._training_batch(step, first)

    def validation(self, index: int) -> StepBatch:
        """Return validation batch `index`: held-out text, the same at every step and for every seed."""
        return self._make(self.validation_samples, index * self.geometry.global_batch, self.geometry.micro_batch)

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _training_batch(self, step: int, first_sample: int) -> StepBatch:
        return self._make(self.training_samples, first_sample, self.micro_batch_at(step))

    def _make(self, samples: Samples, first_sample: int, size: int) -> StepBatch:
        share, total = size * self.geometry.data_parallel, self.geometry.global_batch
        assert total % share == 0, (self.geometry, size)
        starts = range(first_sample + self.dp_rank * size, first_sample + total, share)
        micro_batches = (range(start, start + size) for start in starts)
        return StepBatch(
            tuple(collate([samples[i] for i in ids], ids, self.seq_length, self.pad_id) for ids in micro_batches)
        )


def folders_of(path: str | Mapping[str, float]) -> dict[str, float]:
    """Return the data folders and their weights."""
    return {path: 1.0} if isinstance(path, str) else dict(path)


def are_prepared(path: str | Mapping[str, float]) -> bool:
    """Return whether every data folder is there. Raises: PathError if this cannot be found out."""
    return all(is_folder(folder) for folder in folders_of(path))


def load_tokenizer(data: DataSection) -> Tokenizer:
    """Load the tokenizer of a run and check that every data folder was prepared with it.

    Raises: DataError if a folder is not a prepared one, or was prepared with another tokenizer.
    """
    folders = folders_of(data.path)
    manifests = {folder: Manifest.load(Path(folder)) for folder in folders}
    first = next(iter(folders))
    tokenizer = Tokenizer.load(data.tokenizer or Path(first) / TOKENIZER)
    for folder, manifest in manifests.items():
        if manifest.tokenizer_digest != tokenizer.digest:
            raise DataError(
                f"{folder} was prepared with another tokenizer (digest {manifest.tokenizer_digest}) than "
                f"{tokenizer.origin} (digest {tokenizer.digest}). Prepare it again: python tools/prepare_data.py "
                f"--tokenizer {shlex.quote(tokenizer.origin)} --output {shlex.quote(folder)} --overwrite --input TEXT"
            )
    return tokenizer


def build_objective(
    objective: ObjectiveSection, model: ModelSection, tokenizer: Tokenizer, packing: bool = False
) -> Objective:
    """Return BERT's or UL2's objective; with packing each document is an example of its own.

    Raises: ConfigError if seq_length is too short, DataError if the tokenizer has too few sentinels.
    """
    maker: MaskedLM | MixtureOfDenoisers
    if model.architecture == "bert":
        maker = MaskedLM(tokenizer, model.seq_length, objective.mask_rate, objective.whole_word)
    else:
        maker = MixtureOfDenoisers(tokenizer, model.seq_length, denoisers_of(objective))
    return PackedDocuments(maker, model.seq_length, tokenizer.eos_id) if packing else maker


def build_loader(
    data: DataSection,
    objective: ObjectiveSection,
    model: ModelSection,
    batch: BatchGeometry,
    *,
    seed: int,
    dp_rank: int,
    tokenizer: Tokenizer | None = None,
    micro_batch_at: Callable[[int], int] | None = None,
) -> Loader:
    """Open the data of a run for one data-parallel rank; everything is checked here, before the first step.

    model.vocab_size: the tokenizer's, as RunConfig.with_vocab_size ensures.
    Raises: DataError or ConfigError for everything that is wrong with folders, tokenizer or objective.
    """
    tokenizer = tokenizer or load_tokenizer(data)
    maker = build_objective(objective, model, tokenizer, data.packing)
    folders = folders_of(data.path)
    return Loader(
        Samples(folders, "train", maker, tokenizer, seed),
        Samples(folders, "validation", maker, tokenizer, VALIDATION_SEED),
        batch,
        dp_rank,
        seq_length=model.seq_length,
        pad_id=tokenizer.pad_id,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        micro_batch_at=micro_batch_at or (lambda _step: batch.micro_batch),
    )


def predictions_per_sequence(config: RunConfig) -> float:
    """Return the expected number of predicted positions of a full sequence, which depends on the objective only."""
    if config.model.architecture == "bert":
        return float(num_masked(config.model.seq_length - 2, config.objective.mask_rate))  # without [CLS] and [SEP]
    return mean_predictions(config.model.seq_length, denoisers_of(config.objective))
