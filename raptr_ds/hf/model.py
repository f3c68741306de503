"""Our models in transformers and back, on the same weights."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from raptr_ds.config.parse_sections import first_cause
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError
from raptr_ds.hf.twins import (
    ESM,
    LLAMA,
    TOKEN_TYPES,
    TWINS,
    Tensors,
    rename_from_hugging_face,
    rename_to_hugging_face,
    twin_of,
)

_IGNORED_LABEL = -100  # how torch and Hugging Face mark a position that is not predicted


def to_hugging_face(model: ModelSection, weights: Tensors, tokenizer: Tokenizer | None = None) -> PreTrainedModel:
    """Return the transformers model that computes the same as ours with `weights`, in evaluation mode.

    model: with nothing left to derive, vocab_size included. weights: full tensors by canonical name; their type
    becomes the model's. tokenizer: gives the ids that pad, begin and end a text, at the last of which generation stops;
    without it these are None (ESM's padding is then 0: it does not run without one). Residual scale is a path's, not
    the model's: the twin is the full path without it. MegatronBert's token types, which we lack, are zero. Llama has no
    dropout of the stream, ESM none of the embedding: evaluation sees neither.
    Raises: ConfigError if transformers has no such model.
    """
    twin = twin_of(model)
    state = rename_to_hugging_face(model, weights)
    word = state[twin.outside["embedding.word.weight"]]
    if model.tie_word_embeddings:
        state[twin.outside["head.output.weight"]] = word
    state |= {name: state[first] for name, first in twin.again.items()}
    theirs: PreTrainedModel = twin.kind(hugging_face_config(model, tokenizer))
    cast_parameters(theirs, word.dtype)
    own, buffers = (
        theirs.state_dict(),
        dict(theirs.named_buffers()),
    )  # ESM keeps its rotary frequencies with its weights
    state |= {name: torch.zeros_like(own[name]) for name in twin.lacks}
    state |= {name: buffer for name, buffer in buffers.items() if name in own}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def cast_parameters(twin: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the type of a model's weights in place, and of nothing else: in 16 bits rotary frequencies are wrong."""
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)


def hugging_face_config(model: ModelSection, tokenizer: Tokenizer | None = None) -> PreTrainedConfig:
    """Return the twin's configuration, with the tokenizer's special ids.

    Raises: ConfigError if transformers has no such model.
    """
    twin = twin_of(model)
    settings: dict[str, Any] = {theirs: getattr(model, ours) for ours, theirs in twin.settings.items()}
    for role in ("pad", "bos", "eos"):
        settings[f"{role}_token_id"] = tokenizer and getattr(tokenizer, f"{role}_id")
    if twin is LLAMA:
        rope = {"rope_type": "default", "rope_theta": model.rotary_base}
        settings |= {"mlp_bias": model.add_bias_linear, "rope_parameters": rope}
    if twin is ESM:
        settings["pad_token_id"] = tokenizer.pad_id if tokenizer else 0
        settings["mask_token_id"] = tokenizer and tokenizer.mask_id
    return twin.kind.config_class(**settings, **twin.fixed)  # type: ignore[misc]


def from_hugging_face(theirs: PreTrainedModel) -> tuple[ModelSection, dict[str, torch.Tensor]]:
    """Return our model and its canonical weights for a model of transformers that is a twin of one of ours.

    MegatronBert's first token type is added to the position embeddings, as every token of ours has that type.
    Raises: ConfigError if no model of ours computes the same (grouped queries, scaled rotary frequencies, ...).
    """
    model = _section_of(theirs)
    state = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    weights = rename_from_hugging_face(model, state)
    if TOKEN_TYPES in state:
        weights["embedding.position.weight"] = weights["embedding.position.weight"] + state[TOKEN_TYPES][0]
    if model.tie_word_embeddings:
        weights.pop("head.output.weight", None)
    return model, weights


def _section_of(theirs: PreTrainedModel) -> ModelSection:
    kind, config = type(theirs).__name__, theirs.config
    twin = next((twin for twin in TWINS if isinstance(theirs, twin.kind)), None)
    if twin is None:
        raise ConfigError(
            f"a {kind} cannot be imported: only {', '.join(twin.kind.__name__ for twin in TWINS)} compute what our "
            "models compute."
        )
    settings = {ours: getattr(config, theirs) for ours, theirs in twin.settings.items()}
    checked = {key: (getattr(config, key) or False, wanted) for key, wanted in twin.fixed.items()}
    if twin is LLAMA:
        rope = config.rope_parameters
        settings["rotary_base"] = rope["rope_theta"]
        checked |= {
            "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
            "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
            "mlp_bias": (config.mlp_bias, config.attention_bias),
            "rope_type": (rope["rope_type"], "default"),
        }
    for key, (value, wanted) in checked.items():
        if value != wanted:
            raise ConfigError(f"a {kind} with {key}={value} cannot be imported: {key} must be {wanted}.")
    if twin is ESM:
        _check_frequencies(theirs)
    settings["attention_dropout"] = settings["attention_dropout"] or 0.0  # Llama's may be None
    settings["position_embedding"] = twin.requires["position_embedding"]
    try:
        return ModelSection(architecture="ul2" if twin is LLAMA else "bert", **settings)
    except ValueError as error:
        ours, rule = first_cause(error)
        raise ConfigError(
            f"a {kind} with {twin.settings.get(ours, ours)}={settings[ours]} cannot be imported: raptr_ds.model.{ours} "
            f"{rule}. Change it in config.json."
        ) from error


def _check_frequencies(esm: Any) -> None:
    """Check that frequencies that are stored as weights are those of rope_theta. Raises: ConfigError."""
    rotary = esm.esm.rotary_embeddings
    exact = rotary.compute_default_rope_parameters(esm.config)[0].to(rotary.inv_freq.device)
    if not torch.allclose(rotary.inv_freq.float(), exact, rtol=1e-6, atol=0.0):
        raise ConfigError(
            f"an EsmForMaskedLM whose rotary frequencies (inv_freq) are not "
            f"those of rope_theta={esm.config.rope_theta}, but changed or rounded to 16 bits, cannot be "
            "imported: save it with its frequencies in fp32."
        )


def hugging_face_inputs(model: ModelSection, batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Return the keyword arguments that give the twin this micro batch; its `loss` is the mean over the predictions.

    Llama gets the prefix as a 4-D mask, and the targets as `shift_labels`, since ours need not be the next tokens. The
    examples of packed sequences become a mask and position ids.
    Raises: ConfigError for packed sequences of BERT with rotary positions: ESM takes no mask but that of padding.
    """
    if batch.segments is not None and twin_of(model) is ESM:
        raise ConfigError(
            "EsmForMaskedLM of transformers, which BERT with raptr_ds.model.position_embedding=rotary is there, cannot "
            "keep the documents of packed sequences apart. Set raptr_ds.data.packing to false."
        )
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
