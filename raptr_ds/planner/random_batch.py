"""A step of random tokens, for measuring: with the shapes of the run, and as many predictions as text would give."""

import numpy as np

from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import MicroBatch, Sample, StepBatch, collate
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.rng import stream


def random_step_batch(config: RunConfig, data_rank: int) -> StepBatch:
    """Return a data-parallel rank's micro batches of full sequences; config: with vocab_size.

    Every sequence has the expected number of predictions, rounded: BERT's anywhere, UL2's at its end.
    """
    size, batch = config.batch.micro_batch, config.batch
    starts = range(data_rank * size, batch.global_batch, size * batch.data_parallel)
    return StepBatch(tuple(random_micro_batch(config, range(start, start + size)) for start in starts))


def random_micro_batch(config: RunConfig, numbers: range) -> MicroBatch:
    """Return the sequences of these numbers, as `random_step_batch` has them."""
    length = config.model.seq_length
    return collate([_sample(config, number) for number in numbers], numbers, length, pad_id=0)


def _sample(config: RunConfig, number: int) -> Sample:
    length, vocab_size = config.model.seq_length, config.model.vocab_size
    assert vocab_size, "model.vocab_size is not known: see RunConfig.with_vocab_size"
    rng = stream(config.train.seed, "random sample", number)
    count = max(1, round(predictions_per_sequence(config)))
    is_ul2 = config.model.architecture == "ul2"
    positions = np.arange(length - count, length) if is_ul2 else np.sort(rng.permutation(length)[:count])
    return Sample(
        tokens=rng.integers(0, vocab_size, length),
        positions=positions.astype(np.int64),
        targets=rng.integers(0, vocab_size, count),
        prefix_length=length - count if is_ul2 else length,
    )
