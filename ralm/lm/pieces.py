"""From tokens to text that can be shown: whole characters only, and nothing that may turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ralm.types import Token, Tokenizer


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
        cut = min((at for s in self.stops if (at := self._text.find(s, len(self.shown))) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            while self._held and self._held[0][2] < cut:
                yield self._show(cut)
            self._held.clear()
            return
        ends = (n for s in self.stops for n in range(1, len(s)) if self._text.endswith(s[:n]))
        safe = len(self._text) - max(ends, default=0)
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
