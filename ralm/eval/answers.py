"""Measures of one answer against its references. Variants disagree, so the name says which one it is.

All but `has_answer_regex` compare strings after SQuAD's normalisation (`ralm.lm.spans.normalised`: lower case, ASCII punctuation
out, the words a, an, the out, white space collapsed, in that order) or DPR's tokens; all take the best over the references.
No references means that the question has no answer: the empty prediction, an abstention, is then right."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from ralm.errors import UsageError
from ralm.lm.spans import normalised


def em_squad(prediction: str, references: Sequence[str]) -> float:
    """Exact match of SQuAD (Rajpurkar et al. 2016): 1.0 where a reference is equal after normalisation, else 0.0."""
    said = normalised(prediction)
    return float(any(said == normalised(r) for r in references or ("",)))


def em_orqa(prediction: str, references: Sequence[str]) -> float:
    """Exact match of ORQA and REALM: Unicode NFD first, then as SQuAD, so that composed and decomposed accents agree."""
    return em_squad(unicodedata.normalize("NFD", prediction), [unicodedata.normalize("NFD", r) for r in references])


def f1_squad(prediction: str, references: Sequence[str]) -> float:
    """F1 of the multisets of normalised words, best over the references.

    Where a side normalises to no word, F1 is 1.0 if both do and else 0.0 (the SQuAD 2.0 script; the 1.1 script gives 0.0)."""
    said = normalised(prediction).split()
    return max(_overlap(said, normalised(r).split()) for r in references or ("",))


def _overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    return 2 * sum((Counter(said) & Counter(wanted)).values()) / (len(said) + len(wanted))


def match_substring(prediction: str, references: Sequence[str]) -> float:
    """"Accuracy" of long answers as Self-RAG and FlashRAG print it: 1.0 where a normalised reference is a substring of the
    normalised prediction: 'cat' is in 'catalonia' (not for `match_tokens`). References that normalise to nothing match nothing."""
    if not references:
        return float(not normalised(prediction))
    said = normalised(prediction)
    return float(any(wanted in said for wanted in map(normalised, references) if wanted))


def match_tokens(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the normalised words of a reference follow each other somewhere in those of the prediction."""
    said = normalised(prediction).split()
    if not references:
        return float(not said)
    return float(any(_within(normalised(r).split(), said) for r in references))


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether `part` (not empty) is a contiguous run of `whole`. Tokens hold no white space, so text search is exact."""
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(whole)} "


# ---- does a passage hold the answer? --------------------------------------------------------------------------------------


def has_answer(passage: str, references: Sequence[str]) -> bool:
    """DPR's test of a passage (Karpukhin et al. 2020): the tokens of a reference follow each other in those of the passage.

    Unicode NFD, lower case. A reference without a token is in no passage (DPR's own script finds it in every one)."""
    said = dpr_tokens(passage)
    return any(_within(dpr_tokens(r), said) for r in references)


def has_answer_regex(passage: str, references: Sequence[str]) -> bool:
    """As for CuratedTREC in DPR: a reference is a regular expression, searched anywhere, ignoring case, ^ and $ at every line.

    Raises UsageError for a reference that is no regular expression."""
    try:
        return any(re.search(unicodedata.normalize("NFD", r), unicodedata.normalize("NFD", passage), re.IGNORECASE | re.MULTILINE)
                   for r in references)
    except re.error as e:
        raise UsageError(f"an answer is not a regular expression ({e}: {e.pattern!r}); use has_answer for plain answers") from e


def dpr_tokens(text: str) -> list[str]:
    """Runs of letters, numbers and marks, and every other visible character on its own, of the NFD form; lower case.

    DrQA's SimpleTokenizer: ([\\p{L}\\p{N}\\p{M}]+)|([^\\p{Z}\\p{C}])."""
    return [token.lower() for token in _dpr_pattern().findall(unicodedata.normalize("NFD", text))]


@lru_cache(1)
def _dpr_pattern() -> re.Pattern[str]:
    """`re` knows no \\p{..}: the classes are written out from this Python's Unicode tables."""
    word, gap = _ranges(lambda kind: kind in "LNM"), _ranges(lambda kind: kind in "ZC")
    return re.compile(f"[{word}]+|[^{word}{gap}]")


def _ranges(wanted: Callable[[str], bool]) -> str:
    """The characters whose general category begins with a wanted letter, as the inside of a regular expression's class."""
    out, start = [], None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and wanted(unicodedata.category(chr(code))[0])
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            out.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(out)
