"""Optimizers and learning-rate schedules that a run file may ask for, and their parameters, checked and completed."""

from collections.abc import Iterator
from typing import Any

from raptr_ds.config.deepspeed_keys import Check, choice, flag, must, number, whole
from raptr_ds.config.deepspeed_part import auto_value, check_table
from raptr_ds.config.overrides import Place
from raptr_ds.errors import nearest


def _is_share(value: Any) -> bool:
    return number(0, 1)(value) is None and value < 1


_betas = must(
    "a list of two numbers, 0 or more and less than 1",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_share, value)),
)
_share = must("a fraction of the steps, 0 or more and less than 1", _is_share)

_RATE: dict[str, Check] = {"lr": number(0, above=True), "weight_decay": number(0)}
_TORCH_ONLY = ("foreach", "fused", "maximize", "amsgrad")
_DEEPSPEED_ONLY = ("bias_correction", "set_grad_none")
_ADAM: dict[str, Check] = {
    **_RATE,
    "betas": _betas,
    "eps": number(0, above=True),
    **dict.fromkeys(("torch_adam", *_TORCH_ONLY, *_DEEPSPEED_ONLY, "adam_w_mode"), flag),
}

OPTIMIZERS: dict[str, dict[str, Check]] = {
    "AdamW": _ADAM,
    "Adam": _ADAM,
    "Lion": {**_RATE, "betas": _betas},
    "SGD": {**_RATE, "momentum": number(0, 1), "dampening": number(0), "nesterov": flag},
}
"""Names that DeepSpeed 0.19.8 builds (runtime/engine.py, _configure_basic_optimizer) and that step layer by layer."""

NOT_OFFERED = {
    "adagrad": "is built a second time by DeepSpeed's ZeRO, without the parameter groups of layers",
    **dict.fromkeys(("lamb", "muon"), "updates whole matrices, which tensor parallelism and ZeRO cut"),
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "needs the mup package and its own initialization"),
    **dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), "was removed from DeepSpeed"),
}

_WARMUP: dict[str, Check] = {
    "warmup_num_steps": whole(0),
    "warmup_ratio": _share,
    "warmup_type": choice("log", "linear"),
}
_WARMUP_LR: dict[str, Check] = {**_WARMUP, "warmup_min_lr": number(0), "warmup_max_lr": number(0, above=True)}
_TOTAL: dict[str, Check] = {"total_num_steps": whole(1)}

SCHEDULERS: dict[str, dict[str, Check]] = {
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": {**_WARMUP_LR, **_TOTAL},
    "WarmupCosineLR": {**_WARMUP, **_TOTAL, "warmup_min_ratio": number(0, 1), "cos_min_ratio": number(0, 1)},
    "WarmupInverseSqrtLR": _WARMUP_LR,
    "WarmupStableDecayLR": {
        **_WARMUP_LR,
        **_TOTAL,
        "decay_num_steps": whole(0),
        "decay_ratio": number(0, 1),  # 1: no step stays at the peak
        "decay_type": choice("linear", "cosine", "sqrt"),
        "decay_min_lr": number(0),
    },
}
"""DeepSpeed's own three first (runtime/lr_schedules.py), then ours in the same style."""

DEFAULT_LR = 1e-3
_DEFAULT_TYPE = "AdamW"
_DEFAULT_PARAMS = {"weight_decay": 0.01, "torch_adam": True}
_DEFAULT_WARMUP_STEPS = 1000
_LEAST_SHARE = 0.001
"""Steps at less of the peak learning rate train next to nothing."""


def check_optimizer(optimizer: dict[str, Any], place: Place) -> list[str]:
    """Return one message for each thing that is wrong with the `optimizer` object."""
    name = canonical(optimizer.get("type", _DEFAULT_TYPE), OPTIMIZERS)
    if name is None:
        return [_wrong_type("optimizer", optimizer, list(OPTIMIZERS), place)]
    params = {**_defaults(optimizer), **optimizer.get("params", {})}
    errors = _check_params("optimizer", name, params, OPTIMIZERS[name], place)
    unusable = _DEEPSPEED_ONLY if params.get("torch_adam") else _TORCH_ONLY
    for key in unusable if name in {"Adam", "AdamW"} else ():
        if key in params and (key != "amsgrad" or params[key]):  # DeepSpeed's takes false, and nothing else
            owner, state = ("DeepSpeed's", "true") if params.get("torch_adam") else ("torch's", "not set")
            errors.append(
                f"optimizer.params.{key}{place(f'optimizer.params.{key}')} has no use with torch_adam {state}: it is "
                f"a parameter of {owner} implementation. Remove {key}, or change optimizer.params.torch_adam."
            )
    if params.get("fused") is True and params.get("foreach") is True and params.get("torch_adam"):
        errors.append(
            "optimizer.params.fused=true and optimizer.params.foreach=true choose two implementations of torch's Adam. "
            "Set one of them to true: fused is the faster one."
        )
    return errors


