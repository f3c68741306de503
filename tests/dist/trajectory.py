"""A small training run on any engine and layout, and its whole outcome: what the equality tests compare."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from raptr_ds.config.derive import derive_pipeline_layers
from raptr_ds.config.path_sections import PATH_SECTIONS, RunSizes
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import PackedSample, Sample, StepBatch, collate
from raptr_ds.engine.deepspeed_engine import NEVER
from raptr_ds.engine.pipeline import PipelineEngine
from raptr_ds.engine.protocol import Engine
from raptr_ds.engine.reference import ReferenceEngine
from raptr_ds.engine.zero import ZeroEngine
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import ProcessGroups, initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath, PathMethod, build_path_method
from raptr_ds.paths.stages import stage_layers

SEQ_LENGTH, VOCAB_SIZE, HIDDEN, NUM_HEADS = 16, 61, 32, 4
SEED = 7


@dataclass(frozen=True)
class Case:
    """A layout and a run."""

    engine: str = "deepspeed"  # or "reference"
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    zero: int = 0
    micro_batch: int = 2
    global_batch: int = 12
    recompute: bool = False
    keep_activations_up_to: int = 0
    micro_batches: tuple[int, ...] = ()  # of each phase, where they grow
    compile: bool = False
    packed: bool = False
    precision: str = "fp32"
    accumulate_in_fp32: bool = False
    fp16_scale_power: int = 8
    fp16_scale_window: int = 1000
    pipeline_layers: tuple[int, ...] | None = None
    reduce_bucket: int = 0
    overlap: bool = False
    round_robin: bool = False
    zero_3_options: tuple[tuple[str, int], ...] = ()
    # the run itself, which a layout must not change
    architecture: str = "bert"
    num_layers: int = 5
    method: str = "raptr"
    schedule: str = "3-4-5"
    growth_optimizer_state: str = "copied"
    growth_warmup_steps: int = 0
    paths_per_step: int = 1
    path_keys: tuple[tuple[str, Any], ...] = ()  # further keys of the path section
    steps: int = 9
    skipped_update: str = "freeze"
    max_norm: float = 1.0
    dropout: float = 0.1
    tied: bool = True
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Outcome:
    """Losses, norms, evaluation, and the final fp32 weights by canonical name (rank 0 only)."""

    losses: list[float]
    grad_norms: list[float]
    eval_loss: float
    weights: dict[str, np.ndarray]
    skipped: list[bool]


def run_case(launch: Launch, case: Case) -> Outcome:
    """Train the case on this rank."""
    groups = process_groups(launch, case)
    engine = build_engine(case, groups)
    method = path_method(case)
    results = []
    for step in range(case.steps):
        if growth := method.growth_at(step):
            engine.grow(growth)
        rate = case.learning_rate * method.learning_rate_factor_at(step)
        results.append(engine.train_step(batch_at(case, groups, step), method.path_at(step), step, rate))
    held_out = [batch_at(case, groups, 1000 + index) for index in range(2)]
    return Outcome(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        eval_loss=engine.evaluate(held_out, LayerPath.full(case.num_layers)),
        weights=full_weights(engine, groups),
        skipped=[result.skipped for result in results],
    )


def process_groups(launch: Launch, case: Case) -> ProcessGroups:
    """Return the case's groups on this rank."""
    return initialize_process_groups(launch, case.tensor, case.pipeline, sequence_parallel=case.sequence_parallel)


def path_method(case: Case) -> PathMethod:
    """Return the case's path method."""

    keys = {
        "method": case.method,
        "schedule": case.schedule,
        "residual_scale": "sqrt",
        "paths_per_step": case.paths_per_step,
        "growth_optimizer_state": case.growth_optimizer_state,
        "growth_warmup_steps": case.growth_warmup_steps,
        **dict(case.path_keys),
    }
    sizes = RunSizes(case.num_layers, case.steps, NUM_HEADS, case.pipeline)
    kind = PATH_SECTIONS[case.method]
    section = kind.model_validate({key: value for key, value in keys.items() if key in kind.model_fields})
    return build_path_method(section.completed(sizes), sizes, SEED)


def model_of(case: Case) -> ModelSection:
    """Return the case's model."""
    return ModelSection(
        architecture=case.architecture,  # type: ignore[arg-type]
        num_layers=case.num_layers,
        hidden_size=HIDDEN,
        num_attention_heads=NUM_HEADS,
        seq_length=SEQ_LENGTH,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=case.tied,
        hidden_dropout=case.dropout,
        attention_dropout=case.dropout,
    )


