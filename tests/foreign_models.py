"""Sentencepiece models as other projects train them: T5's, Llama's and their like, on text of unusual characters."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.prepare.brought_tokenizer import bring_tokenizer
from tests.made_up_text import made_up_text

# Accents composed and not, ligatures, wide and half-width letters, signs, emoji, several spaces, tabs.
UNUSUAL = (
    "café cafe\u0301 naïve \ufb01ne o\ufb03ce Ångström \u212b Straße ǆ İstanbul",
    "\uff21\uff22\uff23 \uff11\uff12\uff13 \uff76\uff9e\uff8a\uff9f \u30ab\u3099 \u30cf\u309a",
    "\u1100\u1161\u11a8 각 한국어 \u3131\u314f Vie\u0302\u0323t Việt tiê\u0301ng e\u0323\u0302",
    "½ ① \u2122 … \u00b4 \u2126 x² ㎡ \u0e01\u0e33 \u05e9\u05b8\u05c1\u05dc \u0645\u064f\u062d\u0651\u064e",
    "\U0001f600 \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "two  spaces   three\tone tab\t\ttwo\u00a0fixed \u3000wide \u200bnone\u00adsoft  ",
)
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = {
    **IDENTITY,
    "model_type": "bpe",
    "byte_fallback": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
T5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # and sentencepiece's defaults
SYMBOLS = ["<url>", "<|user|>", "@@", "@@@"]
FOREIGN = {
    "t5": T5,
    "llama": LLAMA,
    "t5 with symbols": {**T5, "user_defined_symbols": SYMBOLS},
    "llama with symbols": {**LLAMA, "user_defined_symbols": SYMBOLS},
    "symbols that overlap": {**T5, "remove_extra_whitespaces": False, "user_defined_symbols": ["the", "e", "i", "th"]},
    "gemma": {**LLAMA, "add_dummy_prefix": False, "user_defined_symbols": SYMBOLS, "pad_id": 3},
    "albert": {
        "model_type": "unigram",
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": -1,
        "eos_id": -1,
        "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
        "user_defined_symbols": list("().,-"),
    },
    "uncased": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc_cf"},
    "no prefix, nfkc": {**T5, "normalization_rule_name": "nfkc", "add_dummy_prefix": False},
    "nmt, spaces kept": {**T5, "remove_extra_whitespaces": False},
    "special tokens as symbols": {
        **LLAMA,
        "user_defined_symbols": ["[PAD]", "[MASK]", "[CLS]", *(f"<extra_id_{i}>" for i in range(5))],
    },
}


def foreign_model(options: Mapping[str, object], lines: Sequence[str] | None = None) -> bytes:
    """Return a model trained with these options: of at most 500 pieces, on made-up words and unusual characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines or [*made_up_text(0, 200).split("\n"), *UNUSUAL * 5]),
        model_writer=model,
        **{"vocab_size": 500, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 3, **options},
    )
    return model.getvalue()


def brought(model: bytes, folder: Path, num_sentinels: int = 8) -> Tokenizer:
    """Return the model with what it lacks, as tools/prepare_data.py --tokenizer takes it."""
    path = folder / "their.model"
    path.write_bytes(model)
    return bring_tokenizer(path, num_sentinels)[0]


def normalized(model: sentencepiece.SentencePieceProcessor, options: Mapping[str, object], text: str) -> str:
    """Return what sentencepiece itself makes of each line before it splits it, with spaces for word boundaries."""
    has_prefix, removes = options.get("add_dummy_prefix", True), options.get("remove_extra_whitespaces", True)
    lines = []
    for line in text.split("\n"):
        content = model.normalize(line)[1 if line and has_prefix else 0 :].replace("\u2581", " ")
        lines.append(content.lstrip(" ") if removes else content)
    return "\n".join(lines)
