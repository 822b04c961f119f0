"""Text -> terms: what a sparse index takes for a word. The analyser is part of the index; its settings are stored in the manifest.

1. Text is cut into runs (kernels.tokenise): ASCII letters, digits, low lines and everything above ASCII but punctuation;
   an apostrophe stays between letters where the language is English or none, a point or comma between digits ("3.14").
2. A run with characters above ASCII is finished here: NFKC and case folding, marks of format (soft hyphen, joiners) dropped, then
   cut into words of str.isalnum characters, combining marks and low lines. Accents stay: "cafe" does not find "café".
   Han, kana, Thai, Lao, Burmese and Khmer stand without spaces: a stretch gives its characters and its pairs of neighbours.
3. A final 's is dropped (English or none), stop words go, the rest is stemmed. In other languages an apostrophe cuts
   (l'homme -> l, homme).

Each distinct run is worked on once, so the speed of plain text is that of the compiled loop."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from ralm.errors import UsageError, unknown
from ralm.index import kernels

VERSION = 1  # raise it when the same text would give other terms
ENGLISH = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of", "on", "or",
    "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with"))  # Lucene's
APOSTROPHES = frozenset({None, "english", "porter"})  # stemmers of languages in which it stands inside words
PIECE = 1 << 20  # bytes tokenised at a time
_KIND, _LOWER = kernels.byte_kinds(), np.arange(256, dtype=np.uint8)
_LOWER[ord("A"):ord("Z") + 1] += 32
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF),
             (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))


@dataclass(frozen=True)
class Settings:
    """What decides the terms of a text. `stop` holds the words themselves, sorted."""

    stemmer: str | None = "english"
    stop: tuple[str, ...] = tuple(sorted(ENGLISH))

    @staticmethod
    def of(stemmer: str | None, stop: str | Sequence[str] | None) -> Settings:
        """From what a user writes: stemmer none or a Snowball name; stop none, english, or the words (a list, or one text).

        Raises UsageError for an unknown name."""
        import Stemmer

        if stemmer in (None, "none"):
            stemmer = None
        elif stemmer not in Stemmer.algorithms():
            raise unknown("stemmer", str(stemmer), ["none", *Stemmer.algorithms()])
        if stop in (None, "none", ""):
            words: Iterable[str] = ()
        elif isinstance(stop, str):
            words = ENGLISH if stop == "english" else stop.split()
            if stop != "english" and len(stop.split()) < 2:
                raise UsageError(f"stop words '{stop}' are not known: write none, english, or the words (two or more, with spaces)")
        else:
            words = stop
        return Settings(stemmer, tuple(sorted({w for word in words for w in cut(word)})))

    def facts(self) -> dict:
        """For the manifest: two indexes with equal facts cut every text alike."""
        import Stemmer

        snowball = Stemmer.version() if self.stemmer else None  # its rules change from release to release
        stop = {(): "none", tuple(sorted(ENGLISH)): "english"}.get(self.stop, list(self.stop))
        return {"stemmer": self.stemmer, "stop": stop, "snowball": snowball, "analyser": VERSION}


class Analyser:
    """Cuts texts into terms and numbers the terms as they come. Not safe for two threads at once."""

    def __init__(self, settings: Settings):
        import Stemmer

        self.settings = settings
        self.terms: list[str] = []  # by number
        self._number: dict[str, int] = {}
        self._stop = frozenset(settings.stop)
        self._join = settings.stemmer in APOSTROPHES
        self._stem = Stemmer.Stemmer(settings.stemmer, 0) if settings.stemmer else None  # no cache: every word comes once
        self._slots, self._hashes = np.full(1 << 12, -1, np.int32), np.empty(0, np.uint64)
        self._starts, self._blob, self.runs = np.zeros(1, np.int64), np.empty(0, np.uint8), 0
        self._run_ptr, self._run_terms = np.zeros(1, np.int64), np.empty(0, np.int32)
        self._seen, self._where, self._stamp = np.empty(0, np.int64), np.empty(0, np.int64), 0

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(int32 term numbers of all texts, int64 [len(texts) + 1] where each text's begin)."""
        terms, ends, total = [], [np.zeros(1, np.int64)], 0
        for piece in _pieces(texts):
            t, ptr = self._piece(piece)
            terms.append(t)
            ends.append(ptr[1:] + total)
            total += len(t)
        return np.concatenate(terms) if terms else np.empty(0, np.int32), np.concatenate(ends)

    def count(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The distinct terms of each text in the order they first occur: (int64 ptr [len(texts) + 1], int32 terms, uint32 counts),
        and how many terms each text has altogether (int64)."""
        terms, ptr = self(texts)
        if len(self._seen) < len(self.terms):
            old = len(self._seen)
            self._seen, self._where = grown(self._seen, len(self.terms)), grown(self._where, len(self.terms))
            self._seen[old:] = -1
        counted = kernels.count_terms(terms, ptr, self._seen, self._where, self._stamp)
        self._stamp += len(texts)
        return *counted, np.diff(ptr)

    def words(self, text: str) -> list[str]:
        """The terms of one text, to look at."""
        return [self.terms[t] for t in self([text])[0]]

    def _piece(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        data = np.frombuffer(b"\xff".join([*texts, b"\0\0"]), np.uint8)  # a separator after each, two bytes of slack
        room = len(data) // 2 + 1  # the most runs there can be
        self._reserve(room, len(data))
        ids, ptr = np.empty(room, np.int32), np.zeros(len(texts) + 1, np.int64)
        before = self.runs
        n, self.runs = kernels.tokenise(data, _KIND, _LOWER, self._join, self._slots, self._hashes, self._starts, self._blob,
                                        before, ids, ptr)
        self._learn(before)
        return kernels.expand(ids[:n], ptr, self._run_ptr, self._run_terms)

    def _reserve(self, runs: int, size: int) -> None:
        """Room in the table for so many more runs of so many bytes altogether."""
        self._hashes = grown(self._hashes, self.runs + runs)
        self._starts = grown(self._starts, self.runs + runs + 1)
        self._run_ptr = grown(self._run_ptr, self.runs + runs + 1)
        self._blob = grown(self._blob, int(self._starts[self.runs]) + size + 2)
        if len(self._slots) < 2 * (self.runs + runs):
            self._slots = np.full(1 << (2 * (self.runs + runs)).bit_length(), -1, np.int32)
            kernels.rehash(self._hashes, self.runs, self._slots)

    def _learn(self, first: int) -> None:
        """Find out what the runs from number `first` on stand for."""
        if first == self.runs:
            return
        starts = self._starts[first:self.runs + 1].tolist()
        raw = self._blob[starts[0]:starts[-1]].tobytes()
        sizes, words = [], []
        for a, b in pairwise(starts):
            run = raw[a - starts[0]:b - starts[0]]
            here = [run.decode("ascii")] if run.isascii() else cut(run.decode("utf-8", "replace"))
            if self._join:
                here = [_plain(w) if "'" in w else w for w in here]
            here = [w for w in here if w and w not in self._stop]
            sizes.append(len(here))
            words += here
        if self._stem is not None:
            words = self._stem.stemWords(words)
        number, terms = self._number, self.terms
        numbers = []
        for word in words:
            n = number.get(word)
            if n is None:
                n = number[word] = len(terms)
                terms.append(word)
            numbers.append(n)
        at = int(self._run_ptr[first])
        self._run_terms = grown(self._run_terms, at + len(numbers))
        self._run_terms[at:at + len(numbers)] = numbers
        self._run_ptr[first + 1:self.runs + 1] = at + np.cumsum(sizes)


def cut(run: str) -> list[str]:
    """The words of a text with characters above ASCII, folded: step 2 of the description above."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", run).casefold())
    text = text.replace("i\u0307", "i").replace("\u2019", "'")  # a folded Turkish capital I with its dot; the curly apostrophe
    words, word = [], ""
    for i, c in enumerate(text):
        if c.isalnum() or c == "_" or (word and _inside(word[-1], c, text[i + 1:i + 2])):
            word += c
        elif word and unicodedata.category(c) != "Cf":
            words.append(word)
            word = ""
    return [w for long in [*words, word] for w in _spaced(long) if w.strip("_")]


