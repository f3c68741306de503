"""Initial weights, drawn by name: the same model from the same seed in every layout."""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from raptr_ds.config.sections import ModelSection
from raptr_ds.parallel.layers import shard_of
from raptr_ds.rng import stream_key


def ends_branch(name: str) -> bool:
    """Whether a parameter is of the projection that ends a residual branch: with zeros in it a branch adds nothing."""
    return name.rpartition(".")[0].endswith(("attention.output", "mlp.contract"))


def initialize(module: nn.Module, model: ModelSection, seed: int) -> None:
    """Fill every parameter in place.

    Weights are normal with init_method_std; the projections that end a residual branch have it divided by
    sqrt(2 * num_layers) (Radford et al. 2019); norms are one, biases zero. Each full tensor is drawn on the CPU from
    its own stream and this rank's shard is cut out of it. torch draws a tensor in one thread; as the streams are
    independent, as many tensors as torch has threads are drawn at a time, with the same values.
    """

    @torch.no_grad()
    def fill(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        shard = shard_of(parameter)
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            std = model.init_method_std / (math.sqrt(2 * model.num_layers) if ends_branch(name) else 1.0)
            generator = torch.Generator().manual_seed(stream_key(seed, "init", name))
            full = torch.empty(shard.full_shape).normal_(0.0, std, generator=generator)
            parameter.copy_(shard.of_full(full, parameter.shape))

    if torch.get_num_threads() == 1:  # a thread beside this one would keep memory of its own
        for named in module.named_parameters():
            fill(named)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(fill, module.named_parameters()):
            pass  # raises what a thread raised
