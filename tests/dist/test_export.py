"""Export of checkpoints that other layouts have written: the trained weights, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.parallel.launch import Launch
from tests.dist.trajectory import Case, batch_at, build_engine, full_weights, model_of, path_method, process_groups
from tests.dist.workers import run_distributed


def train_and_save(launch: Launch, case: Case, folder: str) -> dict[str, np.ndarray]:
    """Train two steps, write a checkpoint, and return the full weights, on rank 0."""
    groups = process_groups(launch, case)
    engine, method = build_engine(case, groups), path_method(case)
    for step in range(2):
        engine.train_step(batch_at(case, groups, step), method.path_at(step), step, case.learning_rate)
    checkpoints = Checkpoints(Path(folder), groups, keep=1)
    checkpoints.save(engine, 2, model_of(case), {})
    checkpoints.wait()
    checkpoints.close()
    return full_weights(engine, groups)


@pytest.mark.parametrize(
    ("ranks", "case"),
    [
        (2, Case(architecture="ul2", tensor=2, sequence_parallel=True, zero=3, dropout=0.0, precision="bf16")),
        (4, Case(tensor=2, pipeline=2, tied=False)),
    ],
    ids=["ul2-tp2-sp-zero3-bf16", "bert-tp2-pp2-untied"],
)
def test_the_export_of_any_layout_is_the_trained_model(ranks: int, case: Case, tmp_path: Path) -> None:
    # Not for the whole file, which the ranks import too: transformers takes a second of CPU.
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from raptr_ds.hf.export import export
    from raptr_ds.hf.model import from_hugging_face

    trained = run_distributed(train_and_save, ranks, case, str(tmp_path / "checkpoints"))[0]
    export(tmp_path, tmp_path / "out", torch.float32, "none")
    loader = AutoModelForMaskedLM if case.architecture == "bert" else AutoModelForCausalLM
    model, weights = from_hugging_face(loader.from_pretrained(tmp_path / "out"))
    assert model == model_of(case)
    assert weights.keys() == trained.keys()
    assert [name for name, tensor in weights.items() if not np.array_equal(tensor.numpy(), trained[name])] == []
