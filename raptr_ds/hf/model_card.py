"""The README.md of an exported model: what it is, how it was trained, what it reached, and how to load it."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.hf.shallower import Kept
from raptr_ds.sentencepiece_model import read_sentencepiece_model

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FILL_MASK = """\
from transformers import pipeline

fill = pipeline("fill-mask", model=".")  # this folder, or this model's name on the Hub
for answer in fill("The value of the [MASK] is a name."):
    print(f"{answer['score']:.3f}  {answer['sequence']}")
"""
_COMPLETE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

folder = "."  # or this model's name on the Hub
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
tokens = tokenizer("[S2S] The value of the", return_tensors="pt").input_ids
length, cache = tokens.shape[1], DynamicCache()
sees_all = torch.ones(1, 1, length, length, dtype=torch.bool)
with torch.no_grad():
    logits = model(tokens, sees_all, None, cache).logits
    for _ in range(12):
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == tokenizer.eos_token_id:
            break
        logits = model(tokens[:, -1:], None, None, cache).logits
print(tokenizer.decode(tokens[0]))
"""
_WEIGHTS = """\
from transformers import {loader}

model = {loader}.from_pretrained(".")  # this folder, or this model's name on the Hub
"""
_MODES = """\
The model is a prefix language model: the tokens of a prompt see each other in both directions. `generate()` of
transformers lets them see what is before them only; the lines above give the prompt the mask that it was trained with.
A prompt begins with a mode: `[S2S]` continues a text; with `[NLU]` or `[NLG]` a prompt such as
`[NLU] The <extra_id_0> of the <extra_id_1>.` is answered by `<extra_id_0>`, the first missing words, `<extra_id_1>`,
the second ones, and the end of the text.
"""


def model_card(
    trained: TrainedModel,
    settings: Mapping[str, Any],
    held_out: tuple[int, float] | None,
    kept: Kept | None,
    theirs: PreTrainedModel,
    tokenizer: Tokenizer | None,
) -> str:
    """Return the card, in Markdown; what is not known is left out.

    settings: the `raptr_ds` block of the run file. held_out: step and loss of the trained model's last evaluation.
    kept: the layers of it that this one has, None for all.
    """
    is_bert = trained.model.architecture == "bert"
    task = "fill-mask" if is_bert else "text-generation"
    loader = "AutoModelForMaskedLM" if is_bert else "AutoModelForCausalLM"
    example = _WEIGHTS.format(loader=loader) if tokenizer is None else _FILL_MASK if is_bert else _COMPLETE
    rows = {
        **_network(trained, theirs),
        **_kept(kept),
        **_training(trained, settings, held_out, kept is None),
        **_tokenizer(tokenizer),
    }
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:\n- {trained.model.architecture}\n- raptr\n---",
        f"# {'BERT' if is_bert else 'UL2'}, {trained.model.num_layers} layers of {trained.model.hidden_size}",
        f"{_SENTENCES[is_bert]} Pretrained with raptr_ds and exported for transformers, which needs nothing else.",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]),
        f"## Use\n\n```python\n{example}```",
        *([] if is_bert or tokenizer is None else [_MODES.rstrip()]),
    ]
    return "\n\n".join(parts) + "\n"


_SENTENCES = {
    True: "An encoder that fills in masked words.",
    False: "A decoder trained on UL2's mixture of denoisers: it continues a text and fills in missing words.",
}


def _network(trained: TrainedModel, theirs: PreTrainedModel) -> dict[str, str]:
    model = trained.model
    return {
        "class in transformers": f"`{type(theirs).__name__}`",
        "layers, width, heads": f"{model.num_layers}, {model.hidden_size:,}, {model.num_attention_heads}",
        "inner width, activation": f"{model.ffn_hidden_size:,}, {model.activation}",
        "parameters": f"{sum(tensor.numel() for tensor in trained.weights.values()):,}",
        "longest sequence": f"{model.seq_length:,} tokens, {model.position_embedding} positions",
        "precision of the weights": _PRECISIONS.get(theirs.dtype, str(theirs.dtype)),
    }


def _kept(kept: Kept | None) -> dict[str, str]:
    if kept is None:
        return {}
    path = kept.path
    scaled = f"; their branches scaled by {path.residual_scale:.4g}, as in training" if path.residual_scale != 1 else ""
    rows = {"layers kept": f"{', '.join(map(str, path.layers))} of the {path.num_layers} that were trained{scaled}"}
    if kept.loss is not None:
        rows["held-out loss of these layers"] = f"{kept.loss:.4f} nats per predicted token"
    return rows


def _training(
    trained: TrainedModel, settings: Mapping[str, Any], held_out: tuple[int, float] | None, is_whole: bool
) -> dict[str, str]:
    state = trained.run_state
    train, path = (part if isinstance(part := settings.get(name), dict) else {} for name in ("train", "path"))
    of = f" of {train['steps']:,}" if isinstance(train.get("steps"), int) else ""
    rows = {"steps": f"{trained.step:,}{of}"}
    if state.get("tokens"):
        rows["tokens"] = f"{state['tokens']:,}"
    if state.get("full_flops"):
        saved = 1 - state["flops"] / state["full_flops"]
        rows["FLOPs"] = f"{state['flops']:.3g}, {saved:.1%} less than the full model on the same batches"
    if held_out is not None:
        name = "held-out loss" if is_whole else "held-out loss of all layers"
        rows[name] = f"{held_out[1]:.4f} nats per predicted token, after step {held_out[0]:,}"
    if path:
        given = {key: value for key, value in path.items() if key != "method" and value not in (None, [], False)}
        listed = [f"{key} {value}".replace("|", "/") for key, value in given.items()]
        rows["path method"] = "; ".join([str(path.get("method", "full")), *listed])
    return rows


def _tokenizer(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {"tokenizer": "not in this folder"}
    kind = read_sentencepiece_model(tokenizer.model, tokenizer.origin).model_type
    return {"tokenizer": f"sentencepiece {kind} of {tokenizer.vocab_size:,} pieces, digest {tokenizer.digest}"}
