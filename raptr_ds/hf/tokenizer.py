"""Our sentencepiece tokenizer as a transformers one that gives the same ids."""

import math
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from raptr_ds.data.tokenizer import CLS, MASK, SEP, WORD_BOUNDARY, Tokenizer
from raptr_ds.errors import DataError
from raptr_ds.hf.normalizer import any_of, normalizer_of
from raptr_ds.sentencepiece_model import Piece, PieceType, SentencepieceModel, read_sentencepiece_model

_ROUNDING = 1e-5  # relative, of a sum of float32 scores
# How a unigram model scores a user-defined symbol, found by trying 0.2.0 to 0.2.3.
_LONG_SYMBOLS_FIRST = tuple(map(int, sentencepiece.__version__.split(".")[:3])) >= (0, 2, 2)

# Texts on which tokenizers tend to differ.
SAMPLE_TEXTS = (
    "",
    " ",
    "\n",
    "\n\n \n",
    "A sentence, with punctuation; it's 12,345.67 long!",
    " one space before, two  between and one after ",
    "first line\nsecond line\n\n  indented\n\ttab\r\nWindows line\n",
    "def f(x):\n    if x  ==  1:\n        return [x, {'a': x}]  # comment",
    "<0x41> <0x0A> <s> </s> <unk> <pad> ## @@ \u0120",
    "na\u00efve caf\u00e9 cafe\u0301 \ufb01ne \uff21\uff22 \u00bd \u2126 \u212b \u00df \u0130",
    "\u4f60\u597d\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U00010348 \ue000",
    "no\u00a0break \u3000wide\u2003em \u200bzero \u00adsoft \ufeffmark \u2028line",
    "control \x01\x07\x1b\x7f\x85 characters",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ================ --------",
)