def check_scheduler(scheduler: dict[str, Any], place: Place) -> list[str]:
    """Return one message for each thing that is wrong with the `scheduler` object."""
    name = canonical(scheduler.get("type"), SCHEDULERS)
    if name is None:
        return [_wrong_type("scheduler", scheduler, list(SCHEDULERS), place)]
    params = scheduler.get("params", {})
    errors = _check_params("scheduler", name, params, SCHEDULERS[name], place)
    for ratio, steps in (("warmup_ratio", "warmup_num_steps"), ("decay_ratio", "decay_num_steps")):
        if ratio in params and steps in params:
            errors.append(
                f"scheduler.params.{ratio}={params[ratio]} and scheduler.params.{steps}={params[steps]} set the same "
                "thing twice. Keep one."
            )
    warmup, decay = params.get("warmup_ratio"), params.get("decay_ratio")
    if not errors and warmup is not None and decay is not None and warmup + decay > 1:
        errors.append(
            f"scheduler.params: warmup_ratio={warmup} + decay_ratio={decay} must be at most 1, all steps. Lower one."
        )
    return errors


def broken_optimization_rules(
    optimizer: dict[str, Any], scheduler: dict[str, Any] | None, num_steps: int
) -> Iterator[str]:
    """Yield a message for each rule that the completed optimizer and schedule break in a run of num_steps."""
    params = optimizer["params"]
    if optimizer["type"] == "AdamW" and not params.get("adam_w_mode", True):
        # DeepSpeed's AdamW decouples weight decay even if adam_w_mode is false.
        yield (
            "optimizer.params.adam_w_mode=false has no effect on optimizer.type='AdamW'. "
            "Set optimizer.type to 'Adam', or remove adam_w_mode."
        )
    momentum, dampening = params.get("momentum", 0), params.get("dampening", 0)
    if params.get("nesterov") and (momentum <= 0 or dampening):
        yield (
            f"optimizer.params.nesterov=true needs momentum > 0 and dampening 0; got momentum={momentum}, "
            f"dampening={dampening}. Correct them, or remove nesterov."
        )
    if scheduler is not None:
        yield from _broken_schedule_rules(scheduler["params"], params["lr"], num_steps)


def schedule_warnings(scheduler: dict[str, Any] | None, lr: float, num_steps: int) -> Iterator[str]:
    """Yield a line for what a completed schedule does that is allowed and rarely meant."""
    params = scheduler["params"] if scheduler else {}
    total = params.get("total_num_steps", num_steps)
    if total > num_steps:
        yield (
            f"scheduler.params.total_num_steps={total} is more than raptr_ds.train.steps={num_steps}: the run "
            "ends before the learning rate has decayed. Remove total_num_steps unless you mean that."
        )
    elif total < num_steps:
        yield (
            f"scheduler.params.total_num_steps={total} is less than raptr_ds.train.steps={num_steps}: the "
            f"learning rate stays at {_lowest_rate(params, lr):g} for the last {num_steps - total} steps. Remove "
            "total_num_steps unless you mean that."
        )


def _lowest_rate(params: dict[str, Any], lr: float) -> float:
    """Return the rate that a schedule with an end decays to."""
    return params["cos_min_ratio"] * lr if "cos_min_ratio" in params else params.get("decay_min_lr", 0.0)


def _broken_schedule_rules(params: dict[str, Any], lr: float, num_steps: int) -> Iterator[str]:
    low, peak = params.get("warmup_min_lr", 0), params.get("warmup_max_lr", lr)
    if peak != lr:
        yield (
            f"scheduler.params.warmup_max_lr={peak} and optimizer.params.lr={lr} both set the peak learning rate. "
            "Remove warmup_max_lr: it is optimizer.params.lr."
        )
    if low > peak:
        yield (
            f"scheduler.params.warmup_min_lr={low} must be at most the peak learning rate, optimizer.params.lr={peak}. "
            "Lower warmup_min_lr."
        )
    warmup, decay = params["warmup_num_steps"], params.get("decay_num_steps", 0)
    total, last = params.get("total_num_steps", num_steps), params.get("decay_min_lr", 0.0)
    if last > lr:
        yield (
            f"scheduler.params.decay_min_lr={last} must be at most the peak learning rate, optimizer.params.lr={lr}, "
            "or the decay would rise. Lower decay_min_lr."
        )
    elif total < num_steps and (lowest := _lowest_rate(params, lr)) < _LEAST_SHARE * lr:
        key = "decay_min_lr" if "decay_min_lr" in params else "cos_min_ratio" if "cos_min_ratio" in params else ""
        keep = f", or raise scheduler.params.{key} to train on at a low rate" if key else ""
        yield (
            f"scheduler.params.total_num_steps={total} is less than raptr_ds.train.steps={num_steps}: the last "
            f"{num_steps - total} steps would have the learning rate {lowest:g}. Remove total_num_steps (the "
            f"decay then ends with the run), or set it to {num_steps}{keep}."
        )
    if warmup >= num_steps:
        yield (
            f"scheduler.params.warmup_num_steps={warmup} must be less than raptr_ds.train.steps={num_steps}. "
            "Lower it, or write scheduler.params.warmup_ratio, a fraction of the steps."
        )
    elif warmup + decay > total:
        yield (
            f"scheduler.params: warmup_num_steps={warmup} + decay_num_steps={decay} must be at most total_num_steps="
            f"{total}. Shorten one, or write warmup_ratio and decay_ratio, fractions of the steps."
        )


