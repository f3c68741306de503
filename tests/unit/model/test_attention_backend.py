"""Which code computes attention: by key, device and what is installed, with a line that says so."""

from types import SimpleNamespace

import pytest
import torch

from raptr_ds.config.sections import ModelSection
from raptr_ds.errors import ConfigError
from raptr_ds.model import attention_backend
from raptr_ds.model.attention_backend import AttentionBackend, kernel_obstacle

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def model_of(architecture: str = "ul2", dropout: float = 0.0, head_dim: int = 64) -> ModelSection:
    return ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=2,
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        seq_length=64,
        attention_dropout=dropout,
    )


def choose_attention(wanted: str, model: ModelSection, is_packed: bool, device: torch.device) -> AttentionBackend:
    """Choose as a run of one process does."""
    obstacle = kernel_obstacle(model, device)
    return attention_backend.choose_attention(wanted, model, is_packed, device.type, obstacle)


def has_shared_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    has_shared_memory(monkeypatch, 232_448)
    monkeypatch.setattr(attention_backend, "triton_obstacle", lambda: None)


def test_gpus_use_the_kernel_where_a_mask_or_dropout_needs_it() -> None:
    chosen = choose_attention("auto", model_of(), True, GPU)
    assert chosen.uses_kernel
    assert chosen.description == "Triton kernel for prefix mask, packed documents"
    assert chosen.warning is None
    plain = choose_attention("auto", model_of("bert"), False, GPU)
    assert plain.description == "Triton kernel for padding, else torch's scaled_dot_product_attention"
    assert "dropout" in choose_attention("auto", model_of("bert", 0.1), False, GPU).description


def test_cpus_use_torchs() -> None:
    chosen = choose_attention("auto", model_of("bert", 0.1), False, CPU)
    assert not chosen.uses_kernel
    assert chosen.description == "torch's scaled_dot_product_attention, spelled out where there is dropout"
    assert chosen.warning is None


def test_one_key_turns_the_kernel_off() -> None:
    assert not choose_attention("sdpa", model_of(), False, GPU).uses_kernel


@pytest.mark.parametrize(
    ("missing", "head_dim", "capability", "reason"),
    [
        (True, 64, (9, 0), "Triton is not installed"),
        (False, 320, (9, 0), "heads have 320 dimensions, and it takes at most 256"),
        (False, 64, (7, 5), "compute capability 8.0 or more, this one has 7.5"),
    ],
)
def test_a_fallback_is_a_warning_and_by_name_an_error(
    monkeypatch: pytest.MonkeyPatch, missing: bool, head_dim: int, capability: tuple[int, int], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    if missing:
        monkeypatch.setattr(attention_backend, "triton_obstacle", lambda: "Triton is not installed")
    model = model_of("ul2", 0.1, head_dim)
    chosen = choose_attention("auto", model, False, GPU)
    assert not chosen.uses_kernel
    assert chosen.warning is not None
    assert reason in chosen.warning
    with pytest.raises(ConfigError, match="attention_backend='triton' cannot run here") as raised:
        choose_attention("triton", model, False, GPU)
    assert reason in str(raised.value)
    assert "Set raptr_ds.train.attention_backend to 'sdpa'" in str(raised.value)


@pytest.mark.parametrize(
    ("shared", "head_dim", "runs"), [(101_376, 128, True), (101_376, 160, False), (166_912, 256, True)]
)
def test_wide_heads_need_much_shared_memory(
    monkeypatch: pytest.MonkeyPatch, shared: int, head_dim: int, runs: bool
) -> None:
    has_shared_memory(monkeypatch, shared)
    chosen = choose_attention("auto", model_of("ul2", 0.1, head_dim), False, GPU)
    assert chosen.uses_kernel == runs
    assert runs or "163,840 bytes of shared memory, and this GPU has 101,376" in str(chosen.warning)


def test_cpus_have_no_kernel_but_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    assert choose_attention("triton", model_of(), False, CPU).uses_kernel  # as these tests do
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="it needs a GPU and this run is on CPUs"):
        choose_attention("triton", model_of(), False, CPU)
