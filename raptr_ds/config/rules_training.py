"""Cross-section rules of ZeRO, precision, optimizer and schedule, as a table: each returns its error text or None."""

from collections.abc import Callable

from raptr_ds.config.derive import loss_scale_search_steps
from raptr_ds.config.draft import Draft


def pipeline_allows_zero_stage(draft: Draft) -> str | None:
    """DeepSpeed's pipeline engine takes ZeRO 0 and 1."""
    stages = draft.parallel.pipeline_model_parallel_size
    if stages == 1 or draft.zero_stage <= 1:
        return None
    return (
        f"raptr_ds.parallel.pipeline_model_parallel_size={stages} needs zero_optimization.stage <= 1 (DeepSpeed's "
        f"pipeline engine); got {draft.zero_stage}. Set zero_optimization.stage to 1, or pipeline_model_parallel_size "
        "to 1."
    )


def overlapped_reduction_sees_every_path(draft: Draft) -> str | None:
    """DeepSpeed's ZeRO 1 with overlap_comm reduces what the last micro batch has a gradient of, and nothing else."""
    if draft.path.paths_per_step == 1 or draft.zero_stage != 1 or not draft.zero.get("overlap_comm"):
        return None
    return (
        f"raptr_ds.path.paths_per_step={draft.path.paths_per_step} with zero_optimization.stage=1 and overlap_comm="
        "true: DeepSpeed then reduces the gradients of the last micro batch's layers only. Remove overlap_comm, or "
        "set zero_optimization.stage to 2."
    )


def compile_allows_zero_stage(draft: Draft) -> str | None:
    """ZeRO 3 empties a layer's parameters between its uses; a graph is compiled for tensors that are there."""
    if not draft.train.compile or draft.zero_stage <= 2:
        return None
    return (
        f"raptr_ds.train.compile=true needs zero_optimization.stage <= 2; got {draft.zero_stage}, which gathers each "
        "parameter while its layer runs, by hooks that a compiled layer does not call. Set zero_optimization.stage to "
        "2, or raptr_ds.train.compile to false."
    )


def one_precision(draft: Draft) -> str | None:
    """bf16 or fp16, not both."""
    both = all(draft.deepspeed.get(name, {}).get("enabled", False) for name in ("bf16", "fp16"))
    return "bf16.enabled and fp16.enabled are both true. Set one of them to false." if both else None


def accumulation_dtype_fits(draft: Draft) -> str | None:
    """Gradients are accumulated in the model's own type, or in fp32."""
    dtype = str(draft.deepspeed.get("data_types", {}).get("grad_accum_dtype", draft.precision)).lower()
    if dtype in {draft.precision, "fp32"}:
        return None
    return (
        f"data_types.grad_accum_dtype={dtype!r} must be 'fp32' or the training's own precision, {draft.precision!r}. "
        "Set it to one of them, or remove it."
    )


def adamw_is_adamw(draft: Draft) -> str | None:
    """DeepSpeed's AdamW decouples weight decay whatever adam_w_mode says."""
    if draft.optimizer["type"] != "AdamW" or draft.optimizer["params"].get("adam_w_mode", True):
        return None
    return (
        "optimizer.params.adam_w_mode=false has no effect on optimizer.type='AdamW'. "
        "Set optimizer.type to 'Adam', or remove adam_w_mode."
    )


def nesterov_has_momentum(draft: Draft) -> str | None:
    """torch's SGD takes nesterov with momentum and without dampening only."""
    params = draft.optimizer["params"]
    if not params.get("nesterov") or (params.get("momentum", 0) > 0 and not params.get("dampening", 0)):
        return None
    return (
        f"optimizer.params.nesterov=true needs momentum > 0 and dampening 0; got momentum={params.get('momentum', 0)}, "
        f"dampening={params.get('dampening', 0)}. Correct them, or remove nesterov."
    )


