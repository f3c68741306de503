"""Documents to token ids by worker processes, in order, each assigned to a split by a hash of its content."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import DataError
from raptr_ds.prepare.corpus import Source, grouped
from raptr_ds.prepare.readers import ReadingCounts

BATCH_CHARACTERS = 1 << 19
BATCH_DOCUMENTS = 4096
SMALL_CHARACTERS = 1 << 21


@dataclass
class EncodedBatch:
    """Token ids of consecutive documents, by split, each ending with the end-of-document token."""

    num_documents: int = 0
    text_bytes: int = 0
    train: list[np.ndarray] = field(default_factory=list)
    validation: list[np.ndarray] = field(default_factory=list)


def is_validation(content: bytes, fraction: float) -> bool:
    """Return whether a document is held out: a pure function of its text, so that all copies of it are in one split."""
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8, person=b"raptr_split").digest(), "little")
    return key < fraction * 2.0**64


def encode_batch(tokenizer: Tokenizer, documents: Sequence[str], validation_fraction: float) -> EncodedBatch:
    """Encode documents and append the end-of-document token to each."""
    batch = EncodedBatch()
    for document in documents:
        content = document.encode()
        tokens = np.append(tokenizer.encode(document), np.int32(tokenizer.eos_id))
        (batch.validation if is_validation(content, validation_fraction) else batch.train).append(tokens)
        batch.num_documents += 1
        batch.text_bytes += len(content)
    return batch


def encoded_batches(
    sources: Sequence[Source],
    counts: ReadingCounts,
    tokenizer: Tokenizer,
    validation_fraction: float,
    *,
    workers: int,
    skip_documents: int = 0,
) -> Iterator[EncodedBatch]:
    """Yield the encoded documents of all sources in order, without the first `skip_documents`.

    The batches, and so everything written from them, are the same for every number of workers.
    Raises: DataError if a worker dies.
    """
    documents = (document for source in sources for document in source.documents(counts))
    batches = grouped(itertools.islice(documents, skip_documents, None), BATCH_CHARACTERS, BATCH_DOCUMENTS)
    head = list(itertools.islice(batches, SMALL_CHARACTERS // BATCH_CHARACTERS))
    if workers <= 1 or len(head) < SMALL_CHARACTERS // BATCH_CHARACTERS:  # too little text for a pool to pay
        for batch in itertools.chain(head, batches):
            yield encode_batch(tokenizer, batch, validation_fraction)
        return
    running: deque[Future[EncodedBatch]] = deque()
    with worker_pool(workers, _load_tokenizer, tokenizer.model, validation_fraction) as pool:
        for batch in itertools.chain(head, batches):
            running.append(pool.submit(_encode_in_worker, batch))
            if len(running) >= 4 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


_worker: tuple[Tokenizer, float] | None = None


def _load_tokenizer(model: bytes, validation_fraction: float) -> None:
    """Keep the tokenizer in the worker process: sending it with every batch would cost more than encoding does."""
    global _worker  # noqa: PLW0603
    _worker = (Tokenizer(model), validation_fraction)


def _encode_in_worker(documents: list[str]) -> EncodedBatch:
    assert _worker is not None
    tokenizer, validation_fraction = _worker
    return encode_batch(tokenizer, documents, validation_fraction)


@contextmanager
def worker_pool(
    workers: int, initializer: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes that ignore interrupts and end with their parent; each runs initializer(*arguments).

    Processes are spawned: the parent has threads (progress bar, sentencepiece), which a fork would not copy.
    Raises: DataError if one dies.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (initializer, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely because memory ran out. Run the same command again with fewer "
            "--workers: it continues where it stopped."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(initializer: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
