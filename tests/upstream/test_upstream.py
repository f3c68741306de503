"""Each test asserts an upstream fault that we work around; one that fails says that its work-around can go.

docs/upstream.md describes each, and how we work around it.
"""

import inspect
import subprocess
import sys
from functools import cache

import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from megatron.core import parallel_state
from torch.nn import functional

from raptr_ds.engine.learning_rate import learning_rate_at
from tests.dist.workers import run_distributed
from tests.upstream.reproductions import (
    gradient_of_a_skipped_layer_at_stage_0,
    learning_rates_of_warmup,
    linear_is_replaced_by_zero_3,
    misread_weights,
    moves_as_the_loss_scale_grows,
    moves_of_a_skipped_layer,
    readers_that_zero_3_knows,
    releases_follow_the_order,
    restarts_of_the_trace,
    sequence_parallelism_fails,
    timeout_of_a_new_group,
    weight_after_micro_batches,
)


def test_zero_3_applies_a_skipped_layers_last_gradient_again() -> None:
    """Fixed: PathZero3._get_norm_groups needs to clear nothing."""
    taken, *skipped = run_distributed(moves_of_a_skipped_layer, 2, 3)[0]
    assert taken > 0
    assert skipped == pytest.approx([taken, taken], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_other_stages_do_not(stage: int) -> None:
    """The reproduction's control."""
    taken, *skipped = run_distributed(moves_of_a_skipped_layer, 2, stage)[0]
    assert taken > 0
    assert skipped == [0.0, 0.0]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_step_skipped_layers_with_zero_gradients(stage: int) -> None:
    """Fixed: PathZero12 need not keep groups that do not move from DeepSpeed's step."""
    taken, *skipped = run_distributed(moves_of_a_skipped_layer, 2, stage, "AdamW")[0]
    assert taken > 0
    assert min(skipped) > 0  # momentum; plain torch leaves a parameter without a gradient alone


def test_stage_0_makes_gradients_for_skipped_layers() -> None:
    """Fixed: ReplicatedOptimizer.reduce_gradients could be DeepSpeed's."""
    assert all(run_distributed(gradient_of_a_skipped_layer_at_stage_0, 2))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_unscales_gradients_by_the_next_steps_loss_scale(stage: int) -> None:
    """Fixed: PathZero need not keep the factor of the step."""
    first, second = run_distributed(moves_as_the_loss_scale_grows, 2, stage)[0]
    assert second == pytest.approx(first / 2, rel=0.2)  # the loss falls meanwhile: 0.85 of the first if it were right


FIRST_ALONE = (((0, 1, 2), (0, 2)),)
SECOND_ALONE = (((0, 1, 2), (0, 1, 2)), ((0, 2), (0, 1, 2)))


def weights(stage: int, steps: tuple[tuple[tuple[int, ...], ...], ...], **options: bool) -> list[float]:
    return run_distributed(weight_after_micro_batches, 2, stage, steps, options)[0]


def test_zero_1_with_overlap_reduces_the_last_micro_batchs_layers_only() -> None:
    """Fixed: config/rules.py, the rule on overlap_comm, can go."""
    right = weights(1, FIRST_ALONE)
    assert weights(2, FIRST_ALONE, overlap_comm=True) == pytest.approx(right, abs=1e-6)
    assert weights(1, FIRST_ALONE, overlap_comm=True) != pytest.approx(right, abs=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_misread_their_weights_under_round_robin_gradients(stage: int) -> None:
    """Fixed: PathZero12.holders can go by _hp_mapping, but for checkpoints of format 1."""
    assert run_distributed(misread_weights, 2, stage, False)[0] == []
    assert run_distributed(misread_weights, 2, stage, True)[0] != []


def test_zero_3_adds_to_the_last_steps_gradient_where_the_first_micro_batch_skips_a_layer() -> None:
    """Fixed: PathZero3.follow need not clear gradients."""
    right = weights(1, SECOND_ALONE)
    assert weights(2, SECOND_ALONE) == pytest.approx(right, abs=1e-6)
    assert weights(3, SECOND_ALONE) != pytest.approx(right, abs=1e-3)


def test_zero_3_replaces_linear_for_the_whole_process() -> None:
    """Fixed: tests/dist/workers.py need not put it back."""
    assert all(run_distributed(linear_is_replaced_by_zero_3, 1))


def test_zero_3s_linear_fails_without_inputs() -> None:
    """Fixed: RowLinear.of_columns could be functional.linear."""
    x, weight = torch.ones(2, 3, 0, requires_grad=True), torch.ones(4, 0, requires_grad=True)
    functional.linear(x, weight).sum().backward()  # torch's own does not
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        zero3_linear_wrap(x, weight).sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it works")
def test_megatron_cores_sequence_parallelism_needs_cuda() -> None:
    """Fixed: parallel/sequence.py could be megatron-core's mappings, for its layout (T, b, H)."""
    assert all(run_distributed(sequence_parallelism_fails, 2))


def test_the_first_two_steps_of_warmup_train_nothing() -> None:
    """Fixed: engine/learning_rate.py could be DeepSpeed's schedulers."""
    theirs = run_distributed(learning_rates_of_warmup, 1)[0]
    assert theirs[:2] == [0.0, 0.0]
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear"}
    ours = [learning_rate_at({"type": "WarmupLR", "params": params}, 1.0, step) for step in range(4)]
    assert ours == [0.25, 0.5, 0.75, 1.0]


def test_megatron_core_is_no_model_parallel_unit_for_deepspeed() -> None:
    """Fixed: tensor_parallel_unit could be megatron.core.parallel_state itself."""
    assert not hasattr(parallel_state, "get_model_parallel_rank")
    assert not hasattr(parallel_state, "get_model_parallel_world_size")


def test_zero_3_forgets_its_order_when_a_path_changes() -> None:
    """Fixed: engine/prefetch.py can go."""
    steady = ((0, 1, 3),) * 8
    changing = ((0, 1, 3), (0, 1, 3), (0, 1, 3), (0, 2, 3), (0, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 3))
    assert run_distributed(restarts_of_the_trace, 2, steady)[0] == 0  # the control
    assert run_distributed(restarts_of_the_trace, 2, changing)[0] > 0


def test_zero_3_decides_releases_by_an_order_that_is_gone() -> None:
    """Fixed: PathCoordinator needs no answer of its own to what may be released."""
    ends, returns = run_distributed(releases_follow_the_order, 1)[0]
    assert ends
    assert returns == ends  # right would be nothing: the weights are needed again at once


def test_zero_3_learns_that_a_layer_reads_anothers_weight_when_it_first_does() -> None:
    """Fixed: PathCoordinator.read_in_parts can go."""
    assert run_distributed(readers_that_zero_3_knows, 1, ((0, 1),))[0] == [True, True, False]
    assert run_distributed(readers_that_zero_3_knows, 1, ((0, 1), (0, 2)))[0] == [True, True, True]


MEGATRON_CORE = "from megatron.core import parallel_state"
MUON = "import deepspeed.runtime.zero.muon.muon_optimizer"


def loads(code: str, module: str = "torch._inductor.compile_fx") -> bool:
    """Return whether a fresh process that runs `code` has loaded a module then."""
    return module in loaded_after(code)[0]


@cache
def loaded_after(*codes: str) -> list[frozenset[str]]:
    """Return the modules that a fresh process has loaded after each of `codes`, which it runs one after another."""
    shown = "print('loaded', *sys.modules)\n"
    program = "import sys\n" + "".join(f"{code}\n{shown}" for code in codes) + "print(sys.modules['torch'].compile)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("<function compile ")
    found = [frozenset(line.split(" ")) for line in lines if line.startswith("loaded ")]
    assert len(found) == len(codes)
    return found


def test_deepspeed_makes_groups_without_a_time_out() -> None:
    """Fixed: start_deepspeed_comm need not replace new_group."""
    assert run_distributed(timeout_of_a_new_group, 1)[0] == 30.0  # torch's for gloo


def test_deepspeed_starts_numactl_whenever_it_counts_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed: prepare_imports need not set LOCAL_SIZE."""
    asked: list[list[str]] = []
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setattr(subprocess, "check_output", lambda words: asked.append(words) or b"available: 0 nodes\n")
    for _ in range(2):
        assert CPU_Accelerator().device_count() == 1
    assert asked == [["numactl", "--hardware"]] * 2


def test_importing_megatron_core_loads_the_inductor() -> None:
    """Fixed: parallel/megatron_core.py need not import without_compiler."""
    assert loads(MEGATRON_CORE)
    assert not loads("import raptr_ds.runtime.setup")


def test_importing_deepspeed_imports_mlflow() -> None:
    """Fixed: parallel/launch.py need not hide it."""
    assert "mlflow.version" in loaded_after("import deepspeed", MUON)[0]
    ours = "from raptr_ds.parallel.launch import prepare_imports\nprepare_imports(False)\nimport raptr_ds.runtime.setup"
    assert not loads(ours, "mlflow.version")


def test_importing_a_module_of_megatron_core_loads_all_of_it_and_sympy() -> None:
    """Fixed: parallel/megatron_core.py can import megatron-core as everybody does."""
    assert loads(MEGATRON_CORE, "sympy")
    assert not loads("import raptr_ds.runtime.setup", "sympy")


def test_megatron_core_is_whole_after_we_imported_a_part_of_it() -> None:
    names = "from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy"
    ours, core, rest = loaded_after(
        "import raptr_ds.parallel.megatron_core",
        "import megatron.core",
        f"{names}\nmegatron.core.DistributedDataParallel",
    )
    assert "torch._inductor.compile_fx" not in ours
    assert "megatron.core.distributed" not in core
    assert "megatron.core.distributed" in rest


def test_the_first_step_of_an_optimizer_loads_the_compiler() -> None:
    """Fixed: parallel/uncompiled.py, keep_optimizers_eager, can go."""
    train = """
import torch
weight = torch.nn.Parameter(torch.ones(1))
for optimizer in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
    weight.grad = torch.ones(1)
    optimizer([weight], lr=0.5).step()
    optimizer([weight], lr=0.5).zero_grad()
assert weight.item() < 0
"""
    ours = "from raptr_ds.parallel.uncompiled import keep_optimizers_eager\nkeep_optimizers_eager()\n"
    assert loads(train, "torch._dynamo")
    assert not loads(ours + train, "torch._dynamo")


def test_the_first_reduction_of_zero_1_and_2_loads_the_inductor() -> None:
    """Fixed: engine/path_zero.py need not import Muon."""
    assert "import MuonWithAuxAdam" in inspect.getsource(DeepSpeedZeroOptimizer.average_tensor)
    deepspeed, muon = loaded_after("import deepspeed", MUON)
    assert "torch._inductor.compile_fx" not in deepspeed
    assert "torch._inductor.compile_fx" in muon
    assert not loads(f"import raptr_ds.engine.path_zero\n{MUON}")


def test_inductor_does_not_define_overflow() -> None:
    """Fixed: model/compiler.py, let_integers_wrap, can go."""
    program = (
        "from torch._inductor.cpp_builder import get_cpp_compiler, get_cpp_options\n"
        "print('fwrapv' in get_cpp_options(get_cpp_compiler(), do_link=True)[2])"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_tritons_interpreter_multiplies_the_bits_of_bf16() -> None:
    """Fixed: tests/interpreted.py need not replace create_dot."""
    command = [sys.executable, "-m", "tests.upstream.interpreted_dot"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) > 1e6  # of 16 times 1 by 1


def test_the_norm_of_a_large_tensor_on_a_cpu_is_inexact() -> None:
    """Fixed: engine/gradient_norm.py can take the norm of whole tensors on a CPU, as on a GPU."""
    values = torch.randn(8_000_000, generator=torch.Generator().manual_seed(0))
    exact = values.double().square().sum().sqrt().item()
    assert abs(torch.linalg.vector_norm(values).item() / exact - 1) > 1e-5
