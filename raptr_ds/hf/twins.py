"""The transformers models that compute what ours compute, and how their tensors are named and cut.

The transformers model that computes the same as one of ours is called its twin: BERT with learned positions is
MegatronBertForMaskedLM, BERT with rotary positions EsmForMaskedLM, UL2 LlamaForCausalLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import EsmForMaskedLM, LlamaForCausalLM, MegatronBertForMaskedLM, PreTrainedModel

from raptr_ds.config.sections import ModelSection
from raptr_ds.errors import ConfigError

Tensors = Mapping[str, torch.Tensor]

_QKV, _EXPAND = "attention.qkv", "mlp.expand"


@dataclass(frozen=True)
class Twin:
    """How a Hugging Face class names our tensors, and the settings of our model that it has.

    settings: ours by theirs, as far as they mean the same. fixed: what theirs must be for computing what ours does.
    layer: each module of a layer of ours and the one, two or three of theirs that it is cut into. outside: tensors
    outside the layers, by their names. again: second names of theirs, with the first. lacks: tensors of theirs that
    ours has none for, and that are zero.
    """

    kind: type[PreTrainedModel]
    requires: Mapping[str, object]
    settings: Mapping[str, str]
    fixed: Mapping[str, object]
    layer_prefix: str
    layer: Mapping[str, tuple[str, ...]]
    outside: Mapping[str, str]
    again: Mapping[str, str] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()


TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
_SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "seq_length": "max_position_embeddings",
    "init_method_std": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
}
_BERT_SETTINGS = {
    **_SETTINGS,
    "norm_epsilon": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_BERT_LAYER = {
    _QKV: ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output": ("attention.output.dense",),
    _EXPAND: ("intermediate.dense",),
    "mlp.contract": ("output.dense",),
}
_BERT_ONLY = {"activation": "gelu", "normalization": "layernorm", "add_bias_linear": True}
MEGATRON_BERT = Twin(
    kind=MegatronBertForMaskedLM,
    requires={**_BERT_ONLY, "position_embedding": "learned"},
    settings=_BERT_SETTINGS,
    fixed={"hidden_act": "gelu", "is_decoder": False},  # the exact gelu, as ours
    layer_prefix="bert.encoder.layer",
    layer={**_BERT_LAYER, "attention_norm": ("attention.ln",), "mlp_norm": ("ln",)},
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
    again={"cls.predictions.bias": "cls.predictions.decoder.bias"},  # unused without tied embeddings
    lacks=(TOKEN_TYPES,),
)
ESM = Twin(
    kind=EsmForMaskedLM,
    requires={**_BERT_ONLY, "position_embedding": "rotary"},
    settings={**_BERT_SETTINGS, "rotary_base": "rope_theta"},
    fixed={
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": False,  # which would scale the embeddings by the number of masks
        "is_decoder": False,
        "is_folding_model": False,
        "add_cross_attention": False,
    },
    layer_prefix="esm.encoder.layer",
    layer={**_BERT_LAYER, "attention_norm": ("attention.LayerNorm",), "mlp_norm": ("LayerNorm",)},
    outside={
        "embedding.word.weight": "esm.embeddings.word_embeddings.weight",
        "head.norm.weight": "esm.encoder.emb_layer_norm_after.weight",
        "head.norm.bias": "esm.encoder.emb_layer_norm_after.bias",
        "head.transform.weight": "lm_head.dense.weight",
        "head.transform.bias": "lm_head.dense.bias",
        "head.transform_norm.weight": "lm_head.layer_norm.weight",
        "head.transform_norm.bias": "lm_head.layer_norm.bias",
        "head.output.weight": "lm_head.decoder.weight",
        "head.bias": "lm_head.bias",
    },
    lacks=("esm.contact_head.regression.weight", "esm.contact_head.regression.bias"),
)
LLAMA = Twin(
    kind=LlamaForCausalLM,
    requires={"activation": "swiglu", "normalization": "rmsnorm", "position_embedding": "rotary"},
    settings={
        **_SETTINGS,
        "norm_epsilon": "rms_norm_eps",
        "attention_dropout": "attention_dropout",
        "add_bias_linear": "attention_bias",
    },
    fixed={"hidden_act": "silu"},
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
TWINS = (MEGATRON_BERT, ESM, LLAMA)


def twin_of(model: ModelSection) -> Twin:
    """Return the twin of a model of ours. Raises: ConfigError if transformers has none."""
    bert = ESM if model.position_embedding == "rotary" else MEGATRON_BERT
    twin = bert if model.architecture == "bert" else LLAMA
    for key, wanted in twin.requires.items():
        value = getattr(model, key)
        if value != wanted:
            raise ConfigError(
                f"{twin.kind.__name__} of transformers has {key}={_spelled(wanted)} only, but the model is "
                f"{model.architecture} with raptr_ds.model.{key}={_spelled(value)}. Such a model cannot be exported; "
                "leave that key at its default to train one that can."
            )
    return twin


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def rename_to_hugging_face(model: ModelSection, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors (weights or gradients), given by canonical name, as the twin names and cuts them.

    Our fused matrices are split: `attention.qkv` has rows (head, query|key|value, head dim), `mlp.expand` of a gated
    model has rows (inner feature, gate|value).
    """
    renamed, names = {}, _names(model)
    for name, tensor in tensors.items():
        parts = _split(tensor, model, name, len(names[name]))
        renamed.update(zip(names[name], parts, strict=True))
    return renamed


def rename_from_hugging_face(model: ModelSection, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the twin's tensors by canonical name; the inverse of `rename_to_hugging_face`.

    Tensors that ours lacks (token types, second names of tied tensors) are left out.
    """
    return {
        name: _fuse([tensors[one] for one in theirs], model, name)
        for name, theirs in _names(model).items()
        if all(one in tensors for one in theirs)
    }


def _names(model: ModelSection) -> dict[str, list[str]]:
    """Return every tensor that a model of ours can have, by canonical name: its names, one or several, in the twin."""
    twin = twin_of(model)
    names = {ours: [theirs] for ours, theirs in twin.outside.items()}
    for layer in range(model.num_layers):
        for module, theirs in twin.layer.items():
            for kind in ("weight", "bias"):
                in_twin = [f"{twin.layer_prefix}.{layer}.{one}.{kind}" for one in theirs]
                names[f"layers.{layer}.{module}.{kind}"] = in_twin
    return names


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
