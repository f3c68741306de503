"""SQuAD's exact match and F1, by the names of a module that transformers had.

lm-eval 0.4.13 (coqa, record) imports transformers.data.metrics.squad_metrics, which transformers 5.24 no longer has.
Source: Rajpurkar et al. 2016, section 6.1.
"""

import re
import string
import sys
from collections import Counter
from importlib.util import find_spec
from types import ModuleType

_THEIRS = "transformers.data.metrics"
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and spaces that repeat."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def compute_exact(gold: str, predicted: str) -> int:
    """Return 1 if both are the same answer, else 0."""
    return int(normalize_answer(gold) == normalize_answer(predicted))


def compute_f1(gold: str, predicted: str) -> float:
    """Return the harmonic mean of precision and recall of the words; without words, whether both have none."""
    golds, predictions = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not golds or not predictions:
        return float(golds == predictions)
    shared = sum((Counter(golds) & Counter(predictions)).values())
    return 2.0 * shared / (len(golds) + len(predictions))


def stand_in() -> None:
    """Let the harness import this module under the name that it knows, unless transformers has its own."""
    if _THEIRS not in sys.modules and find_spec(_THEIRS) is None:
        package = ModuleType(_THEIRS)
        package.squad_metrics = sys.modules[__name__]  # type: ignore[attr-defined]
        sys.modules |= {_THEIRS: package, f"{_THEIRS}.squad_metrics": package.squad_metrics}
