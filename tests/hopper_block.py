"""What torch.compile makes of a layer for Hopper, on a machine without a GPU: python -m tests.hopper_block bert

Prints a JSON list with, for each pass, the compiled kernels, the matrix products and the passes over a tensor of the
stream's size that the kernels read and write. It needs torch's build for CUDA (2.11.0, as requirements-oldest.txt has
it), no driver: what torch asks of one is answered here, in `_pretend_to_have_a_gpu`, and code is generated, not run.
Autograd cannot be traced on tensors that are on a GPU in name only, so the graphs are traced on the CPU and moved.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch._dynamo import device_interface
from torch._inductor import compile_fx, config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.func import functional_call
from torch.fx.node import map_aggregate
from triton.backends.compiler import GPUTarget

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.block import Block
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel import layers
from raptr_ds.parallel.dropout import LayerDropout
from raptr_ds.parallel.groups import lone_process_groups

GPU = torch.device("cuda", 0)
SHAPES = {"bert": (32, 512, 768, 12), "ul2": (8, 1024, 2304, 18)}  # micro batch, positions, width, heads
_HOPPER = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class _Generated(Exception):  # noqa: N818 - no error
    """Ends a compilation when its code is there; holds what was counted."""


class _Driver:
    """What Triton asks of its driver when code is generated."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


def _pretend_to_have_a_gpu() -> None:
    """Answer what torch asks of CUDA's driver while it generates code."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: _HOPPER,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "synchronize": lambda *_: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    interface: Any = device_interface.CudaInterface
    interface.is_available = interface.is_triton_capable = staticmethod(lambda *_: True)
    interface.get_compute_capability = staticmethod(lambda *_: 90)
    interface.raise_if_triton_unavailable = staticmethod(lambda *_: None)
    interface.get_device_properties = staticmethod(lambda *_: _HOPPER)
    interface.Worker.get_device_properties = staticmethod(lambda *_: _HOPPER)
    interface.Worker.current_device = staticmethod(lambda: 0)
    driver: Any = triton.runtime.driver
    driver.set_active(_Driver())
    fake: Any = fake_tensor
    fake.init_gpu_context = lambda *_: None
    compiling: Any = torch.compiler
    compiling.is_compiling = lambda: True
    lowering: Any = GraphLowering
    lowering._compile_to_module = lowering.compile_to_module = _count
    utils: Any = torch._dynamo.utils
    utils.assert_no_fake_params_or_buffers = lambda _graph: None
    config.fx_graph_cache = False
    config.compile_threads = 1
    rows: Any = layers
    rows.reads_rows_apart = lambda _device: False  # as on a GPU


def _count(graph: Any) -> None:
    """Generate the code of a graph, and end with what it consists of."""
    code = graph.codegen()[0]
    text = getattr(code, "value", code)
    _, nodes, _ = graph.count_bytes()
    quarters = sum(count for node, count in nodes if "Extern" not in type(node).__name__)
    raise _Generated(text.count("_fused_"), text.count(".run("), text.count("extern_kernels."), 4 * quarters)


def counted(architecture: str, is_scaled: bool) -> list[dict[str, Any]]:
    """Return what a layer's forward and backward pass are made of, in bf16, with a residual_scale or without."""
    batch, length, width, heads = SHAPES[architecture]
    model = ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=2,
        hidden_size=width,
        num_attention_heads=heads,
        seq_length=length,
        vocab_size=64,
    )
    with lone_process_groups() as groups:
        block = Block(model, groups, attention_kernel=True).to(torch.bfloat16)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graphs: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda graph, inputs: graphs.update({name: (graph, inputs)}) or graph.forward

    with mode:
        values = {name: torch.empty_like(p, requires_grad=True) for name, p in block.named_parameters()}
        x = torch.empty(batch, length, width, dtype=torch.bfloat16, requires_grad=True)
        scale = torch.empty((), dtype=torch.float64) if is_scaled else None
        ranges = rotary = masks = None
        if architecture == "ul2":
            ranges = KeyRanges(*(torch.empty(batch, length, dtype=torch.int32) for _ in range(4)))
            rotary = torch.empty(2, length, width // heads // 2)
        else:
            masks = LayerDropout(torch.empty(batch, dtype=torch.int32), torch.empty(4, 2, dtype=torch.int32))

        def run(x: torch.Tensor, scale: torch.Tensor | None, *parameters: torch.Tensor) -> torch.Tensor:
            named = dict(zip(values, parameters, strict=True))
            return functional_call(block, named, (x, ranges, rotary, masks, scale))

        traced = aot_function(
            run,
            fw_compiler=keep("forward"),
            bw_compiler=keep("backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        traced(x, scale, *values.values()).sum().backward()
        found = []
        for name, (graph, inputs) in graphs.items():
            names, kernels, products, size = _generated_for_the_gpu(graph, inputs, name == "backward")
            assert names >= kernels
            passes = round(size / (batch * length * width * 2), 1)
            row = {"layer": architecture, "scaled": is_scaled, "pass": name}
            found.append({**row, "kernels": kernels, "products": products, "passes": passes})
    return found


def _generated_for_the_gpu(graph: Any, inputs: list[Any], is_backward: bool) -> tuple[int, int, int, int]:
    """Move a traced graph to the GPU in name, all but numbers of the CPU, and return what its code consists of."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype == torch.float64:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)

    for node in graph.graph.nodes:
        if node.op == "get_attr":
            setattr(graph, node.target, moved(getattr(graph, node.target)))
        node.args, node.kwargs = (
            map_aggregate(part, lambda value: GPU if isinstance(value, torch.device) else value)
            for part in (node.args, node.kwargs)
        )
    graph.recompile()
    inputs = [moved(value) for value in inputs]

    class Propagate(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            n.meta["val"] = super().run_node(n)
            n.meta.pop("tensor_meta", None)
            return n.meta["val"]

    with torch.no_grad():
        Propagate(graph).run(*inputs)
        try:
            compile_fx.compile_fx_inner(graph, inputs, is_backward=is_backward)
        except Exception as error:  # inductor wraps it
            inner: Any = error
            while inner is not None and not isinstance(inner, _Generated):
                inner = getattr(inner, "inner_exception", None) or inner.__cause__
            if inner is None:
                raise
            return inner.args
    raise AssertionError("nothing was generated")


def main() -> None:
    """Print what was counted for the layer that the command line names.

    One layer a process: of a second one's tensors, which have no memory, something in torch 2.11.0 reads (a crash).
    """
    _pretend_to_have_a_gpu()
    (architecture,) = sys.argv[1:]
    print(json.dumps([row for is_scaled in (False, True) for row in counted(architecture, is_scaled)]))


if __name__ == "__main__":
    main()
