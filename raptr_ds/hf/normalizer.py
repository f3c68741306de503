"""What sentencepiece does to a line before it splits it into pieces, as normalizers of the tokenizers library.

The library has sentencepiece's rules (Precompiled), but applies them grapheme by grapheme: of those that concern a
sequence it takes the shortest, and may drop the rest of the grapheme. So it is given characters one by one, and
sequences are composed after it: sentencepiece's rules for a sequence are those of its characters, and then a mark
composes with the letter right before it (Unicode's NFC also reorders marks and looks past others, so only such pairs
are put together before it). Which pairs the rules have is found by trying them. This leaves differences for 20
sequences of scripts that are new in Unicode 16.
Source: https://github.com/google/sentencepiece/blob/master/src/builder.cc, BuildNFKCMap.
"""

import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from sentencepiece import SentencePieceNormalizer
from tokenizers import Regex, normalizers
from tokenizers.normalizers import Normalizer

from raptr_ds.data.tokenizer import WORD_BOUNDARY, Tokenizer
from raptr_ds.sentencepiece_model import SentencepieceModel, read_sentencepiece_model

# Two characters that Unicode leaves unassigned, and that end a grapheme: one keeps characters apart, the other stands
# for the newline, which is a space to sentencepiece's rules.
_APART, _NEWLINE = "\ufff0", "\ufff1"
_FIRST_MARK, _END = 0x300, 0x20000  # of Unicode's marks, and of its letters with marks
_MOST_MARKS = 3  # of one letter


def normalizer_of(tokenizer: Tokenizer, specials: Sequence[str]) -> normalizers.Sequence:
    """Return the normalizer of a text of lines, which leaves a word boundary where sentencepiece has one.

    specials: names of the special tokens, which take the boundary before them along.
    """
    model = read_sentencepiece_model(tokenizer.model, tokenizer.origin)
    steps: list[Normalizer] = []
    if model.charsmap:
        steps += _rules(tokenizer, model)
    if model.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(r"(?<![^\n])(?=[^\n])"), WORD_BOUNDARY))
    if model.charsmap:  # only now: a line of which nothing is left has a word boundary
        steps.append(normalizers.Replace(_APART, ""))
    if model.remove_extra_whitespaces:
        start = rf"(?<![^\n]){WORD_BOUNDARY}\K +" if model.add_dummy_prefix else r"(?<![^\n]) +"
        steps.append(normalizers.Replace(Regex(f"[ {WORD_BOUNDARY}]+(?=\\n|\\z)|{start}| \\K +"), ""))
    steps.append(normalizers.Replace(" ", WORD_BOUNDARY))
    # Rules that fold case do so with these names, too, which transformers then finds in any case.
    folded = [normalizers.Sequence(steps).normalize_str(name).lstrip(WORD_BOUNDARY) for name in specials]
    steps.append(normalizers.Replace(Regex(f"{WORD_BOUNDARY}(?={any_of(folded)})"), ""))
    return normalizers.Sequence(steps)


def any_of(names: Collection[str]) -> str:
    """Return a regular expression, for Python and for tokenizers, of any of the names.

    It looks at the first character by itself, or hundreds of names would be tried at every space of a text.
    """
    escaped = [re.escape(name) for name in names]
    first = "".join(sorted({re.escape(name[0]) for name in names}))
    return f"(?=[{first}])(?:{'|'.join(escaped)})"


