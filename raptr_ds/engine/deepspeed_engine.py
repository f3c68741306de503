"""DeepSpeed's engines, made to follow a path: all that we override in them, and why.

Overrides of its ZeRO optimizers are in path_zero.py, those of ZeRO 3's prefetching in prefetch.py. Written against
deepspeed 0.19.8; tests/upstream shows when an override is no longer needed.
"""

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.schedule import BackwardPass, ReduceTiedGrads
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from raptr_ds.config.deepspeed_keys import DEFAULT_REDUCE_BUCKET
from raptr_ds.engine.parameter_groups import parameter_groups
from raptr_ds.engine.path_zero import follow_paths
from raptr_ds.engine.replicated import ReplicatedOptimizer
from raptr_ds.engine.tied_gradient import TiedGradient
from raptr_ds.engine.work_clock import WorkClock
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import ProcessGroups, timeout_of_the_world
from raptr_ds.parallel.uncompiled import keep_optimizers_eager

NEVER = 1 << 60
"""DeepSpeed's steps_per_print in runs whose file has none: the training loop prints progress itself."""


def tensor_parallel_unit(groups: ProcessGroups) -> SimpleNamespace:
    """Return the `mpu` that DeepSpeed asks for ranks and groups; megatron-core's module lacks the first three names."""
    answers = {
        "model_parallel_rank": groups.tensor_rank,
        "model_parallel_world_size": groups.topology.tensor,
        "model_parallel_group": groups.tensor,
        "tensor_model_parallel_rank": groups.tensor_rank,
        "tensor_model_parallel_world_size": groups.topology.tensor,
        "tensor_model_parallel_group": groups.tensor,
        "data_parallel_rank": groups.data_rank,
        "data_parallel_world_size": groups.topology.data,
        "data_parallel_group": groups.data,
    }
    return SimpleNamespace(**{f"get_{name}": lambda answer=answer: answer for name, answer in answers.items()})


class PathAware:
    """What both of DeepSpeed's engines need to follow a path: a mixin before them.

    stage: this rank's part of the model; its parameter names are canonical. clock: of this rank's own work in a step.
    """

    stage: Stage
    clock: WorkClock
    process_groups: ProcessGroups
    optimizer: Any

    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        """Let DeepSpeed build the inner optimizer by name, with our parameter groups, and wrap it.

        The wrapper is ReplicatedOptimizer at stage 0 and DeepSpeed's ZeRO optimizer at other stages. DeepSpeed itself
        would choose BF16_Optimizer for bf16 at stage 1 and other classes at stage 0, none of which can skip a layer.
        """
        keep_optimizers_eager()
        decay = (self.optimizer_params() or {}).get("weight_decay")
        self.basic_optimizer = self._configure_basic_optimizer(parameter_groups(self.stage.named_parameters(), decay))
        if self.zero_optimization_stage() == 0:
            model_dtype, accumulation_dtype = self.get_data_types()
            self.optimizer = ReplicatedOptimizer(
                self.basic_optimizer,
                self.process_groups,
                self.gradient_clipping(),
                CreateLossScaler(  # it scales fp16 only
                    model_dtype, self.loss_scale(), self.dynamic_loss_scale(), self.dynamic_loss_scale_args()
                ),
                accumulate_in_fp32=accumulation_dtype == torch.float32 and model_dtype != torch.float32,
                clock=self.clock,
            )
        else:
            self.optimizer = self._configure_zero_optimizer(self.basic_optimizer)
            follow_paths(self.optimizer, self.process_groups, self.stage, self.clock)
        # DeepSpeed raises when a dynamic loss scale reaches 1; raptr_ds.train.on_non_finite decides what happens then.
        self.optimizer.loss_scaler.raise_error_at_min_scale = False

    def allreduce_gradients(self: Any, *args: Any, **more: Any) -> None:
        """Reduce gradients at the accumulation boundary; nothing is sent for skipped layers."""
        if self.zero_optimization_stage() > 0:
            super().allreduce_gradients(*args, **more)  # type: ignore[misc]
        elif self.is_gradient_accumulation_boundary():
            self.optimizer.reduce_gradients()

    def clip_fp32_gradients(self) -> None:
        """Do nothing: ReplicatedOptimizer clips. DeepSpeed's norm counts tied and replicated parameters differently."""


class PathAwareEngine(PathAware, DeepSpeedEngine):
    """DeepSpeed's engine without pipeline stages."""


