"""Our sentencepiece tokenizer as a transformers tokenizer with the same ids."""

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from raptr_ds.data.tokenizer import BOS, CLS, EOS, MASK, PAD, SEP, UNK, WORD_BOUNDARY, Tokenizer

_NEVER = -1e4  # a log-probability


def tokenizer_to_hugging_face(tokenizer: Tokenizer, architecture: str, max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer for transformers; for bert it puts [CLS] and [SEP] around a text, as in pretraining.

    Where two segmentations of a unigram model are equally likely up to rounding, the two libraries may choose
    differently. Unlike ours, it reads the name of a special token in a text as that token: "[MASK]" becomes a mask.
    """
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(tokenizer.model)
    pieces = [processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    scores = [processor.get_score(i) for i in range(tokenizer.vocab_size)]
    is_text = [not tokenizer.is_special[i] and not processor.is_byte(i) for i in range(tokenizer.vocab_size)]
    if _is_bpe(scores, is_text):
        ranked = {piece: -scores[i] for i, piece in enumerate(pieces) if is_text[i]}
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        model = BPE(vocabulary, _merges(ranked), unk_token=UNK, byte_fallback=True, fuse_unk=True)
    else:
        # A text that contains the name of a byte piece must not become that byte.
        unlikely = [_NEVER if processor.is_byte(i) else score for i, score in enumerate(scores)]
        model = Unigram(list(zip(pieces, unlikely, strict=True)), tokenizer.unk_id, byte_fallback=True)
    rust = RustTokenizer(model)
    rust.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [
            normalizers.Replace(" ", WORD_BOUNDARY),
            # Our tokenizer encodes line by line; sentencepiece begins each that is not empty with a word boundary.
            normalizers.Replace(Regex(r"(?<![^\n])(?=[^\n])"), WORD_BOUNDARY),
        ]
    )
    rust.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # type: ignore[assignment]
    rust.decoder = decoders.Sequence(  # type: ignore[assignment]
        [
            decoders.Replace(WORD_BOUNDARY, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<![^\n]) "), ""),
        ]
    )
    specials = [pieces[i] for i in np.flatnonzero(tokenizer.is_special)]
    rust.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    if architecture == "bert":
        ends = [(CLS, tokenizer.cls_id), (SEP, tokenizer.sep_id)]
        rust.post_processor = processors.TemplateProcessing(f"{CLS} $A {SEP}", None, ends)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
    )


def _is_bpe(scores: list[float], is_text: list[bool]) -> bool:
    """Return whether the scores are a byte-pair model's (0, -1, -2, ...), not a unigram's log-probabilities."""
    counted = [score for score, text in zip(scores, is_text, strict=True) if text]
    return all(score == -rank for rank, score in enumerate(counted))


def _merges(ranked: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to another, in the order in which sentencepiece prefers the results."""
    merges = []
    for piece in sorted(ranked, key=ranked.__getitem__):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [pair for pair in splits if pair[0] in ranked and pair[1] in ranked]
    return merges
