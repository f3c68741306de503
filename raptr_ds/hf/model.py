"""Our models in transformers and back: BERT is MegatronBertForMaskedLM, UL2 is LlamaForCausalLM, on the same weights.

The transformers model that computes the same as ours is called the twin.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MegatronBertConfig, MegatronBertForMaskedLM, PreTrainedModel

from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError

Tensors = Mapping[str, torch.Tensor]

_LAYER = re.compile(r"^layers\.(\d+)\.(.+)\.(weight|bias)$")
_QKV, _EXPAND = "attention.qkv", "mlp.expand"
_IGNORED_LABEL = -100  # how torch and Hugging Face mark a position that is not predicted


@dataclass(frozen=True)
class _Twin:
    """How a Hugging Face class names our tensors, and the settings of our model that it has.

    layer: each module of a layer of ours and the one, two or three of theirs that it is cut into. outside: tensors
    outside the layers, by their names.
    """

    requires: Mapping[str, object]
    layer_prefix: str
    layer: Mapping[str, tuple[str, ...]]
    outside: Mapping[str, str]


_BERT = _Twin(
    requires={
        "activation": "gelu",
        "normalization": "layernorm",
        "position_embedding": "learned",
        "add_bias_linear": True,
    },
    layer_prefix="bert.encoder.layer",
    layer={
        "attention_norm": ("attention.ln",),
        _QKV: ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output": ("attention.output.dense",),
        "mlp_norm": ("ln",),
        _EXPAND: ("intermediate.dense",),
        "mlp.contract": ("output.dense",),
    },
    outside={
        "embedding.word.weight": "bert.embeddings.word_embeddings.weight",
        "embedding.position.weight": "bert.embeddings.position_embeddings.weight",
        "head.norm.weight": "bert.encoder.ln.weight",
        "head.norm.bias": "bert.encoder.ln.bias",
        "head.transform.weight": "cls.predictions.transform.dense.weight",
        "head.transform.bias": "cls.predictions.transform.dense.bias",
        "head.transform_norm.weight": "cls.predictions.transform.LayerNorm.weight",
        "head.transform_norm.bias": "cls.predictions.transform.LayerNorm.bias",
        "head.output.weight": "cls.predictions.decoder.weight",
        "head.bias": "cls.predictions.decoder.bias",
    },
)
_UL2 = _Twin(
    requires={"activation": "swiglu", "normalization": "rmsnorm", "position_embedding": "rotary"},
    layer_prefix="model.layers",
    layer={
        "attention_norm": ("input_layernorm",),
        _QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        _EXPAND: ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.contract": ("mlp.down_proj",),
    },
    outside={
        "embedding.word.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.norm.weight",
        "head.output.weight": "lm_head.weight",
    },
)
_TWINS = {"bert": _BERT, "ul2": _UL2}
_CLASSES = {"bert": MegatronBertForMaskedLM, "ul2": LlamaForCausalLM}

_TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_BERT_BIAS_AGAIN = "cls.predictions.bias"  # a second name of the decoder's bias; unused without tied embeddings


def to_hugging_face(model: ModelSection, weights: Tensors, tokenizer: Tokenizer | None = None) -> PreTrainedModel:
    """Return the transformers model that computes the same as ours with `weights`, in evaluation mode.

    model: with nothing left to derive, vocab_size included. weights: full tensors by canonical name; their type
    becomes the model's. tokenizer: gives the ids that pad, begin and end a text, at the last of which generation stops;
    without it these are None. Residual scale is a path's, not the model's: the twin is the full path without it.
    MegatronBert's token types, which we lack, are zero. Llama has no dropout of the stream: hidden_dropout, which
    evaluation does not see, has no place there.
    Raises: ConfigError if transformers has no such model.
    """
    config = hugging_face_config(model, tokenizer)
    state = rename_to_hugging_face(model, weights)
    outside = _TWINS[model.architecture].outside
    word = state[outside["embedding.word.weight"]]
    if model.tie_word_embeddings:
        state[outside["head.output.weight"]] = word
    if model.architecture == "bert":
        state[_BERT_BIAS_AGAIN] = state[outside["head.bias"]]
        state[_TOKEN_TYPES] = torch.zeros(config.type_vocab_size, model.hidden_size)
    twin: PreTrainedModel = _CLASSES[model.architecture](config)
    twin.to(dtype=word.dtype)  # type: ignore[call-arg]
    twin.load_state_dict(state, strict=True)
    return twin.eval()


def hugging_face_config(model: ModelSection, tokenizer: Tokenizer | None = None) -> MegatronBertConfig | LlamaConfig:
    """Return the twin's configuration, with the tokenizer's special ids.

    Raises: ConfigError if transformers has no such model.
    """
    for key, wanted in _TWINS[model.architecture].requires.items():
        value = getattr(model, key)
        if value != wanted:
            raise ConfigError(
                f"{_CLASSES[model.architecture].__name__} of transformers has {key}={_spelled(wanted)} only, but the "
                f"model is {model.architecture} with raptr_ds.model.{key}={_spelled(value)}. Such a model cannot be "
                "exported; leave that key at its default to train one that can."
            )
    shape: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.tie_word_embeddings,
        "pad_token_id": tokenizer and tokenizer.pad_id,
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and tokenizer.eos_id,
    }
    if model.architecture == "bert":
        bert = {
            "hidden_act": "gelu",  # the exact one, as ours
            "hidden_dropout_prob": model.hidden_dropout,
            "attention_probs_dropout_prob": model.attention_dropout,
            "layer_norm_eps": model.norm_epsilon,
        }
        return MegatronBertConfig(**shape, **bert)
    llama = {
        "hidden_act": "silu",
        "attention_dropout": model.attention_dropout,
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
    }
    return LlamaConfig(**shape, **llama)


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def from_hugging_face(twin: PreTrainedModel) -> tuple[ModelSection, dict[str, torch.Tensor]]:
    """Return our model and its canonical weights for a MegatronBertForMaskedLM or a LlamaForCausalLM.

    MegatronBert's first token type is added to the position embeddings, as every token of ours has that type.
    Raises: ConfigError if no model of ours computes the same (grouped queries, scaled rotary frequencies, ...).
    """
    model = _section_of(twin)
    state = {name: tensor.detach() for name, tensor in twin.state_dict().items()}
    weights = rename_from_hugging_face(model, state)
    if model.architecture == "bert":
        weights["embedding.position.weight"] = weights["embedding.position.weight"] + state[_TOKEN_TYPES][0]
    if model.tie_word_embeddings:
        weights.pop("head.output.weight", None)
    return model, weights


def _section_of(twin: PreTrainedModel) -> ModelSection:
    config = twin.config
    architecture = next((name for name, known in _CLASSES.items() if isinstance(twin, known)), None)
    if architecture is None:
        raise ConfigError(
            f"a {type(twin).__name__} cannot be imported: only "
            f"{' and '.join(known.__name__ for known in _CLASSES.values())} compute what our models compute."
        )
    extra: dict[str, Any]
    refused: dict[str, tuple[object, object]]
    if architecture == "bert":
        extra = {
            "norm_epsilon": config.layer_norm_eps,
            "hidden_dropout": float(config.hidden_dropout_prob),
            "attention_dropout": float(config.attention_probs_dropout_prob),
        }
        refused = {"hidden_act": (config.hidden_act, "gelu"), "is_decoder": (config.is_decoder, False)}
    else:
        rope = config.rope_parameters
        extra = {
            "norm_epsilon": config.rms_norm_eps,
            "attention_dropout": float(config.attention_dropout or 0.0),
            "rotary_base": float(rope["rope_theta"]),
            "add_bias_linear": config.attention_bias,
        }
        refused = {
            "hidden_act": (config.hidden_act, "silu"),
            "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
            "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
            "mlp_bias": (config.mlp_bias, config.attention_bias),
            "rope_type": (rope["rope_type"], "default"),
        }
    for key, (value, wanted) in refused.items():
        if value != wanted:
            raise ConfigError(f"a {type(twin).__name__} with {key}={value} cannot be imported: {key} must be {wanted}.")
    return ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        seq_length=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        ffn_hidden_size=config.intermediate_size,
        tie_word_embeddings=config.tie_word_embeddings,
        init_method_std=config.initializer_range,
        **extra,
    )


def rename_to_hugging_face(model: ModelSection, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors (weights or gradients), given by canonical name, as the twin names and cuts them.

    Our fused matrices are split: `attention.qkv` has rows (head, query|key|value, head dim), `mlp.expand` of a gated
    model has rows (inner feature, gate|value).
    """
    renamed = {}
    for name, tensor in tensors.items():
        names = _names_in_twin(_TWINS[model.architecture], name)
        for their_name, part in zip(names, _split(tensor, model, name, len(names)), strict=True):
            renamed[their_name] = part
    return renamed


