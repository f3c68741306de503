"""Megatron-core's own transformer layers, for the benchmark: its GPT layer specification with torch's attention.

Its local attention forks a CUDA generator and its fused one needs Transformer Engine; the layer around it runs
anywhere. Import this module before those of raptr_ds that import megatron-core (parallel/megatron_core.py) to have its
fused functions compiled, as its users do.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.parallel.groups import ProcessGroups

_LAYER = re.compile(r"^layers\.(\d+)\.(.+)\.(weight|bias)$")


class _TorchAttention(nn.Module):
    """Megatron-core's core attention; shapes (T, b, heads, head dim) in, (T, b, heads * head dim) out."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class MegatronStack(nn.Module):
    """Layers of megatron-core in place of ours: the same arguments, every layer, no dropout, one tensor rank."""

    def __init__(self, groups: ProcessGroups, model: ModelSection) -> None:
        super().__init__()
        assert groups.topology.tensor == groups.topology.pipeline == 1
        config = TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            layernorm_epsilon=model.norm_epsilon,
            normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
            activation_func=functional.silu if model.activation == "swiglu" else functional.gelu,
            gated_linear_unit=model.activation == "swiglu",
            add_bias_linear=model.add_bias_linear,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
            persist_layer_norm=False,
        )
        spec: Any = get_gpt_layer_local_spec(normalization=config.normalization)
        spec.submodules.self_attention.submodules.core_attention = _TorchAttention
        collection = ProcessGroupCollection(tp=groups.tensor, pp=groups.pipeline, cp=groups.tensor)
        layers: list[Any] = [
            build_module(spec, config=config, layer_number=number + 1, pg_collection=collection)
            for number in range(model.num_layers)
        ]
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: torch.Tensor, path: object, mask: torch.Tensor | None, rotary: torch.Tensor | None, streams: object
    ) -> torch.Tensor:
        """Run every layer on x (b, T, H). rotary: cosines and sines; megatron-core takes angles."""
        stream = x.transpose(0, 1).contiguous()
        angles = None
        if rotary is not None:
            half = torch.atan2(rotary[1], rotary[0])
            angles = torch.cat([half, half], dim=-1)[:, None, None]
        for layer in self.layers:
            stream, _ = layer(hidden_states=stream, attention_mask=mask, rotary_pos_emb=angles)
        return stream.transpose(0, 1).contiguous()


_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attention.linear_qkv",
    "attention.output": "self_attention.linear_proj",
    "mlp_norm": "pre_mlp_layernorm",
    "mlp.expand": "mlp.linear_fc1",
    "mlp.contract": "mlp.linear_fc2",
}


def rename_to_megatron(weights: Mapping[str, torch.Tensor], is_gated: bool) -> dict[str, torch.Tensor]:
    """Return a whole model's tensors by their names with a MegatronStack as its `layers`.

    Our gated MLP has rows (inner feature, gate|value), megatron-core's all gates before all values.
    """
    renamed = {}
    for name, tensor in weights.items():
        match = _LAYER.match(name)
        if match is None:
            renamed[name] = tensor
            continue
        layer, module, kind = match.groups()
        if is_gated and module == "mlp.expand":
            tensor = torch.cat([tensor[0::2], tensor[1::2]])  # noqa: PLW2901
        renamed[f"layers.layers.{layer}.{_NAMES[module]}.{kind}"] = tensor
    return renamed
