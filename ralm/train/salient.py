"""Which words of a sentence are masked: salient spans (REALM, section 3.4), spans or words at random.

    masker = Masker("salient")                  # or "spans" (SpanBERT), "uniform" (BERT: 15 % of the words)
    masker.candidates(text)                     # [Candidate(sentence (start, end), spans [(start, end), ...]), ...]
    salient("It was built in 1887 near Paris.") # [(16, 20, "date"), (26, 31, "name")]

A salient span is a named entity or a date: what cannot be guessed from grammar, so that a passage must be read. The paper tags
names with a BERT trained on CoNLL-2003 and dates with a regular expression; here both are rules, or spaCy's models (extra):

    name      a run of capitalised words that does not only begin the sentence; initials and of, the, de, von, van within it
    date      12 May 1887, May 1887, 1887, 1880s, 19th century, Monday, 44 BC
    number    12.5 million, $40, 30%, 120 km: a number with something that says what it counts, or a large one"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ralm.errors import UsageError, need, unknown
from ralm.how.cite import sentences

KINDS = ("salient", "spans", "uniform")
TAGGERS = ("rules", "spacy")
ENTITIES = frozenset("PERSON NORP FAC ORG GPE LOC PRODUCT EVENT WORK_OF_ART LAW LANGUAGE DATE PERCENT MONEY QUANTITY".split())

_MONTH = (r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
          r"|Jan\.|Feb\.|Aug\.|Sept?\.|Oct\.|Nov\.|Dec\.)")
_YEAR = r"(?:1[0-9]{3}|20[0-9]{2})"
_DATE = re.compile(rf"""
      (?<!\w) (?: [0-3]?\d(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}(?:,?\s+{_YEAR})?     # 12 May 1887
        | {_MONTH}\s+[0-3]?\d(?:st|nd|rd|th)?(?:,?\s+{_YEAR})?(?!\d)                 # May 12, 1887
        | {_MONTH}\s+{_YEAR}
        | {_YEAR}-\d\d-\d\d
        | [12]?\d(?:st|nd|rd|th)\s+(?:century|centuries)
        | \d{{1,4}}\s+(?:BCE?|CE|AD)\b | AD\s+\d{{1,4}}
        | {_YEAR}s | {_YEAR}
        | (?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day ) (?![\w]|[.,]\d|-\d)""", re.X)
_UNIT = (r"(?:percent|per\ cent|million|billion|trillion|thousand|hundred|dozen|years?|months?|weeks?|days?|hours?|minutes?"
         r"|seconds?|miles?|metres?|meters?|km|m|cm|mm|feet|ft|inches|kg|g|tons?|tonnes?|pounds?|dollars?|euros?|people|men|women|students"
         r"|acres|hectares|degrees|votes|seats|K|°C|°F|°)")
_NUMBER = re.compile(rf"""
      (?<![\w.,]) (?: [$€£]\s?\d+(?:,\d+)*(?:\.\d+)?(?:\s(?:million|billion|trillion))?
        | \d+(?:,\d+)*(?:\.\d+)?\s?% | \d+(?:,\d+)*(?:\.\d+)?[\s-]{_UNIT}(?!\w)(?:\s(?:miles?|km|metres?|people|dollars|years?))?
        | \d{{1,3}}(?:,\d{{3}})+ | \d+\.\d+ | \d{{2,}} ) (?![\w]|[.,]\d)""", re.X)
_WORD = r"(?:(?:[A-Z]\.){2,}|[A-ZÀ-ÖØ-Þ](?:[\w'’-]*\w|\.(?=\s[A-Z]))?)"
_NAME = re.compile(rf"(?<![\w.’'-]){_WORD}(?:(?:\s(?:of|the|de|del|da|von|van|der|la|le|al|ibn)){{0,2}}\s{_WORD})*")
# capitalised for their place or their kind, not for what they name
_PLAIN = frozenset("""a about above after again all also although among an and another any are as at because been before
    being both but by can could despite did do does during each early either even every few finally first for from had
    has have having he her here his how however i if in including instead into is it its just late later like many may
    meanwhile more most much my near neither nevertheless no nor not now of off often on once one only or other others
    our out over perhaps rather second several she should similarly since so some soon such than that the their them
    then there therefore these they third this those though three through throughout thus to today together two under
    unlike until up upon us was we were what when where whereas whether which while who whom whose why will with within
    without would yes yet you your""".split())


class Candidate(NamedTuple):
    """A sentence of a text and what of it may be masked: characters of the text, [start, end)."""

    start: int
    end: int
    spans: list[tuple[int, int]]


def salient(sentence: str, tagger: str = "rules") -> list[tuple[int, int, str]]:
    """Named entities, dates and numbers of one sentence: (start, end, kind), in order, none within another.

    Raises UsageError for an unknown tagger, MissingDependency for spaCy where it or its model is absent."""
    if tagger == "spacy":
        return [(e.start_char, e.end_char, e.label_.lower()) for e in _spacy()(sentence).ents if e.label_ in ENTITIES]
    if tagger != "rules":
        raise unknown("tagger", tagger, TAGGERS)
    found = [(m.start(), m.end(), "date") for m in _DATE.finditer(sentence)]
    for m in _NUMBER.finditer(sentence):
        if not _within(m.span(), found):
            found.append((*m.span(), "number"))
    for start, end in _names(sentence):
        if not _within((start, end), found):
            found.append((start, end, "name"))
    return sorted(found)


def _within(span: tuple[int, int], found: list[tuple[int, int, str]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end, _ in found)


def _names(sentence: str) -> list[tuple[int, int]]:
    """Runs of capitalised words. The sentence's first word is capitalised anyway: it counts only as part of a longer run, without
    the article or pronoun it may be."""
    first = len(sentence) - len(sentence.lstrip("\"'“‘(["))
    out = []
    for m in _NAME.finditer(sentence):
        start, end = m.span()
        while start < end:  # words that name nothing are taken off the front
            word = re.match(r"\S+\s*", sentence[start:end])
            if word.group().strip(".").strip().lower() not in _PLAIN:
                break
            start += word.end()
        if start >= end:
            continue
        run = sentence[start:end].removesuffix("'s").removesuffix("’s")
        alone = " " not in run
        if len(run) > 1 and not (alone and start == first and not run.isupper()):
            out.append((start, start + len(run)))
    return out


@lru_cache(maxsize=1)
def _spacy() -> Any:
    package = need("spacy", "tagging with spaCy", "spacy")
    try:
        return package.load("en_core_web_sm", exclude=["lemmatizer"])
    except OSError as e:
        raise UsageError("spaCy's model en_core_web_sm is not installed: python -m spacy download en_core_web_sm, or use "
                         "tagger = \"rules\"") from e


@dataclass(frozen=True)
class Masker:
    """What of a text is masked, by kind: salient (one entity), spans (a run of words, SpanBERT), uniform (15 % of the words)."""

    kind: str = "salient"
    tagger: str = "rules"
    share: float = 0.15  # of the words of a sentence: uniform
    words: int = 8  # of the shortest sentence that is taken

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("kind of masking", self.kind, KINDS)
        if self.tagger not in TAGGERS:
            raise unknown("tagger", self.tagger, TAGGERS)

    def candidates(self, text: str) -> list[Candidate]:
        """The sentences of a text that are long enough and have something to mask; a span lies within one sentence."""
        out = []
        for start, end in sentences(text):
            sentence = text[start:end]
            words = [(start + m.start(), start + m.end()) for m in re.finditer(r"\w[\w'’-]*", sentence)]
            if len(words) < self.words:
                continue
            spans = words if self.kind != "salient" else [(start + a, start + b) for a, b, _ in salient(sentence, self.tagger)]
            if spans:
                out.append(Candidate(start, end, spans))
        return out

    def draw(self, text: str, rng: np.random.Generator) -> tuple[Candidate, list[tuple[int, int]]] | None:
        """A sentence and the spans of it that are masked; None where the text has none. The same for the same generator."""
        found = self.candidates(text)
        if not found:
            return None
        chosen = found[int(rng.integers(len(found)))]
        spans = chosen.spans
        if self.kind == "salient":
            return chosen, [spans[int(rng.integers(len(spans)))]]
        if self.kind == "spans":  # lengths are geometric, p = 0.2, at most 10: mean 3.8
            length = min(int(rng.geometric(0.2)), 10, len(spans))
            first = int(rng.integers(len(spans) - length + 1))
            return chosen, [(spans[first][0], spans[first + length - 1][1])]
        count = max(1, round(self.share * len(spans)))
        return chosen, [spans[i] for i in sorted(rng.permutation(len(spans))[:count].tolist())]
