"""Our models against transformers on the same weights: the same function, the same gradients, for every path."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch, Sample, collate
from raptr_ds.errors import ConfigError
from raptr_ds.hf.model import from_hugging_face, hugging_face_inputs, to_hugging_face
from raptr_ds.hf.twins import rename_from_hugging_face
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath

# fp32: two orders of the same sums. Log-probabilities near 4 carry 4e-7 of rounding each, through up to five layers.
LOG_PROBABILITY_TOLERANCE = 2e-5
# Gradients by their own largest element: sums over tens of positions in another order.
GRADIENT_TOLERANCE = 2e-5
# fp64 leaves only a difference of formulas, had there been one.
EXACT = 1e-12
# ESM rotates in fp32 whatever its type.
ALMOST_EXACT = 2e-7
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "ul2": {},
    "rotary bert": {"architecture": "bert", "position_embedding": "rotary"},
}


def small(kind: str, **changes: Any) -> ModelSection:
    section = {
        "architecture": kind,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "vocab_size": 61,
        "init_method_std": 0.1,  # larger than usual, so that attention is far from uniform
    }
    return ModelSection(**{**section, **KINDS[kind], **changes})


def stage_of(model: ModelSection, groups: ProcessGroups) -> Stage:
    """Return the full model with every weight random: ones and zeros would hide a swapped norm or bias."""
    stage = build_stage(model, groups, range(model.num_layers), recompute=False, seed=3)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return stage


def weights_of(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}


def batch_of(model: ModelSection, padded: bool, prefix: str = "some") -> MicroBatch:
    """Return three sequences; prefix: none, some (another for each), all."""
    rng = np.random.default_rng(5)
    samples = []
    for row in range(3):
        length = model.seq_length - (3 * row if padded else 0)
        positions = np.sort(rng.choice(length, 4, replace=False)).astype(np.int64)
        ul2_prefix = {"none": 0, "some": 1 + 2 * row, "all": length}[prefix]
        samples.append(
            Sample(
                tokens=rng.integers(1, model.vocab_size, length).astype(np.int64),  # 0 is padding
                positions=positions,
                targets=rng.integers(0, model.vocab_size, 4).astype(np.int64),
                prefix_length=length if model.architecture == "bert" else ul2_prefix,
            )
        )
    return collate(samples, range(3), model.seq_length, pad_id=0)


def log_probabilities(stage: Stage, batch: MicroBatch, path: LayerPath) -> torch.Tensor:
    """Return (positions, vocabulary) log-probabilities, asked for as the loss of every target at every position."""
    vocab_size = stage.model.vocab_size
    every = replace(
        batch,
        positions=batch.positions.repeat_interleave(vocab_size),
        targets=torch.arange(vocab_size).repeat(batch.num_predictions),
    )
    with torch.no_grad():
        return -stage(batch.tokens, every, path, None).view(-1, vocab_size)


def twin_logits(twin: PreTrainedModel, model: ModelSection, batch: MicroBatch) -> torch.Tensor:
    """Return the twin's logits at the predicted positions."""
    return twin(**hugging_face_inputs(model, batch)).logits.flatten(0, 1)[batch.positions]