def tokenizer_to_hugging_face(
    tokenizer: Tokenizer, architecture: str, max_length: int, has_token_types: bool = True
) -> PreTrainedTokenizerFast:
    """Return the tokenizer for transformers.

    For bert it makes [CLS] text [SEP], as pretraining did, and of a pair [CLS] text [SEP] other text [SEP] with token
    types 0 and 1 where the model takes these (has_token_types). For ul2 it adds nothing, and pads on the left, as
    generation needs.
    Unlike ours it takes the name of a special token in a text for that token: "[MASK]" is how one writes a mask. Like
    the piece that it stands for in pretraining it includes the word boundary before it: "a [MASK] b" is a, [MASK] and
    b, and in "a [MASK]b" the b continues the masked word.
    Where two segmentations of a unigram model are equally likely the two libraries may choose differently.
    """
    model = read_sentencepiece_model(tokenizer.model, tokenizer.origin)
    specials = tokenizer.pieces(np.flatnonzero(tokenizer.is_special))
    special = any_of(specials)
    rust = RustTokenizer(_rust_model(model, *tokenizer.pieces([tokenizer.unk_id])))
    rust.normalizer = normalizer_of(tokenizer, specials)  # type: ignore[assignment]
    rust.pre_tokenizer = _splits(model)  # type: ignore[assignment]
    spaces = {(True, False): " ", (True, True): " +", (False, True): " +", (False, False): None}[
        model.add_dummy_prefix, model.remove_extra_whitespaces
    ]
    rust.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace(Regex(rf"\A(?={special}\z)"), WORD_BOUNDARY),
            decoders.Replace(WORD_BOUNDARY, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Replace(Regex(rf"(?<![^\n]){spaces}"), "")] if spaces else []),
        ]
    )
    # normalized: found after the word boundaries are set, so that the text behind one does not begin a line.
    rust.add_special_tokens([AddedToken(name, special=True, normalized=True) for name in specials])
    is_bert = architecture == "bert"
    if is_bert:
        rust.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{CLS}:0 $A:0 {SEP}:0",
            pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
            special_tokens=[(CLS, tokenizer.cls_id), (SEP, tokenizer.sep_id)],
        )
    pad, unk, bos, eos = tokenizer.pieces([tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        model_max_length=max_length,
        model_input_names=["input_ids", *(["token_type_ids"] if is_bert and has_token_types else []), "attention_mask"],
        padding_side="right" if is_bert else "left",
        clean_up_tokenization_spaces=False,
        pad_token=pad,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
    )


def check_same_ids(tokenizer: Tokenizer, exported: PreTrainedTokenizerFast, texts: Iterable[str]) -> None:
    """Compare the ids of `texts`, and of every special token between two words.

    Texts that spell a special token are left out: there the two differ by design.
    Raises: DataError that shows the first text whose ids differ.
    """
    special_ids = np.flatnonzero(tokenizer.is_special).tolist()
    names = tokenizer.pieces(special_ids)
    spells_special = re.compile(any_of(names), re.IGNORECASE)
    cases = [(text, tokenizer.encode(text).tolist()) for text in texts if not spells_special.search(text)]
    left, both = tokenizer.encode("a").tolist(), tokenizer.encode("a b").tolist()
    right = both[len(left) :]
    cases += [(f"a {name} b", [*left, token, *right]) for name, token in zip(names, special_ids, strict=True)]
    for text, ours in cases:
        theirs = exported(text, add_special_tokens=False, verbose=False)["input_ids"]
        if theirs == ours or _equally_likely(tokenizer, ours, theirs):
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
        shown = slice(max(place - 3, 0), place + 5)
        raise DataError(
            f"the tokenizer {tokenizer.origin} cannot be given to transformers: there it would encode differently. "
            f"{text[:80]!r} has {len(ours)} tokens here and {len(theirs)} there; from token {shown.start} on, here "
            f"{tokenizer.pieces(ours[shown])}, there {tokenizer.pieces(theirs[shown])}. Export without it "
            "(--tokenizer none), or train the model with a tokenizer of tools/prepare_data.py."
        )


def _equally_likely(tokenizer: Tokenizer, ids: list[int], other: list[int]) -> bool:
    """Return whether a unigram model has no reason to prefer one of two segmentations of the same text."""
    model = read_sentencepiece_model(tokenizer.model, tokenizer.origin)
    one, another = (sum(model.pieces[token].score for token in tokens) for tokens in (ids, other))
    is_unigram, same_text = model.model_type == "unigram", tokenizer.decode(ids) == tokenizer.decode(other)
    return is_unigram and same_text and math.isclose(one, another, rel_tol=_ROUNDING)


def _splits(model: SentencepieceModel) -> pre_tokenizers.PreTokenizer:
    """Return what cuts a normalized text into the stretches that the model splits one by one."""
    splits: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split("\n", "isolated")]
    if model.model_type == "bpe" and model.user_defined:
        splits.append(pre_tokenizers.Split(Regex(any_of(model.user_defined)), "isolated"))
    # A text that spells the name of a byte piece must not become that byte: it is cut where no piece would be.
    texts = [piece.text for piece in model.pieces if piece.type != PieceType.BYTE]
    for cut, begin in (("<0", "<"), ("0x", "<0")):
        if not any(cut in text for text in texts):
            name = f"{begin}(?={'<0x'.removeprefix(begin)}[0-9A-F]{{2}}>)"
            splits.append(pre_tokenizers.Split(Regex(name), "merged_with_previous"))
            break
    return pre_tokenizers.Sequence(splits)


def _rust_model(model: SentencepieceModel, unk: str) -> BPE | Unigram:
    texts = [piece.text for piece in model.pieces]
    if model.model_type == "bpe":
        vocabulary = {text: token for token, text in enumerate(texts)}
        # A symbol has no merges. It is a stretch of its own, and that other stretches do not become the piece that they
        # spell was ruled out when the model was read.
        whole = bool(model.user_defined)
        return BPE(
            vocabulary, _merges(model.pieces), unk_token=unk, byte_fallback=True, fuse_unk=True, ignore_merges=whole
        )
    scores = [piece.score for piece in model.pieces if piece.type == PieceType.NORMAL]
    worst = min(scores)  # from which both libraries derive that of unknown text

    def score_of(piece: Piece) -> float:
        if piece.type == PieceType.USER_DEFINED:
            return 0.1 * (len(piece.text.encode()) - 1) if _LONG_SYMBOLS_FIRST else -0.1
        return piece.score if piece.type == PieceType.NORMAL else worst

    return Unigram([(piece.text, score_of(piece)) for piece in model.pieces], texts.index(unk), byte_fallback=True)


def _merges(pieces: Iterable[Piece]) -> list[tuple[str, str]]:
    """Return every way to put a piece together of two, in the order in which sentencepiece prefers the results."""
    ranked = {piece.text: -piece.score for piece in pieces if piece.type == PieceType.NORMAL}
    merges = []
    for text in sorted(ranked, key=ranked.__getitem__):
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [pair for pair in splits if pair[0] in ranked and pair[1] in ranked]
    return merges
