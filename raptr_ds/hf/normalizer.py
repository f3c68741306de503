"""What sentencepiece does to a line before it splits it into pieces, as normalizers of the tokenizers library.

The library has sentencepiece's rules (Precompiled), but applies them grapheme by grapheme: of those that concern a
sequence it takes the shortest, and may drop the rest of the grapheme. So it is given characters one by one, and
sequences are composed after it: sentencepiece's rules for a sequence are those of its characters, and then a mark
composes with the letter right before it (Unicode's NFC also reorders marks and looks past others, so only such pairs
are put together before it). This leaves differences for 20 sequences of scripts that are new in Unicode 16 and, where
rules also fold case, for some 800 of a capital letter and a mark that has no small form with it.
Source: https://github.com/google/sentencepiece/blob/master/src/builder.cc, BuildNFKCMap.
"""

import re
import sys
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from sentencepiece import SentencePieceNormalizer
from tokenizers import Regex, normalizers
from tokenizers.normalizers import Normalizer

from raptr_ds.data.tokenizer import WORD_BOUNDARY, Tokenizer

# Two characters that Unicode leaves unassigned, and that end a grapheme: one keeps characters apart, the other stands
# for the newline, which is a space to sentencepiece's rules.
_APART, _NEWLINE = "\ufff0", "\ufff1"
_FIRST_MARK, _END = 0x300, 0x20000  # of Unicode's marks, and of its letters with marks
_MOST_MARKS = 3  # of one letter


def normalizer_of(tokenizer: Tokenizer, specials: Sequence[str]) -> normalizers.Sequence:
    """Return the normalizer of a text of lines, which leaves a word boundary where sentencepiece has one.

    specials: names of the special tokens, which take the boundary before them along.
    """
    model = tokenizer.content
    steps: list[Normalizer] = []
    if model.charsmap:
        steps += _rules(tokenizer)
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


def _rules(tokenizer: Tokenizer) -> list[Normalizer]:
    characters = [chr(code) for code in range(1, _END) if not 0xD800 <= code < 0xE000]
    rules = SentencePieceNormalizer(
        model_proto=tokenizer.model, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )
    results = dict(zip(characters, rules.normalize(characters), strict=True))
    removed = _any(one for one, result in results.items() if not result)
    # What is a letter with a mark already, or several characters, has no rule together with its neighbours.
    uncomposed = _any(one for one, result in results.items() if len(unicodedata.normalize("NFD", result)) > 1)
    if tokenizer.content.user_defined:  # sentencepiece leaves these as they are
        uncomposed = f"(?:{any_of(tokenizer.content.user_defined)}|{uncomposed})"
    composed = normalizers.Replace(Regex(f"(?<!{_APART}){_APART}{_composing_pairs(rules, characters)}"), "")
    return [
        normalizers.Replace("\n", _NEWLINE),
        normalizers.Replace(Regex(removed), _APART),
        # Not before the first character: tokenizers 0.23 panics when it normalizes a text with an insertion there.
        normalizers.Replace(Regex(rf"(?<!\A)(?={uncomposed})"), _APART),
        normalizers.Replace(Regex(rf"{uncomposed}\K"), _APART),
        normalizers.Replace(Regex(rf"(?<!\A)(?=[^{_span(0, _FIRST_MARK - 1)}{_NEWLINE}])"), _APART),
        normalizers.Precompiled(tokenizer.content.charsmap),
        *[composed, normalizers.NFC()] * _MOST_MARKS,
        normalizers.Replace(_NEWLINE, "\n"),
    ]


def _composing_pairs(rules: SentencePieceNormalizer, characters: Iterable[str]) -> str:
    """Return a regular expression of the places of _APART between two characters that Unicode and the rules compose."""
    decomposed = {one: parts for one in characters if len(parts := unicodedata.normalize("NFD", one)) > 1}
    bases: dict[str, list[str]] = {}
    for (character, parts), result in zip(decomposed.items(), rules.normalize(list(decomposed.values())), strict=True):
        base = unicodedata.normalize("NFC", parts[:-1])
        if len(base) == 1 and result == character == unicodedata.normalize("NFC", parts):
            bases.setdefault(parts[-1], []).append(base)
    if not bases:
        return _any(())
    pairs = "|".join(f"(?={mark})(?<={_any(before)}{_APART})" for mark, before in bases.items())
    return f"(?={_any(bases)})(?:{pairs})"  # most places are none: seen by the first condition


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