def build_engine(case: Case, groups: ProcessGroups) -> Engine:
    """Return the case's engine on this rank."""
    assert groups.sequence_parallel == case.sequence_parallel, "groups of another case"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    layers = stage_layers(case.pipeline_layers or derive_pipeline_layers(case.num_layers, case.pipeline))
    stage = build_stage(
        model_of(case),
        groups,
        layers[groups.pipeline_rank],
        case.recompute,
        SEED,
        case.compile,
        case.keep_activations_up_to,
    )
    if case.engine == "reference":
        return ReferenceEngine(stage, SEED, case.skipped_update, case.max_norm)
    config: dict[str, Any] = {
        "train_batch_size": case.global_batch,
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.global_batch // (case.micro_batch * groups.topology.data),
        "steps_per_print": NEVER,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-3,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.01,
                "torch_adam": True,
                "fused": True,  # as a run file's is by default; the reference has torch's plain one
            },
        },
        "gradient_clipping": case.max_norm,
        "zero_optimization": {"stage": case.zero},
    }
    if case.reduce_bucket:
        config["zero_optimization"]["reduce_bucket_size"] = case.reduce_bucket
    if case.overlap:
        config["zero_optimization"]["overlap_comm"] = True
    if case.round_robin:
        config["zero_optimization"]["round_robin_gradients"] = True
    if case.zero == 3:
        # Norms and small biases stay whole; by DeepSpeed's default all of so small a model would.
        options = {"param_persistence_threshold": HIDDEN, **dict(case.zero_3_options)}
        config["zero_optimization"] |= {f"stage3_{key}": value for key, value in options.items()}
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if case.precision == "fp16":
        config["fp16"] = {
            "enabled": True,
            "initial_scale_power": case.fp16_scale_power,
            "loss_scale_window": case.fp16_scale_window,
            "hysteresis": 1,
        }
    if case.accumulate_in_fp32:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine_class = PipelineEngine if case.pipeline > 1 else ZeroEngine
    engine = engine_class(config, stage, groups, SEED, case.skipped_update)
    assert engine.engine.zero_optimization_stage() == case.zero, "one data-parallel rank runs stages 1 and 2 as 0"
    return engine


def sample(case: Case, number: int) -> Sample:
    """Return a random sample with a learnable target and, on purpose, an uneven number of predictions."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(SEQ_LENGTH - 4, SEQ_LENGTH + 1))
    tokens = rng.integers(0, VOCAB_SIZE, length).astype(np.int64)
    count = int(rng.integers(1, 6))
    positions = np.sort(rng.choice(length, count, replace=False)).astype(np.int64)
    prefix = int(rng.integers(1, length)) if case.architecture == "ul2" else length
    return Sample(
        tokens=tokens, positions=positions, targets=(tokens[positions] * 7 + 3) % VOCAB_SIZE, prefix_length=prefix
    )


def packed_sample(case: Case, number: int) -> PackedSample:
    """Return the same tokens as two examples that share the sequence."""
    whole, cut = sample(case, number), 7
    parts = []
    for start, end in ((0, cut), (cut, len(whole.tokens))):
        here = (whole.positions >= start) & (whole.positions < end)
        prefix = end - start if case.architecture == "bert" else 1 + number % 3
        parts.append(Sample(whole.tokens[start:end], whole.positions[here] - start, whole.targets[here], prefix))
    return PackedSample(tuple(parts))


def batch_at(case: Case, groups: ProcessGroups, step: int) -> StepBatch:
    """Return this rank's share of a step's batch."""
    size = case.micro_batches[path_method(case).phase_at(step).index] if case.micro_batches else case.micro_batch
    share = size * groups.topology.data
    micro_batches = []
    for number in range(case.global_batch // share):
        first = step * case.global_batch + number * share + groups.data_rank * size
        ids = range(first, first + size)
        make = packed_sample if case.packed else sample
        micro_batches.append(collate([make(case, i) for i in ids], ids, SEQ_LENGTH, 0))
    return StepBatch(tuple(micro_batches))


def full_weights(engine: Engine, groups: ProcessGroups, kind: str = "weight") -> dict[str, np.ndarray]:
    """Return the full fp32 tensors of a kind by name, on rank 0; elsewhere nothing."""
    owned = [f for f in engine.fragments() if f.kind == kind and engine.owns(f)]
    plain = [(f.name, f.geometry, f.data.float().cpu().numpy().copy()) for f in owned]
    gathered: list[Any] = [None] * groups.topology.world_size
    dist.all_gather_object(gathered, plain, group=groups.control)
    if groups.rank:
        return {}
    locals_: dict[tuple[str, int], np.ndarray] = {}
    geometries = {}
    for name, run, data in (item for items in gathered for item in items):
        key = (name, run.start)
        flat = locals_.setdefault(key, np.full(int(np.prod(run.local_shape)), np.nan, np.float32))
        assert np.isnan(flat[run.offset : run.offset + len(data)]).all(), f"{name}: elements with two owners"
        flat[run.offset : run.offset + len(data)] = data
        geometries[key] = run
    full: dict[str, np.ndarray] = {}
    for key, flat in locals_.items():
        name, run = key[0], geometries[key]
        assert not np.isnan(flat).any(), f"{name}: elements without an owner"
        target = full.setdefault(name, np.full(run.full_shape, np.nan, np.float32))
        local = flat.reshape(run.local_shape)
        if run.dim is None:
            target[...] = local
        else:
            window = [slice(None)] * target.ndim
            window[run.dim] = slice(run.start, run.start + run.size)
            target[tuple(window)] = np.take(local, range(run.size), axis=run.dim)
    assert not any(np.isnan(value).any() for value in full.values())
    return full


def weights_differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Return the largest difference between two sets of weights; they must have the same names and shapes."""
    assert a.keys() == b.keys(), set(a) ^ set(b)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)
