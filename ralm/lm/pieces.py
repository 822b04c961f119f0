"""From tokens to text that can be shown: whole characters only, and nothing that may turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ralm.types import Token, Tokenizer

REACH = 16  # tokens before one that may change how it is written


def spans(tokenizer: Tokenizer, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The tokens of a text and the characters [start, end) each stands at, int64 [N].

    ends ascend to the text's length, so the text from one to the next is what a token adds. A token that is a part of a character
    stands at the whole of it. One pass over the text, by the tokenizer's own offsets where it has them."""
    if (told := _offsets(tokenizer, text)) is None:
        ids = tokenizer.encode(text)
        return ids, *_measured(tokenizer, ids, len(text))
    ids = told[0]
    starts, ends = (np.asarray(told[1], np.int64).reshape(-1, 2)[:, i] for i in (0, 1))
    ends = np.maximum.accumulate(ends) if len(ids) else ends
    ends[-1:] = len(text)
    return ids, np.minimum(starts, np.concatenate([[0], ends])[:-1]), ends  # some leave the space before a word out


def _offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
    """(ids, offsets) of a tokenizer that tells, or of the one of the tokenizers library in it where that gives the same ids."""
    if hasattr(tokenizer, "offsets"):
        return tokenizer.offsets(text)
    inner = getattr(tokenizer, "inner", None)
    if not hasattr(inner, "get_vocab_size"):
        return None
    told = inner.encode(text, add_special_tokens=False)
    return (told.ids, told.offsets) if told.ids == tokenizer.encode(text) else None


def _measured(tokenizer: Tokenizer, ids: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens stand by how much longer each makes what is written: of a tokenizer that does not tell.

    Near a U+FFFD of the text itself it may be off by some."""
    starts, ends, whole = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64), 0
    for i in range(len(ids)):
        a = max(0, i - REACH)
        before, now = tokenizer.decode(ids[a:i]) if i else "", tokenizer.decode(ids[a:i + 1])
        starts[i] = whole
        whole += len(now.rstrip("�")) - len(before.rstrip("�"))
        ends[i] = min(length, whole + now.endswith("�"))  # a character that was begun is this token's, whoever ends it
    ends[-1:] = length
    return np.minimum(starts, length), ends


def first_stop(text: str, stops: Sequence[str], begin: int = 0) -> int:
    """Where the stop text that is complete first begins in text[begin:], -1 where none is: so the answer is the same
    however the text was cut up while it came."""
    found = [(at + len(s), at) for s in stops if (at := text.find(s, begin)) >= 0]
    return min(found)[1] if found else -1


def uncertain(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may become part of a stop text."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


class Pieces:
    """Collects drawn tokens and yields Token events whose texts add up to what may be shown, in the order drawn.

    A token is held back while its text could still become part of a stop text, or while its character is unfinished. A
    character that the last token leaves unfinished is not shown."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.shown = ""
        self.stopped = False
        self._text = ""  # of all ids, without an unfinished character
        self._held: list[tuple[int, float, int, int]] = []  # id, ln p, where its text begins and ends in _text

    def add(self, token: int, logp: float) -> Iterator[Token]:
        """Take one drawn token; yield what became certain. Sets `stopped` where a stop text is complete."""
        self.ids.append(token)
        begin = len(self._text)
        self._text = self.tokenizer.decode(self.ids).rstrip("�")
        self._held.append((token, logp, begin, len(self._text)))
        cut = first_stop(self._text, self.stops, len(self.shown))
        if cut >= 0:
            self.stopped = True
            while self._held and self._held[0][2] < cut:
                yield self._show(cut)
            self._held.clear()
            return
        safe = len(self._text) - uncertain(self._text, self.stops)
        while self._held and self._held[0][3] <= safe:
            yield self._show(safe)

    def rest(self) -> Iterator[Token]:
        """What is still held back when nothing more is drawn."""
        while self._held:
            yield self._show(len(self._text))

    def _show(self, limit: int) -> Token:
        token, logp, _, end = self._held.pop(0)
        piece = self._text[len(self.shown):min(end, limit)]
        self.shown += piece
        return Token(piece, token, logp)