def one_peak_learning_rate(draft: Draft) -> str | None:
    """The schedule's peak is the optimizer's learning rate."""
    params = draft.scheduler["params"] if draft.scheduler else {}
    peak, rate = params.get("warmup_max_lr"), draft.optimizer["params"]["lr"]
    if peak is None or peak == rate:
        return None
    return (
        f"scheduler.params.warmup_max_lr={peak} and optimizer.params.lr={rate} both say the peak learning rate. "
        "Remove warmup_max_lr: it is optimizer.params.lr."
    )


def warmup_starts_below_peak(draft: Draft) -> str | None:
    """The warm-up rises."""
    params = draft.scheduler["params"] if draft.scheduler else {}
    low, peak = params.get("warmup_min_lr", 0), params.get("warmup_max_lr", float("inf"))
    if low <= peak:
        return None
    return (
        f"scheduler.params.warmup_min_lr={low} must be at most the peak learning rate, optimizer.params.lr={peak}. "
        "Lower warmup_min_lr."
    )


def warmup_ends(draft: Draft) -> str | None:
    """The learning rate's warm-up, and its decay, fit into the run."""
    params = draft.scheduler["params"] if draft.scheduler else {}
    warmup, decay, steps = params.get("warmup_num_steps", 0), params.get("decay_num_steps", 0), draft.train.steps
    total = params.get("total_num_steps", steps)
    if warmup >= steps:
        return (
            f"scheduler.params.warmup_num_steps={warmup} must be less than raptr_ds.train.steps={steps}. "
            "Lower it, or write scheduler.params.warmup_ratio, a fraction of the steps."
        )
    if warmup + decay > total:
        return (
            f"scheduler.params: warmup_num_steps={warmup} + decay_num_steps={decay} must be at most total_num_steps="
            f"{total}. Shorten one, or write warmup_ratio and decay_ratio, fractions of the steps."
        )
    return None


def evaluation_has_batches(draft: Draft) -> str | None:
    """An evaluation that is asked for evaluates something."""
    if draft.eval.batches or not draft.eval.interval:
        return None
    return (
        f"raptr_ds.eval.interval={draft.eval.interval} with raptr_ds.eval.batches=0 would evaluate nothing. "
        "Set batches to 1 or more, or interval to 0."
    )


def non_finite_limit_is_beyond_fp16s_search(draft: Draft) -> str | None:
    """Steps that fp16 skips while it looks for its loss scale are no fault of the run."""
    limit, search = draft.train.max_non_finite_steps, loss_scale_search_steps(draft.deepspeed.get("fp16", {}))
    if not limit or limit > search:
        return None
    return (
        f"raptr_ds.train.max_non_finite_steps={limit} must be more than {search}: fp16 may skip that many steps in a "
        f"row until its loss scale fits (fp16.initial_scale_power + hysteresis - 1). Set it to {search + 1} or more, "
        "or to 0, or lower fp16.initial_scale_power."
    )


def rollback_can_happen(draft: Draft) -> str | None:
    """A rollback has an occasion, and a checkpoint to go back to."""
    if draft.train.on_non_finite != "rollback":
        return None
    if draft.train.max_non_finite_steps == 0:
        return (
            "raptr_ds.train.on_non_finite='rollback' with max_non_finite_steps=0 would never act. "
            "Set max_non_finite_steps to 1 or more, or remove on_non_finite."
        )
    if draft.checkpoint.interval == 0:
        return (
            "raptr_ds.train.on_non_finite='rollback' needs checkpoints to go back to; got "
            "raptr_ds.checkpoint.interval=0. Set interval to a number of steps, or on_non_finite to 'stop'."
        )
    return None


TRAINING_RULES: tuple[Callable[[Draft], str | None], ...] = (
    overlapped_reduction_sees_every_path,
    pipeline_allows_zero_stage,
    compile_allows_zero_stage,
    one_precision,
    accumulation_dtype_fits,
    adamw_is_adamw,
    nesterov_has_momentum,
    one_peak_learning_rate,
    warmup_starts_below_peak,
    warmup_ends,
    evaluation_has_batches,
    non_finite_limit_is_beyond_fp16s_search,
    rollback_can_happen,
)