def compare(stage: Stage, model: ModelSection, batch: MicroBatch, path: LayerPath, dtype: torch.dtype) -> None:
    """Compare log-probabilities, loss and all gradients of a path with those of a twin of its active layers only."""
    is_esm = model.architecture == "bert" and model.position_embedding == "rotary"
    tolerance = None if dtype == torch.float32 else ALMOST_EXACT if is_esm else EXACT
    stage.to(dtype)
    depth, weights = along(model, weights_of(stage), path)
    twin = to_hugging_face(depth, weights)
    ours, theirs = log_probabilities(stage, batch, path), twin_logits(twin, model, batch).log_softmax(-1)
    assert (ours - theirs).abs().max() < (tolerance or LOG_PROBABILITY_TOLERANCE)

    loss = stage(batch.tokens, batch, path, None).mean()
    loss.backward()
    if dtype == torch.float64:  # transformers' own loss is fp32
        their_loss = functional.cross_entropy(twin_logits(twin, model, batch), batch.targets)
    else:
        their_loss = twin(**hugging_face_inputs(model, batch)).loss
    their_loss.backward()
    assert abs(loss.item() - their_loss.item()) < (tolerance or LOG_PROBABILITY_TOLERANCE)
    named = twin.named_parameters(remove_duplicate=False)
    expected = rename_from_hugging_face(depth, {name: p.grad for name, p in named if p.grad is not None})
    if model.tie_word_embeddings:
        expected.pop("head.output.weight", None)
    names = {f"layers.{layer}.": f"layers.{place}." for place, layer in enumerate(path.layers)}
    seen = set()
    for name, parameter in stage.named_parameters():
        prefix = next((old for old in names if name.startswith(old)), None)
        if prefix is None and name.startswith("layers."):
            assert parameter.grad is None, f"{name} is skipped but has a gradient"
            continue
        twin_name = name if prefix is None else names[prefix] + name.removeprefix(prefix)
        seen.add(twin_name)
        assert parameter.grad is not None
        scale = expected[twin_name].abs().max()
        assert scale > 0, f"{name}: the comparison is empty"
        error = (parameter.grad - expected[twin_name]).abs().max() / scale
        # A key's bias adds the same to all scores of a query: its true gradient is zero and only rounding is left.
        if name.endswith("attention.qkv.bias"):
            error = without_keys(parameter.grad - expected[twin_name], model).abs().max() / scale
        assert error < (tolerance or GRADIENT_TOLERANCE), f"{name}: {error}"
    assert seen == expected.keys()


def without_keys(rows: torch.Tensor, model: ModelSection) -> torch.Tensor:
    return rows.view(model.num_attention_heads, 3, -1)[:, ::2]


def along(
    model: ModelSection, weights: dict[str, torch.Tensor], path: LayerPath
) -> tuple[ModelSection, dict[str, torch.Tensor]]:
    """Return a path as a model of its own: its active layers, renumbered, and nothing of the others."""
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("layers.")}
    for place, layer in enumerate(path.layers):
        prefix = f"layers.{layer}."
        kept |= {f"layers.{place}.{n.removeprefix(prefix)}": t for n, t in weights.items() if n.startswith(prefix)}
    return model.model_copy(update={"num_layers": path.length}), kept


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", ["bert", "rotary bert"])
def test_bert_is_megatron_bert_or_esm(
    groups: ProcessGroups, kind: str, tied: bool, padded: bool, dtype: torch.dtype
) -> None:
    model = small(kind, tie_word_embeddings=tied)
    compare(stage_of(model, groups), model, batch_of(model, padded), LayerPath.full(3), dtype)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("prefix", ["none", "some", "all"])
def test_ul2_is_llama_with_a_prefix(groups: ProcessGroups, tied: bool, padded: bool, prefix: str) -> None:
    model = small("ul2", tie_word_embeddings=tied)
    compare(stage_of(model, groups), model, batch_of(model, padded, prefix), LayerPath.full(3), torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1, "num_attention_heads": 1},
        {"hidden_size": 48, "num_attention_heads": 3, "seq_length": 23, "vocab_size": 97},
        {"num_layers": 5, "ffn_hidden_size": 40},
        {"norm_epsilon": 1e-2},  # large enough that another place for it would show
    ],
    ids=["one-head", "odd-shape", "odd-ffn", "epsilon"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes(groups: ProcessGroups, kind: str, changes: dict[str, Any]) -> None:
    model = small(kind, **changes)
    compare(stage_of(model, groups), model, batch_of(model, True), LayerPath.full(model.num_layers), torch.float32)


def test_rotary_base_of_bert(groups: ProcessGroups) -> None:
    model = small("rotary bert", rotary_base=100.0)
    compare(stage_of(model, groups), model, batch_of(model, True), LayerPath.full(3), torch.float32)


@pytest.mark.parametrize("kind", ["rotary bert", "ul2"])
def test_weights_in_16_bits_leave_the_rotary_frequencies_as_they_are(groups: ProcessGroups, kind: str) -> None:
    model = small(kind)
    weights = {name: tensor.bfloat16() for name, tensor in weights_of(stage_of(model, groups)).items()}
    twin = to_hugging_face(model, weights)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.bfloat16}
    frequencies = next(buffer for name, buffer in twin.named_buffers() if name.endswith(".inv_freq"))
    exact = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert (frequencies / exact - 1).abs().max() < 1e-6  # fp32; bf16 would be off by 1e-3


