"""Sentencepiece models as other projects train them: T5's, Llama's and their like, on text with much besides letters."""

import io
from functools import cache

import numpy as np
import sentencepiece

from tests.made_up_text import made_up_text

# Accents composed and not, ligatures, wide and half-width letters, signs, emoji, several spaces, tabs.
UNUSUAL = (
    "caf\u00e9 cafe\u0301 na\u00efve \ufb01ne o\ufb03ce \u00c5ngstr\u00f6m \u212b Stra\u00dfe \u01c6 \u0130stanbul",
    "\uff21\uff22\uff23 \uff11\uff12\uff13 \uff76\uff9e\uff8a\uff9f \u30ab\u3099 \u30cf\u309a",
    "\u1100\u1161\u11a8 \uac01 \ud55c\uad6d\uc5b4 \u3131\u314f Vie\u0302\u0323t Vi\u1ec7t ti\u00ea\u0301ng e\u0323\u0302",
    "\u00bd \u2460 \u2122 \u2026 \u00b4 \u2126 x\u00b2 \u33a1 \u0e01\u0e33 \u05e9\u05b8\u05c1\u05dc \u0645\u064f\u062d\u0651\u064e",
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


@cache
def foreign_model(**options: object) -> bytes:
    """Return a model of 500 pieces, trained with these options."""
    model = io.BytesIO()
    lines = [*made_up_text(0, 200).split("\n"), *UNUSUAL * 5]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{"vocab_size": 500, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 3, **options},
    )
    return model.getvalue()


def normalized(model: bytes, text: str) -> str:
    """Return what sentencepiece itself makes of a text before it splits it, line by line, its boundaries as spaces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return "\n".join(_normalized_line(processor, line) for line in text.split("\n"))
