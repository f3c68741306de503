# ruff: noqa: F401
"""What every worker has imported before it is forked (workers.py). Imports nothing that starts threads."""

from raptr_ds.parallel.launch import prepare_imports
from raptr_ds.runtime.host_memory import uncollected_imports

with uncollected_imports():
    prepare_imports(has_gpu=False)
    import deepspeed.module_inject.auto_ep_layer  # as building an engine does; a first step numpy.ma
    import deepspeed.runtime.superoffload.superoffload_stage3  # as ZeRO 3's engine does, with the next
    import numpy.ma
    import pytest  # as every file of tests does
    import torch
    import torch._dynamo  # a second of CPU on each rank; a pipeline's first backward pass imports half of it
    import torch.utils.tensorboard  # as rank 0 of each run of the command line does

    import raptr_ds.planner.setting
    import raptr_ds.pretrain
    import raptr_ds.runtime.setup
    import tests.dist.trajectory

torch.set_num_threads(1)
