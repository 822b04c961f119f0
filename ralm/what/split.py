"""Documents -> spans: where a text is cut into chunks. `split("words:100")(text) -> [(start, end), ...]` in characters.

    words:100                 blocks of 100 whitespace-separated words (DPR, arXiv:2004.04906, section 4.1); words:100,overlap=20
    tokens:64                 blocks of 64 tokens of the bundled model's tokenizer; tokens:64,overlap=8,tokenizer=FILE.json
    markdown:1200             at headings, paragraphs, sentences; at most 1200 characters
    none                      the whole text

What holds for all: spans are in order, never empty, begin and end with a character that is no white space, and (without
overlap) hold every other character exactly once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

from ralm.errors import StoreError, UsageError, need
from ralm.registry import make
from ralm.what.rows import clean

Splitter = Callable[[str], list[tuple[int, int]]]
MOST = 1 << 31  # words that the regular expressions of Python can count


def split(spec: str) -> Splitter:
    """The splitter a spec string names. Raises UsageError where it is unknown or its numbers do not fit."""
    return make("split", spec, {"words": Words, "tokens": Tokens, "markdown": Markdown, "none": Whole})


def _sizes(name: str, n: Any, overlap: Any = 0) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise UsageError(f"{name}:{n} needs a whole number of at least 1; write {name}:100")
    if not isinstance(overlap, int) or isinstance(overlap, bool) or not 0 <= overlap < n:
        raise UsageError(f"overlap = {overlap} does not fit {name}:{n}; it must be at least 0 and below {n}")


def _blocks(count: int, n: int, overlap: int) -> list[tuple[int, int]]:
    """[first, stop) of every block of n items; the last one ends at the last item."""
    return [(i, min(i + n, count)) for i in range(0, max(count - overlap, min(count, 1)), n - overlap)]


def _trim(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out = []
    for start, end in spans:
        cut = text[start:end]
        left = len(cut) - len(cut.lstrip())
        if left < len(cut):
            out.append((start + left, start + len(cut.rstrip())))
    return out


def _growing(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without spans that lie within a neighbour (overlapping blocks may differ by bytes of one character or by white space)."""
    out: list[tuple[int, int]] = []
    for start, end in spans:
        if out and out[-1][0] == start:
            out[-1] = (start, max(end, out[-1][1]))
        elif not out or end > out[-1][1]:
            out.append((start, end))
    return out


@cache
def _words(n: int) -> re.Pattern[str]:
    """n words, fewer at the end of the text."""
    return re.compile(rf"\S++(?:\s++\S++){{0,{n - 1}}}+")


@dataclass(frozen=True)
class Words:
    """Blocks of n words; the text between the words stays as it is."""

    n: int = 100
    overlap: int = 0

    def __post_init__(self):
        _sizes("words", self.n, self.overlap)

    def __call__(self, text: str) -> list[tuple[int, int]]:
        """Every block is a row of units, of as many words as divide both numbers: one match a unit, not one a word."""
        unit = min(gcd(self.n, self.overlap), MOST)
        found = [m.span() for m in _words(unit).finditer(text)]
        return [(found[a][0], found[b - 1][1]) for a, b in _blocks(len(found), self.n // unit, self.overlap // unit)]


@dataclass(frozen=True)
class Tokens:
    """Blocks of n tokens. A character that two tokens share (bytes of one character) goes to the later block."""

    n: int = 64
    overlap: int = 0
    tokenizer: str | None = None  # a tokenizers JSON file; the bundled model's where none is given
    _loaded: list = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self):
        _sizes("tokens", self.n, self.overlap)

    def _tokenizer(self):
        if not self._loaded:
            tokenizers = need("tokenizers", f"splitting by tokens:{self.n}", "lm")
            if self.tokenizer is None:
                from ralm.lm.bundled import bundled

                file = bundled("base") / "tokenizer.json"
            else:
                file = Path(self.tokenizer)
            if not file.is_file():
                raise StoreError(f"the tokenizer {file} of the split tokens:{self.n} is not there; give tokenizer=FILE.json")
            try:
                loaded = tokenizers.Tokenizer.from_file(str(file))
            except Exception as e:
                raise StoreError(f"{file} is no tokenizers JSON ({e}); give tokenizer=FILE.json as saved by tokenizers") from e
            loaded.no_truncation()
            loaded.no_padding()
            self._loaded.append(loaded)
        return self._loaded[0]

    def __call__(self, text: str) -> list[tuple[int, int]]:
        offsets = self._tokenizer().encode(clean(text), add_special_tokens=False).offsets
        starts, furthest = [], 0
        for start, _ in offsets:  # a block ends where the next token begins: what the tokenizer skips is kept
            furthest = max(furthest, start)
            starts.append(furthest)
        if not starts:
            return _trim(text, [(0, len(text))])
        starts[0] = 0
        starts.append(len(text))
        return _growing(_trim(text, [(starts[a], starts[b]) for a, b in _blocks(len(offsets), self.n, self.overlap)]))


@dataclass(frozen=True)
class Markdown:
    """Markdown-aware pieces of at most n characters (semantic-text-splitter)."""

    n: int = 1200

    def __post_init__(self):
        _sizes("markdown", self.n)

    def __call__(self, text: str) -> list[tuple[int, int]]:
        splitter = need("semantic_text_splitter", f"splitting by markdown:{self.n}", "files").MarkdownSplitter(self.n)
        starts = [at for at, _ in splitter.chunk_indices(clean(text))]
        if not starts:
            return _trim(text, [(0, len(text))])
        starts[0] = 0
        return _trim(text, list(zip(starts, starts[1:] + [len(text)])))


@dataclass(frozen=True)
class Whole:
    """The document is its only chunk."""

    def __call__(self, text: str) -> list[tuple[int, int]]:
        return _trim(text, [(0, len(text))])
