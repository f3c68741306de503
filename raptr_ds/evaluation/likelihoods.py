"""Log-likelihoods of continuations, in batches of rows in which what several sequences share is computed once."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from raptr_ds.evaluation.shared_rows import Row, Scored, batch_inputs
from raptr_ds.hf.load import PrefixModel

_LOGITS_AT_ONCE = 2**24  # elements: 64 MiB in fp32


Likelihood = tuple[float, bool]
"""Natural logarithm of the probability of a sequence's scored tokens; whether each was the likeliest."""


def moved_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Return both with the spaces at the context's end moved, as the harness does: a token begins with its space."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


@torch.inference_mode()
def likelihoods(
    model: PrefixModel,
    rows: Sequence[Row],
    sequences: Sequence[Scored],
    batch_size: int,
    on_batch: Callable[[int], None],
) -> dict[int, Likelihood]:
    """Return the likelihoods of the sequences in these rows, by their number.

    Probabilities are computed in fp32, or fp64 if the model is. batch_size: rows at once. on_batch: called with the
    number of sequences done.
    """
    found: dict[int, Likelihood] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        found |= _batch_likelihoods(model, batch, sequences)
        on_batch(sum(len(row.paths) for row in batch))
    return found


def _batch_likelihoods(model: PrefixModel, rows: Sequence[Row], sequences: Sequence[Scored]) -> dict[int, Likelihood]:
    llama = model.model
    tokens, positions, mask = batch_inputs(rows, sequences, llama.dtype)
    hidden = llama.model(
        input_ids=tokens.to(llama.device),
        attention_mask=mask if mask is None else mask.to(llama.device),
        position_ids=positions.to(llama.device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    numbers = [number for row in rows for number in row.paths]
    counts = [sequences[number].num_scored for number in numbers]
    paths = [index * tokens.shape[1] + path for index, row in enumerate(rows) for path in row.paths.values()]
    places = np.concatenate([path[-count:] for path, count in zip(paths, counts, strict=True)])
    scored = zip(numbers, counts, strict=True)
    targets = np.concatenate([np.array(sequences[number].tokens[-count:]) for number, count in scored])
    logs, is_likeliest = _token_likelihoods(llama.lm_head, hidden, places, targets)
    ends = np.cumsum(counts)
    return {
        number: (float(logs[end - count : end].sum()), bool(is_likeliest[end - count : end].all()))
        for number, count, end in zip(numbers, counts, ends, strict=True)
    }


def _token_likelihoods(
    head: torch.nn.Module, hidden: torch.Tensor, places: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each target (n,), its log-probability (fp64) and whether it is the likeliest token at its place.

    hidden (places, width). The output layer is computed only where something is predicted, once for each place.
    """
    used, inverse = np.unique(places, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    logs, is_likeliest = np.zeros(len(targets)), np.zeros(len(targets), bool)
    step = max(1, _LOGITS_AT_ONCE // int(head.weight.shape[0]))  # type: ignore[union-attr]
    for start in range(0, len(used), step):
        some = torch.from_numpy(used[start : start + step]).to(hidden.device)
        logits = head(hidden[some])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        first, last = np.searchsorted(inverse[order], [start, start + step])
        wanted = order[first:last]
        place = torch.from_numpy(inverse[wanted] - start).to(hidden.device)
        target = torch.from_numpy(targets[wanted]).to(hidden.device)
        logs[wanted] = (logits[place, target] - logits.logsumexp(-1)[place]).double().cpu().numpy()
        is_likeliest[wanted] = (logits.argmax(-1)[place] == target).cpu().numpy()
    return logs, is_likeliest
