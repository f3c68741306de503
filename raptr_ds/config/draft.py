"""A run before its rules are checked: sections and DeepSpeed part, completed, but not yet known to fit together."""

from dataclasses import dataclass
from typing import Any

from raptr_ds.config.sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    ParallelSection,
    PathSection,
    TrainSection,
)


@dataclass(frozen=True)
class Draft:
    """What the rules see. world_size: processes of the launch; deepspeed: the file without its raptr_ds block."""

    model: ModelSection
    parallel: ParallelSection
    path: PathSection
    objective: ObjectiveSection
    data: DataSection
    train: TrainSection
    eval: EvalSection
    checkpoint: CheckpointSection
    log: LogSection
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    deepspeed: dict[str, Any]
    world_size: int

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
        enabled = [name for name in ("bf16", "fp16") if self.deepspeed.get(name, {}).get("enabled", False)]
        return enabled[0] if enabled else "fp32"

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size
