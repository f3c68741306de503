"""Upstream faults in as few lines as they take, without any of our engines; workers.py of tests/dist runs them."""

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.parallel.launch import Launch


class Chain(nn.Module):
    """Linear layers of which a call runs some."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_layers))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)

    def forward(self, x: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        for layer in path:
            x = x + torch.tanh(self.layers[layer](x))
        return x.square().mean()


def start(launch: Launch, timeout: timedelta | None = None) -> None:
    """Start gloo and hand it to DeepSpeed."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    address = f"tcp://{launch.master_addr}:{launch.master_port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)


def initialize(model: nn.Module, stage: int, optimizer: str = "SGD", **more: Any) -> Any:
    """Return DeepSpeed's own engine."""
    import deepspeed

    params: dict[str, Any] = {"lr": 0.1} if optimizer == "SGD" else {"lr": 0.1, "torch_adam": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": optimizer, "params": params},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 1 << 60,
        **more,
    }
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def weight_of(engine: Any, layer: int) -> torch.Tensor:
    """Return the full fp32 weight of a layer."""
    from deepspeed.utils import safe_get_full_fp32_param

    parameter = engine.module.layers[layer].weight
    full = safe_get_full_fp32_param(parameter)
    return (parameter.detach() if full is None else full).clone()


def moves_of_a_skipped_layer(launch: Launch, stage: int, optimizer: str = "SGD") -> list[float]:
    """Return how far the optimizer moves layer 1 in three steps that take it, skip it, skip it."""
    start(launch)
    engine = initialize(Chain(3), stage, optimizer)
    moves = []
    for path in ((0, 1, 2), (0, 2), (0, 2)):
        before = weight_of(engine, 1)
        engine.backward(engine(torch.ones(1, 8), path))
        engine.step()
        moves.append(float((weight_of(engine, 1) - before).norm()))
    return moves


def weight_after_micro_batches(
    launch: Launch, stage: int, steps: tuple[tuple[tuple[int, ...], ...], ...], options: dict[str, Any]
) -> list[float]:
    """Return layer 1's weight after steps of two micro batches, each of which takes a path of its own."""
    start(launch)
    zero = {"stage": stage, **options}
    engine = initialize(Chain(3), stage, gradient_accumulation_steps=2, zero_optimization=zero)
    for paths in steps:
        for path in paths:
            engine.backward(engine(torch.full((1, 8), 1.0 + launch.rank), path))
            engine.step()
    return weight_of(engine, 1).flatten().tolist()


def moves_as_the_loss_scale_grows(launch: Launch, stage: int) -> list[float]:
    """Return how far SGD moves a layer in two steps, after the second of which the loss scale doubles."""
    from deepspeed.accelerator import get_accelerator

    start(launch)
    get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU
    fp16 = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1, "hysteresis": 1}
    engine = initialize(Chain(1), stage, fp16=fp16)
    moves, scales = [], []
    for _ in range(2):
        before = weight_of(engine, 0)
        engine.backward(engine(torch.ones(1, 8, dtype=torch.float16), (0,)))
        engine.step()
        moves.append(float((weight_of(engine, 0) - before).norm()))
        scales.append(engine.optimizer.loss_scale)
    assert scales == [16.0, 32.0]
    return moves


def gradient_of_a_skipped_layer_at_stage_0(launch: Launch) -> bool:
    """Return whether DeepSpeed made (and so reduced) a gradient for a layer that was skipped."""
    start(launch)
    engine = initialize(Chain(3), 0)
    engine.backward(engine(torch.ones(1, 8), (0, 2)))
    return engine.module.layers[1].weight.grad is not None


def linear_is_replaced_by_zero_3(launch: Launch) -> bool:
    """Return whether torch.nn.functional.linear is another function after a ZeRO 3 engine was built."""
    start(launch)
    before = torch.nn.functional.linear
    initialize(Chain(2), 3)
    return torch.nn.functional.linear is not before


def sequence_parallelism_fails(launch: Launch) -> bool:
    """Return whether megatron-core's gather along the sequence fails on a CPU."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    start(launch)
    try:
        gather_from_sequence_parallel_region(torch.ones(2, 1, 4), group=dist.group.WORLD)
    except (AssertionError, RuntimeError) as error:  # torch.cuda's
        return "CUDA" in str(error) or "NVIDIA" in str(error)
    return False


def learning_rates_of_warmup(launch: Launch) -> list[float]:
    """Return the learning rates of the first four steps under DeepSpeed's own linear warm-up over four steps."""
    start(launch)
    schedule = {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"},
    }
    engine = initialize(Chain(2), 0, scheduler=schedule)
    rates = []
    for _ in range(4):
        rates.append(engine.optimizer.param_groups[0]["lr"])
        engine.backward(engine(torch.ones(1, 8), (0, 1)))
        engine.step()
    return rates


def restarts_of_the_trace(launch: Launch, paths: tuple[tuple[int, ...], ...]) -> int:
    """Return how often ZeRO 3 forgets its recorded order while steps take these paths."""
    start(launch)
    engine = initialize(Chain(4), 3)
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    forget, restarts = coordinator._invalidate_trace, []
    coordinator._invalidate_trace = lambda: (restarts.append(1), forget())
    for path in paths:
        engine.backward(engine(torch.ones(1, 8), path))
        engine.step()
    return len(restarts)


def releases_follow_the_order(launch: Launch) -> tuple[set[int], set[int]]:
    """Return what ZeRO 3 would release after a visit to layer 0, for an order that ends there and one that returns."""
    start(launch)
    engine = initialize(Chain(2), 3, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 8), (0, 1)))
        engine.step()
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    coordinator.reset_step()  # as a third step would begin, with a complete order
    private, layer = "_PartitionedParameterCoordinator__", engine.module.layers[0]
    answers = []
    for order in ((layer,), (layer, layer)):
        setattr(coordinator, private + "submodule_order", order)
        answers.append(getattr(coordinator, private + "params_to_release")(layer, 1))
    return answers[0], answers[1]


class _Reader(nn.Module):
    """A layer that reads the weight of a module in it, without calling that module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)


def readers_that_zero_3_knows(launch: Launch, paths: tuple[tuple[int, ...], ...]) -> list[bool]:
    """Return of which layers ZeRO 3 knows, after steps along these paths, that they read another module's weight."""
    start(launch)
    model = Chain(3)
    model.layers = nn.ModuleList([_Reader() for _ in range(3)])
    engine = initialize(model, 3, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 0})
    for path in paths:
        engine.backward(engine(torch.ones(1, 8), path))
        engine.step()
    return [bool(dict(layer.ds_external_parameters())) for layer in engine.module.layers]


def timeout_of_a_new_group(launch: Launch) -> float:
    """Return the minutes that a group of DeepSpeed's waits in a world that waits 7."""
    import deepspeed

    start(launch, timedelta(minutes=7))
    group: Any = deepspeed.comm.new_group([0])
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60


def misread_weights(launch: Launch, stage: int, round_robin: bool) -> list[str]:
    """Return the names of the parameters of which DeepSpeed reads other fp32 weights than they have."""
    from deepspeed.utils import safe_get_full_fp32_param

    start(launch)
    model = Chain(3)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    initialize(model, stage, zero_optimization={"stage": stage, "round_robin_gradients": round_robin})
    misread = []
    for name, parameter in model.named_parameters():
        read = safe_get_full_fp32_param(parameter)
        if read is None or not torch.equal(read, expected[name]):
            misread.append(name)
    return misread
