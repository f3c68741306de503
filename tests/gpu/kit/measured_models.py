"""The models that are measured: run files of this repository with a batch for one device; tiny in a dry run."""

from dataclasses import dataclass
from pathlib import Path

from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from tests.gpu.kit.measured_device import IS_DRY_RUN

REPOSITORY = Path(__file__).resolve().parents[3]
_DRY_VOCABULARY = 512
_DRY_MODEL = ("num_layers=4", "hidden_size=64", "num_attention_heads=4", "seq_length=64")


@dataclass(frozen=True)
class Batch:
    """Sequences of a micro batch, and micro batches of a step."""

    micro: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.accumulation} x {self.micro}"


@dataclass(frozen=True)
class MeasuredModel:
    """A model of a run file, with the vocabulary that its tokenizer would have and the batch that it is measured on."""

    run_file: str
    vocab_size: int
    batch: Batch

    def config(self, overrides: tuple[str, ...] = (), batch: Batch | None = None) -> RunConfig:
        """Return the run on one process, with overrides as for `--set`. Raises: ConfigError, as training does."""
        taken = batch or self.batch
        sizes = (
            f"train_batch_size={taken.micro * taken.accumulation}",
            f"train_micro_batch_size_per_gpu={taken.micro}",
        )
        tiny = tuple(f"raptr_ds.model.{setting}" for setting in _DRY_MODEL) if IS_DRY_RUN else ()
        file = REPOSITORY / "deepspeed_configs" / f"{self.run_file}.json"
        config = load_run_config(file, [*sizes, *tiny, *overrides], world_size=1)
        return config.with_vocab_size(_DRY_VOCABULARY if IS_DRY_RUN else self.vocab_size)


MODELS = {
    "ul2_1b": MeasuredModel("ul2_1b_raptr", 32000, Batch(2, 1) if IS_DRY_RUN else Batch(8, 2)),
    "bert_base": MeasuredModel("bert_base_raptr", 30522, Batch(2, 1) if IS_DRY_RUN else Batch(32, 2)),
}