def _inside(last: str, c: str, after: str) -> bool:
    """Whether c, between these two, belongs to the word: a combining mark, an apostrophe or a decimal sign."""
    if c == "'":
        return last.isalpha() and after.isalpha()
    if c in ".,":
        return last.isdecimal() and after.isdecimal()
    return unicodedata.category(c)[0] == "M"


def _unspaced(c: str) -> bool:
    n = ord(c)
    return n >= 0x0E00 and any(a <= n <= b for a, b in _UNSPACED)


def _spaced(word: str) -> list[str]:
    """A word as it is; of stretches in scripts without spaces the characters (with their marks) and the pairs of neighbours."""
    if not any(map(_unspaced, word)):
        return [word]
    units: list[str] = []
    for c in word:
        if units and unicodedata.category(c)[0] == "M":
            units[-1] += c
        else:
            units.append(c)
    out: list[str] = []
    for unspaced, group in groupby(units, key=lambda unit: _unspaced(unit[0])):
        stretch = list(group)
        out += [*stretch, *(a + b for a, b in pairwise(stretch))] if unspaced else ["".join(stretch)]
    return out


def _plain(word: str) -> str:
    """English: without the possessive 's."""
    return word[:-2] if word.endswith("'s") else word


def _pieces(texts: Sequence[str]) -> Iterable[list[bytes]]:
    piece, size = [], 0
    for text in texts:
        raw = text.encode("utf-8", "replace")
        piece.append(raw)
        size += len(raw) + 1
        if size >= PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a copy at least twice as long where `size` does not fit (its new places are not set)."""
    if len(array) >= size:
        return array
    out = np.empty(max(size, 2 * len(array)), array.dtype)
    out[:len(array)] = array
    return out
