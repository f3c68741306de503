"""Advice: where a layout wastes what the paths save, and which change would avoid it, with the simulator's numbers."""

from dataclasses import replace

from raptr_ds.config.batch import solve_batch
from raptr_ds.config.derive import derive_pipeline_layers
from raptr_ds.config.path_sections import RandomSection
from raptr_ds.config.run import RunConfig
from raptr_ds.errors import ConfigError
from raptr_ds.planner.plan import RunPlan, plan_run
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.shortage import gib
from raptr_ds.planner.step_time import Device
from raptr_ds.runtime.method import left_out_layers, path_method_of

_WORTH = 0.03  # of the run's time: less is within the cost model's error


def advice(config: RunConfig, device: Device) -> list[str]:
    """Return a line for each change that would make the run clearly faster; the vocabulary's size must be known."""
    plan, lines, better = _plan(config, device), [], config
    if isinstance(config.path, RandomSection) and config.path.sampling != "balanced":
        stages = config.parallel.pipeline_model_parallel_size
        path = config.path.model_copy(update={"sampling": "balanced", "balance_stages": stages})
        balanced = replace(config, path=path)
        faster = _plan(balanced, device)
        if faster.seconds < (1 - _WORTH) * plan.seconds:
            better = balanced
            lines.append(
                f"raptr_ds.path.sampling={config.path.sampling} on {stages} pipeline stages saves "
                f"{plan.seconds_saved:.1%} of the time where the FLOPs saved are {plan.flops_saved:.1%}: the fullest "
                f"stage sets the pace. With raptr_ds.path.sampling=balanced it is {faster.seconds_saved:.1%}: "
                f"{faster.seconds / 3600:,.4g} h instead of {plan.seconds / 3600:,.4g} h."
            )
    lines += left_out_layers(path_method_of(config))
    return lines + _uneven_lengths(better, device) + _other_pipelines(better, device)


def _uneven_lengths(config: RunConfig, device: Device) -> list[str]:
    """Return a line if a balanced phase saves clearly less time than FLOPs, as its length does not divide."""
    path, layers = config.path, config.model.num_layers
    stages = path.balance_stages if isinstance(path, RandomSection) else None
    if not isinstance(path, RandomSection) or stages is None or config.parallel.pipeline_model_parallel_size == 1:
        return []
    plan, lines = _plan(config, device), []
    for phase in plan.phases:
        by_time, by_flops = plan.full_step_seconds / phase.step_seconds, plan.full_step_flops / phase.step_flops
        length = phase.phase.fixed_length
        if by_time < (1 - _WORTH) * by_flops and length % stages:
            nearest = (length // stages * stages, -(-length // stages) * stages)
            least = max(1, len(path.fixed_in(layers)))
            fitting = " or ".join(str(other) for other in nearest if least <= other <= layers)
            lines.append(
                f"paths of {length} layers are {by_time:.2f}x as fast as the full model, by FLOPs {by_flops:.2f}x: "
                f"{length} does not divide by {stages} stages" + (f". {fitting} layers would." if fitting else ".")
            )
    return lines


def _other_pipelines(config: RunConfig, device: Device) -> list[str]:
    """Return a line for the fastest shorter pipeline with more data-parallel ranks instead, if it is worth it."""
    plan, stages = _plan(config, device), config.parallel.pipeline_model_parallel_size
    found = {stages: plan}
    for fewer in (size for size in range(1, stages) if stages % size == 0):
        given, ranks = config.batch, config.batch.data_parallel * stages // fewer
        try:
            batch = solve_batch(given.global_batch, given.micro_batch, None, ranks)
        except ConfigError:
            continue  # the global batch does not divide
        layers = derive_pipeline_layers(config.model.num_layers, fewer)
        parallel = config.parallel.model_copy(update={"pipeline_model_parallel_size": fewer, "pipeline_layers": layers})
        found[fewer] = _plan(replace(config, parallel=parallel, batch=batch), device)
    best = min(found, key=lambda size: (found[size].seconds, size))
    if found[best].seconds >= (1 - _WORTH) * plan.seconds:
        return []
    return [
        f"raptr_ds.parallel.pipeline_model_parallel_size={best} instead of {stages}, on as many processes, would "
        f"take {found[best].seconds / 3600:,.4g} h instead of {plan.seconds / 3600:,.4g} h, with "
        f"{gib(found[best].peak_bytes)} on the fullest rank instead of {gib(plan.peak_bytes)}."
    ]


def _plan(config: RunConfig, device: Device) -> RunPlan:
    return plan_run(path_method_of(config), setting_of(config, device))