class PathAwarePipelineEngine(PathAware, PipelineEngine):
    """DeepSpeed's pipeline engine. tied: set on the stages that have a copy of a tied embedding."""

    tied: TiedGradient | None = None

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """Begin to receive the tied embedding's gradient before the last backward pass."""
        if self.tied is not None:
            self.tied.before_backward()
        with self.clock.working():
            super()._exec_backward_pass(buffer_id)

    def _exec_reduce_tied_grads(self) -> None:
        """Sum the tied embedding's gradient over the first and the last stage.

        DeepSpeed reads only `.grad`, which is None where gradients accumulate in separate fp32 tensors.
        """
        if self.tied is None:
            return
        assert self.stage.embedding is not None
        weight: Any = self.stage.embedding.word.weight
        gradients = (getattr(weight, attribute, None) for attribute in ("grad_accum", "fp32_grad", "grad"))
        self.tied.reduce(next(gradient for gradient in gradients if gradient is not None))

    _INSTRUCTION_MAP = {  # noqa: RUF012 - DeepSpeed's class attribute binds instructions to functions, not names
        **PipelineEngine._INSTRUCTION_MAP,
        BackwardPass: _exec_backward_pass,
        ReduceTiedGrads: _exec_reduce_tied_grads,
    }


def start_deepspeed_comm() -> None:
    """Initialize DeepSpeed's communication layer on the process groups that exist already."""
    if deepspeed_comm.is_initialized():
        return
    # On a CPU it would compile a shared-memory all-reduce in each new environment (comm/torch.py, build_shm_op): it
    # takes 20 s, works on one machine only, and sums in another order than gloo. Nothing else reads this table, and
    # DeepSpeed would run a compiler to fill it.
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    deepspeed_comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    # It makes groups, those of the pipeline among them, without a time-out (comm/torch.py, TorchBackend.new_group): on
    # NCCL they would give up after torch's 10 minutes, where all others of the run wait longer.
    deepspeed_comm.comm.cdb.new_group = partial(dist.new_group, timeout=timeout_of_the_world())


def build_deepspeed_engine(
    config: dict[str, Any], stage: Stage, module: nn.Module, groups: ProcessGroups
) -> PathAwareEngine | PathAwarePipelineEngine:
    """Return the DeepSpeed engine for `module`, which runs `stage`; for a PipelineModule the pipeline engine."""
    if isinstance(module, PipelineModule):
        unit, engine_class = module.mpu(), PathAwarePipelineEngine
    else:
        unit, engine_class = tensor_parallel_unit(groups), PathAwareEngine
    engine = engine_class.__new__(engine_class)
    # DeepSpeed's constructor calls _configure_optimizer, which needs these; nn.Module refuses them before it has run.
    clock = WorkClock(groups.device, is_on=groups.topology.world_size > 1)
    engine.__dict__.update(process_groups=groups, stage=stage, clock=clock)
    start_deepspeed_comm()
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True  # torch computes it on any CPU, slowly
    config = _summing_as_it_accumulates(_with_fitting_bucket(without_idle_zero(config, groups.topology.data), stage))
    parsed = DeepSpeedConfig(config, unit)
    engine.__init__(args=None, model=module, mpu=unit, config=config, config_class=parsed, dist_init_required=False)
    return engine


def without_idle_zero(config: dict[str, Any], data_parallel: int) -> dict[str, Any]:
    """Return the configuration with stages 1 and 2 replaced by 0 if there is one data-parallel rank.

    They would partition nothing, but copy each gradient through three flat buffers and each weight through two.
    """
    zero = config.get("zero_optimization", {})
    if data_parallel > 1 or zero.get("stage", 0) not in (1, 2):
        return config
    return {**config, "zero_optimization": {**zero, "stage": 0}}


def _with_fitting_bucket(config: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Return the configuration with ZeRO's gradient buffer no larger than all gradients of this rank.

    DeepSpeed allocates the whole buffer (runtime/zero/stage_1_and_2.py, setup_buckets; stage3.py), by default 5e8
    elements, twice with overlap_comm: more than a small model needs for everything else.
    """
    zero = config.get("zero_optimization", {})
    elements = sum(parameter.numel() for parameter in stage.parameters())
    asked = int(zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET))
    return {**config, "zero_optimization": {**zero, "reduce_bucket_size": min(asked, elements)}}


def _summing_as_it_accumulates(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with gradients summed over ranks in fp32 where they accumulate in fp32.

    DeepSpeed's ZeRO would round them to the working precision first, unless communication_data_type says something.
    """
    if str(config.get("data_types", {}).get("grad_accum_dtype")).lower() != "fp32":
        return config
    return {"communication_data_type": "fp32", **config}


def pipeline_module(body: nn.Module, groups: ProcessGroups) -> PipelineModule:
    """Return a PipelineModule with one layer for each pipeline stage: `body`, which runs the stage's part of a path."""
    start_deepspeed_comm()
    sizes = groups.topology
    with contextlib.redirect_stdout(None):  # it prints its partition, one layer a stage
        return PipelineModule(
            layers=[body] * sizes.pipeline,
            topology=PipeModelDataParallelTopology(num_pp=sizes.pipeline, num_mp=sizes.tensor, num_dp=sizes.data),
            partition_method="uniform",
            activation_checkpoint_interval=0,
        )