def canonical(name: Any, known: dict[str, Any]) -> str | None:
    """Return the spelling in `known` of a name given in any case, None if there is none."""
    return {key.lower(): key for key in known}.get(name.lower()) if isinstance(name, str) else None


def complete_optimizer(optimizer: dict[str, Any] | None, scheduler: dict[str, Any] | None) -> dict[str, Any]:
    """Return the optimizer with its canonical type and a learning rate; AdamW if the file has none.

    torch's Adam is its fused one unless the file sets `foreach` or `fused`: one pass over weights, gradients and
    moments instead of about ten, the same to rounding, on CPUs and GPUs.
    """
    optimizer = optimizer or {}
    params = {**_defaults(optimizer), **optimizer.get("params", {})}
    params.setdefault("lr", (scheduler or {}).get("params", {}).get("warmup_max_lr", DEFAULT_LR))
    if params.get("torch_adam") and not params.get("foreach"):
        params.setdefault("fused", True)
    return {"type": canonical(optimizer.get("type", _DEFAULT_TYPE), OPTIMIZERS), "params": params}


def complete_scheduler(scheduler: dict[str, Any] | None, lr: float, num_steps: int) -> dict[str, Any] | None:
    """Return the schedule with every parameter a number of steps or a rate, ratios resolved; None stays None.

    Units: lr is the optimizer's, num_steps the run's. Defaults are DeepSpeed's, but total_num_steps, warmup_max_lr
    and a warm-up that fits a short run.
    """
    if scheduler is None:
        return None
    name = canonical(scheduler["type"], SCHEDULERS)
    assert name is not None
    params = dict(scheduler.get("params", {}))
    known = SCHEDULERS[name]
    total = int(params.get("total_num_steps", num_steps))
    ratio = params.pop("warmup_ratio", None)
    # A ratio below 1 leaves a step, however it is rounded; ratios that fit together fit when rounded.
    default = min(_DEFAULT_WARMUP_STEPS, num_steps // 10) if ratio is None else round(ratio * num_steps)
    default = min(default, num_steps - 1)
    values: dict[str, Any] = {"warmup_num_steps": default, "warmup_type": "log"}
    if "warmup_max_lr" in known:
        values |= {"warmup_min_lr": 0.0, "warmup_max_lr": lr}
    if "total_num_steps" in known:
        values["total_num_steps"] = total
    if name == "WarmupCosineLR":
        values |= {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001}
    if name == "WarmupStableDecayLR":
        warmup = int(params.get("warmup_num_steps", default))
        decay = min(round(params.pop("decay_ratio", 0.1) * total), max(0, total - warmup))
        values |= {"decay_num_steps": decay, "decay_type": "linear", "decay_min_lr": 0.0}
    values |= params
    values |= {key: int(values[key]) for key in values if key.endswith("_num_steps")}
    return {"type": name, "params": values}


def _defaults(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return our defaults for an optimizer without a type.

    A type that the run file names, AdamW too, has DeepSpeed's defaults instead: DeepSpeed's own implementation, without
    weight decay.
    """
    return {} if "type" in optimizer else _DEFAULT_PARAMS


def _wrong_type(part: str, given: dict[str, Any], known: list[str], place: Place) -> str:
    name = given.get("type")
    if name is None:
        return f"{part}.type is missing: it must be one of {', '.join(known)}."
    if name == "auto":
        return auto_value(f"{part}.type", place, f"must be one of {', '.join(known)}")
    why = NOT_OFFERED.get(str(name).lower()) if part == "optimizer" else None
    guess = f": it {why}." if why else nearest(str(name), known) or "."
    return (
        f"{part}.type={name!r}{place(f'{part}.type')} is not supported by raptr_ds{guess} "
        f"It must be one of {', '.join(known)}."
    )


def _check_params(part: str, name: str, params: dict[str, Any], known: dict[str, Check], place: Place) -> list[str]:
    return [f"{part}.type={name}: {error}" for error in check_table(params, known, f"{part}.params.", place)]
