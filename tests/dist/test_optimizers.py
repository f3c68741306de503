"""Every optimizer that a run file may ask for trains at every ZeRO stage, and has state for the layers that moved."""

from pathlib import Path

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.config.optimization import OPTIMIZERS
from raptr_ds.engine.build import build_engine
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from tests.dist.trajectory import HIDDEN, NUM_HEADS, SEQ_LENGTH, VOCAB_SIZE, Case, batch_at, process_groups
from tests.dist.workers import run_distributed


def layers_with_steps(launch: Launch, optimizer: str, stage: int) -> set[str]:
    """Train two steps of a run file on layers 0, 2 and 4; return the layers that the optimizer has stepped."""
    case = Case()
    groups = process_groups(launch, case)
    sizes = {
        "num_layers": case.num_layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": NUM_HEADS,
        "seq_length": SEQ_LENGTH,
        "vocab_size": VOCAB_SIZE,
    }
    overrides = [
        f"optimizer.type={optimizer}",
        f"zero_optimization.stage={stage}",
        f"train_batch_size={case.global_batch}",
        f"train_micro_batch_size_per_gpu={case.micro_batch}",
        *(f"raptr_ds.model.{key}={value}" for key, value in sizes.items()),
    ]
    config = load_run_config(Path("deepspeed_configs/bert_quickstart.json"), overrides, launch.world_size)
    engine = build_engine(config, groups)
    path = LayerPath((0, 2, 4), case.num_layers)
    losses = [engine.train_step(batch_at(case, groups, step=0), path, step, 1e-2).loss for step in range(2)]
    assert losses[1] < losses[0], losses
    stated = {name.split(".")[1] for name, count in engine.step_counts().items() if name.startswith("layers.") if count}
    return stated or {"no state"}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_offered_optimizer_steps_the_layers_of_a_path(optimizer: str, stage: int) -> None:
    if optimizer == "Lion":
        pytest.skip("Lion is DeepSpeed's fused one, which needs a GPU")
    expected = {"no state"} if optimizer == "SGD" else {"0", "2", "4"}
    assert run_distributed(layers_with_steps, 2, optimizer, stage) == [expected] * 2