def rename_from_hugging_face(model: ModelSection, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the twin's tensors by canonical name; the inverse of `rename_to_hugging_face`.

    Tensors that ours lacks (token types, second names of tied tensors) are left out.
    """
    renamed = {}
    twin = _TWINS[model.architecture]
    for name in _canonical_names(twin, model.num_layers):
        names = _names_in_twin(twin, name)
        if all(their_name in tensors for their_name in names):
            renamed[name] = _fuse([tensors[their_name] for their_name in names], model, name)
    return renamed


def _canonical_names(twin: _Twin, num_layers: int) -> Iterator[str]:
    """Yield every tensor name that a model of ours can have."""
    yield from twin.outside
    for layer in range(num_layers):
        for module in twin.layer:
            yield from (f"layers.{layer}.{module}.{kind}" for kind in ("weight", "bias"))


def _names_in_twin(twin: _Twin, name: str) -> list[str]:
    match = _LAYER.match(name)
    if match is None:
        return [twin.outside[name]]
    layer, module, kind = match.groups()
    return [f"{twin.layer_prefix}.{layer}.{theirs}.{kind}" for theirs in twin.layer[module]]


def _num_row_groups(model: ModelSection, name: str) -> int:
    return model.num_attention_heads if _QKV in name else model.ffn_hidden_size


def _split(tensor: torch.Tensor, model: ModelSection, name: str, parts: int) -> list[torch.Tensor]:
    if parts == 1:
        return [tensor]
    grouped = tensor.unflatten(0, (_num_row_groups(model, name), parts, -1))
    return [part.flatten(0, 1) for part in grouped.unbind(1)]


def _fuse(parts: list[torch.Tensor], model: ModelSection, name: str) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    groups = _num_row_groups(model, name)
    return torch.stack([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 2)


def hugging_face_inputs(model: ModelSection, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Return the keyword arguments that give the twin this micro batch; its `loss` is the mean over the predictions.

    Llama gets the prefix as a 4-D mask, and the targets as `shift_labels`, since ours need not be the next tokens. The
    examples of packed sequences become a mask and position ids.
    """
    batch_size, length = batch.tokens.shape
    labels = torch.full((batch_size * length,), _IGNORED_LABEL, device=batch.tokens.device)
    labels = labels.index_copy(0, batch.positions, batch.targets).view(batch_size, length)
    inputs = {"input_ids": batch.tokens, "labels": labels}
    position = torch.arange(length, device=batch.tokens.device)
    causal = position[None, :] <= position[:, None]
    if batch.segments is not None:
        ids = batch.segments.ids
        inputs["position_ids"] = batch.segments.positions
        seen = ids[:, :, None] == ids[:, None, :]
        prefix = batch.segments.in_prefix
    else:
        seen = position < batch.lengths[:, None]
        prefix = position < batch.prefix_lengths[:, None]
    if model.architecture == "bert":
        if seen.ndim == 3:  # MegatronBert adds a mask of its own shape to the scores, in fp32
            seen = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, torch.finfo().min)[:, None]
        return {**inputs, "attention_mask": seen if seen.ndim == 4 else seen.long()}
    both = causal | prefix[:, None, :]
    return {**inputs, "shift_labels": labels, "attention_mask": (both if seen.ndim == 2 else both & seen)[:, None]}