@pytest.mark.parametrize("changes", [{"add_bias_linear": True}, {"rotary_base": 100.0}], ids=["bias", "rotary-base"])
def test_ul2_options_that_llama_has(groups: ProcessGroups, changes: dict[str, Any]) -> None:
    model = small("ul2", **changes)
    compare(stage_of(model, groups), model, batch_of(model, True), LayerPath.full(3), torch.float32)


@pytest.mark.parametrize("layers", [(0, 4), (1, 2, 3), (0, 2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_path_is_the_model_of_its_layers(groups: ProcessGroups, kind: str, layers: tuple[int, ...]) -> None:
    model = small(kind, num_layers=5)
    compare(stage_of(model, groups), model, batch_of(model, True), LayerPath(layers, 5), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_residual_scale_is_a_factor_on_the_branches(groups: ProcessGroups, kind: str) -> None:
    model = small(kind, num_layers=4)
    stage, batch, path = stage_of(model, groups), batch_of(model, True), LayerPath((0, 3), 4, residual_scale=2**0.5)
    depth, weights = along(model, weights_of(stage), path)
    for name in weights:
        if ".attention.output." in name or ".mlp.contract." in name:
            weights[name] = weights[name] * path.residual_scale
    theirs = twin_logits(to_hugging_face(depth, weights), model, batch).log_softmax(-1)
    assert (log_probabilities(stage, batch, path) - theirs).abs().max() < LOG_PROBABILITY_TOLERANCE


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_changes_nothing(groups: ProcessGroups, kind: str, tied: bool) -> None:
    model = small(kind, tie_word_embeddings=tied, norm_epsilon=1e-6)
    weights = weights_of(stage_of(model, groups))
    back, returned = from_hugging_face(to_hugging_face(model, weights))
    # Llama knows no dropout of the stream; no other value gets lost.
    assert back == model.model_copy(update={"rotary_base": back.rotary_base})
    assert kind == "bert" or back.rotary_base == model.rotary_base
    assert returned.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(returned[name], tensor), name


def test_token_types_of_a_foreign_bert_go_into_its_positions(groups: ProcessGroups) -> None:
    model = small("bert")
    twin = to_hugging_face(model, weights_of(stage_of(model, groups)))
    torch.nn.init.normal_(twin.bert.embeddings.token_type_embeddings.weight)
    section, weights = from_hugging_face(twin)
    stage = stage_of(section, groups)
    stage.load_state_dict(weights)
    batch = batch_of(model, True)
    difference = log_probabilities(stage, batch, LayerPath.full(3)) - twin_logits(twin, model, batch).log_softmax(-1)
    assert difference.abs().max() < LOG_PROBABILITY_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        ("ul2", {"normalization": "layernorm"}, "normalization=rmsnorm"),
        ("ul2", {"position_embedding": "learned"}, "position_embedding=rotary"),
        ("ul2", {"activation": "gelu"}, "activation=swiglu"),
        ("bert", {"normalization": "rmsnorm"}, "normalization=layernorm"),
        ("rotary bert", {"normalization": "rmsnorm"}, "EsmForMaskedLM .* normalization=layernorm"),
        ("rotary bert", {"add_bias_linear": False}, "EsmForMaskedLM .* add_bias_linear=true"),
        ("bert", {"activation": "swiglu"}, "activation=gelu"),
        ("bert", {"add_bias_linear": False}, "add_bias_linear=true"),
    ],
)
def test_models_without_a_twin_are_refused(kind: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        to_hugging_face(small(kind, **changes), {})


@pytest.mark.parametrize(
    "changes",
    [{"token_dropout": True}, {"emb_layer_norm_before": True}, {"position_embedding_type": "absolute"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_kinds_of_esm_are_refused(groups: ProcessGroups, changes: dict[str, Any]) -> None:
    model = small("rotary bert")
    twin = to_hugging_face(model, weights_of(stage_of(model, groups)))
    twin.config.update(changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        from_hugging_face(twin)


@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 2}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"head_dim": 16}],
    ids=lambda changes: next(iter(changes)),
)
def test_foreign_models_that_ours_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=61, bos_token_id=None, eos_token_id=None, **shape, **changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        from_hugging_face(LlamaForCausalLM(config))
