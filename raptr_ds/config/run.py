"""A run: every section complete, DeepSpeed's part complete, nothing left to derive."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from raptr_ds.config.batch import ACCUMULATION, MICRO, BatchGeometry
from raptr_ds.config.path_sections import AnyPathSection, RaptrSection, RunSizes, WidthSection
from raptr_ds.config.sections import (
    BLOCK,
    SECTIONS,
    CheckpointSection,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    ParallelSection,
    TrainSection,
)
from raptr_ds.config.usage import keep_used
from raptr_ds.errors import ConfigError


@dataclass(frozen=True)
class RunConfig:
    """A run with every derived value; as load_run_config returns it, every rule holds. Nothing changes it.

    optimizer, scheduler: {type, params} as in the file, completed. deepspeed: the dictionary for
    deepspeed.initialize, without scheduler and raptr_ds, batch sizes filled in; treat all three as read-only.
    derived: lines to print, a value each. warnings: lines about what is allowed and rarely meant. Only
    model.vocab_size may still be 0: see with_vocab_size.
    """

    model: ModelSection
    parallel: ParallelSection
    path: AnyPathSection
    objective: ObjectiveSection
    data: DataSection
    train: TrainSection
    eval: EvalSection
    checkpoint: CheckpointSection
    log: LogSection
    batch: BatchGeometry
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    deepspeed: dict[str, Any]
    derived: list[str] = field(default_factory=list, compare=False)
    warnings: list[str] = field(default_factory=list, compare=False)

    @property
    def zero(self) -> dict[str, Any]:
        """The zero_optimization object."""
        return self.deepspeed.get("zero_optimization", {})

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0..3."""
        return int(self.zero.get("stage", 0))

    @property
    def precision(self) -> str:
        """bf16, fp16 or fp32."""
        return next((name for name in ("bf16", "fp16") if self.deepspeed.get(name, {}).get("enabled")), "fp32")

    @property
    def gradient_clipping(self) -> float:
        """Largest norm of a step's gradient; 0: any."""
        return float(self.deepspeed["gradient_clipping"])

    @property
    def sizes(self) -> RunSizes:
        """What the path section depends on."""
        stages = self.parallel.pipeline_model_parallel_size
        return RunSizes(self.model.num_layers, self.train.steps, self.model.num_attention_heads, stages)

    def with_vocab_size(self, vocab_size: int) -> "RunConfig":
        """Return the run with the tokenizer's vocabulary. Raises: ConfigError if the file gives another size."""
        given = self.model.vocab_size
        if not given:
            line = f"raptr_ds.model.vocab_size={vocab_size} (the tokenizer's)"
            model = self.model.model_copy(update={"vocab_size": vocab_size})
            return replace(self, model=model, derived=[*self.derived, line])
        if given != vocab_size:
            raise ConfigError(
                f"raptr_ds.model.vocab_size={given} does not match the tokenizer, which has {vocab_size} entries. "
                f"Remove vocab_size (the tokenizer's is taken), set it to {vocab_size}, or use the other tokenizer."
            )
        return self

    def with_memory_sizes(self, zero_stage: int, micro_batch: int) -> "RunConfig":
        """Return the run with another ZeRO stage and micro batch; its global batch stays."""
        accumulation = self.batch.accumulation * self.batch.micro_batch // micro_batch
        deepspeed = {
            **self.deepspeed,
            "zero_optimization": {**self.zero, "stage": zero_stage},
            MICRO: micro_batch,
            ACCUMULATION: accumulation,
        }
        batch = replace(self.batch, micro_batch=micro_batch, accumulation=accumulation)
        changed = {
            f"{MICRO}={self.batch.micro_batch}": f"{MICRO}={micro_batch}",
            f"{ACCUMULATION}={self.batch.accumulation}": f"{ACCUMULATION}={accumulation}",
        }
        parts = (line.partition(" ") for line in self.derived)  # a value, and perhaps why
        derived = [changed.get(value, value) + space + why for value, space, why in parts]
        return replace(self, batch=batch, deepspeed=deepspeed, derived=derived)

    def compiles(self, on_gpu: bool) -> bool:
        """Return whether to compile layers on such a device: as the run file says, else on GPUs that can."""
        if self.train.compile is not None:
            return self.train.compile
        return on_gpu and self.zero_stage <= 2 and self.narrowed_by is None

    def evaluates_after(self, step: int) -> bool:
        """Return whether the run evaluates after `step` steps: at intervals and, if it evaluates at all, at its end."""
        return self.eval.due(step) or (step == self.train.steps and self.eval.batches > 0)

    @property
    def narrowed_by(self) -> str | None:
        """What lets layers run with some of their heads and MLP blocks, as a message names it; None: nothing."""
        if isinstance(self.path, WidthSection):
            return f"raptr_ds.path.method={self.path.method!r}"
        schedule = self.path.width_schedule if isinstance(self.path, RaptrSection) else None
        return None if schedule is None else f"raptr_ds.path.width_schedule={schedule!r}"

    def resolved(self) -> dict[str, Any]:
        """Return the whole run as a JSON-able run file with every value; loading it gives this run again."""
        tree = dict(self.deepspeed)
        if self.scheduler is not None:
            tree["scheduler"] = self.scheduler
        block = {name: getattr(self, name).model_dump(mode="json", exclude_none=True) for name in SECTIONS}
        return copy.deepcopy(keep_used({**tree, BLOCK: block}))