def _rules(tokenizer: Tokenizer, model: SentencepieceModel) -> list[Normalizer]:
    characters = [chr(code) for code in range(1, _END) if not 0xD800 <= code < 0xE000]
    rules = SentencePieceNormalizer(
        model_proto=tokenizer.model, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )
    results = dict(zip(characters, rules.normalize(characters), strict=True))
    removed = _any(one for one, result in results.items() if not result)
    # What is a letter with a mark already, or several characters, has no rule together with its neighbours.
    uncomposed = _any(one for one, result in results.items() if len(unicodedata.normalize("NFD", result)) > 1)
    if model.user_defined:  # sentencepiece leaves these as they are
        uncomposed = f"(?:{any_of(model.user_defined)}|{uncomposed})"
    pairs = _composing_pairs(rules, characters)
    places = "|".join(f"(?={mark})(?<={_any(bases)}{_APART})" for mark, bases in pairs.items())
    composed = f"(?={_any(pairs)})(?:{places})"  # most places are none: seen by the first condition
    return [
        normalizers.Replace("\n", _NEWLINE),
        normalizers.Replace(Regex(removed), _APART),
        *_composed_before_folding(rules, results, pairs),
        # Not before the first character: tokenizers 0.23 panics when it normalizes a text with an insertion there.
        normalizers.Replace(Regex(rf"(?<!\A)(?={uncomposed})"), _APART),
        normalizers.Replace(Regex(rf"{uncomposed}\K"), _APART),
        normalizers.Replace(Regex(_without_rule(rules, results, pairs)), _APART),
        normalizers.Replace(Regex(rf"(?<!\A)(?=[^{_span(0, _FIRST_MARK - 1)}{_NEWLINE}])"), _APART),
        normalizers.Precompiled(model.charsmap),
        *[normalizers.Replace(Regex(f"(?<!{_APART}){_APART}{composed}"), ""), normalizers.NFC()] * _MOST_MARKS,
        normalizers.Replace(_NEWLINE, "\n"),
    ]


def _composing_pairs(rules: SentencePieceNormalizer, characters: Iterable[str]) -> dict[str, list[str]]:
    """Return the characters before it, by themselves or composed, that each mark composes with."""
    decomposed = {one: parts for one in characters if len(parts := unicodedata.normalize("NFD", one)) > 1}
    pairs: dict[str, list[str]] = {}
    for (character, parts), result in zip(decomposed.items(), rules.normalize(list(decomposed.values())), strict=True):
        base = unicodedata.normalize("NFC", parts[:-1])
        if len(base) == 1 and result == character == unicodedata.normalize("NFC", parts):
            pairs.setdefault(parts[-1], []).append(base)
    return pairs


def _composed_before_folding(
    rules: SentencePieceNormalizer, results: Mapping[str, str], pairs: Mapping[str, Iterable[str]]
) -> Iterator[Normalizer]:
    """Yield what composes the few capital letters that have no small form: I and U+0307."""
    for mark, bases in pairs.items():
        for base in bases:
            if results.get(base, base) != base:
                composed = unicodedata.normalize("NFC", base + mark)
                found = zip(results, rules.normalize([one + mark for one in results]), strict=True)
                ones = _any(one for one, result in found if result == composed)
                yield normalizers.Replace(Regex(ones + mark), composed)


def _without_rule(
    rules: SentencePieceNormalizer, results: Mapping[str, str], pairs: Mapping[str, Iterable[str]]
) -> str:
    """Return a regular expression of the places between a mark and what only becomes its base by the rules, where no
    rule composes the two: rules that fold case have many for small letters alone.
    """
    variants: dict[str, list[str]] = {}
    for one, result in results.items():
        if one != result:
            variants.setdefault(result, []).append(one)
    apart: dict[str, list[str]] = {}
    for mark, bases in pairs.items():
        marks = [mark, *variants.get(mark, ())]
        found = [(one, other, base) for base in bases for one in variants.get(base, ()) for other in marks]
        for (one, other, base), result in zip(found, rules.normalize([a + b for a, b, _ in found]), strict=True):
            if result == base + mark:
                apart.setdefault(other, []).append(one)
    return "|".join(rf"{_any(ones)}\K(?={mark})" for mark, ones in apart.items()) or _any(())


def _any(characters: Iterable[str]) -> str:
    """Return a regular expression of one character out of a set, which may be empty, written as ranges."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return f"[{''.join(_span(*ends) for ends in ranges)}]" if ranges else f"[^{_span(0, sys.maxunicode)}]"


def _span(first: int, last: int) -> str:
    return f"\\x{{{first:X}}}-\\x{{{last:X}}}"
