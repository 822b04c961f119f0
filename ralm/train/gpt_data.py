"""Text for the bundled LM: read, tidied, encoded once, and dealt out in rows that depend on nothing but seed and counter.

A row is [END, tokens]: what scoring sees, one BOS per window. A share of the rows begins with evidence, a passage from
elsewhere in the same document that shares rare words with the text, written as `Prepend` writes one (title, newline,
passage, newline): so the model learns at its own length that what stands in front is worth reading. In some of these rows the
passage is a piece of the text itself: nothing teaches a small model sooner to look back and copy (Olsson et al. 2022)."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ralm.lm.gpt import BPE


def read_lines(path: Path) -> Iterator[dict]:
    """Records of a .jsonl.zst file."""
    import zstandard

    with path.open("rb") as raw:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), "utf-8"):
            yield json.loads(line)


def read_text(path: Path) -> str:
    """A whole .txt.zst file."""
    import zstandard

    with path.open("rb") as raw:
        return zstandard.ZstdDecompressor().stream_reader(raw).read().decode("utf-8")


def documents(path: Path) -> Iterator[tuple[str, str]]:
    """(title, text): line ends are newlines, never more than two; "Title: A_B" heads of articles become "A B"."""
    for record in read_lines(path):
        text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]*\r?\n", "\n", record["text"])).strip()
        head, _, rest = text.partition("\n")
        if head.startswith("Title: "):
            title = head[7:].replace("_", " ")
            yield title, f"{title}\n{rest}"
        else:
            yield Path(record.get("path") or record.get("file")).stem, text


def spaced(title: str, text: str) -> str:
    """An article in the surface form of WikiText: spaces around punctuation, " @-@ ", " = Heading = " lines."""
    lines = text.split("\n")[1:]
    out = [f" \n = {title} = \n \n"]
    for line in filter(None, (l.strip() for l in lines)):
        if len(line) < 60 and line[-1].isalnum() and line[0].isupper() and len(line.split()) < 8:
            out.append(f" = = {line} = = \n \n")
            continue
        line = re.sub(r"(\d)([.,])(?=\d)", r"\1 @\2@ ", line)
        line = re.sub(r"(\w)-(?=\w)", r"\1 @-@ ", line)
        line = re.sub(r"(?<!@)([,;:!?()\[\]\"“”])(?!@)", r" \1 ", line)
        line = re.sub(r"\.(?=[ )\"”]|$)(?<!\b[A-Z]\.)", " .", line)
        line = re.sub(r"(?<=\w)('s|n't|')(?=\W|$)", r" \1", line)
        out.append(" " + re.sub(r" +", " ", line).strip() + " \n")
    return "".join(out)


@dataclass(frozen=True)
class Stream:
    """The documents of one source as one row of token ids, each document followed by END."""

    name: str
    ids: np.ndarray  # uint16 [N]
    starts: np.ndarray  # int64 [documents + 1]
    titles: list[np.ndarray]  # uint16, encoded with the newline after them

    @staticmethod
    def make(name: str, texts: list[tuple[str, str]], bpe: BPE, end: int) -> Stream:
        parts, titles, starts = [], [], [0]
        for at in range(0, len(texts), 16):  # in batches: the tokenizer then uses every core
            encoded = bpe.inner.encode_batch_fast([text for _, text in texts[at:at + 16]], add_special_tokens=False)
            parts += [np.array([*e.ids, end], np.uint16) for e in encoded]
        for (title, _), part in zip(texts, parts):
            titles.append(np.array(bpe.encode(f"{title}\n"), np.uint16))
            starts.append(starts[-1] + len(part))
        return Stream(name, np.concatenate(parts), np.array(starts), titles)


class Rows:
    """Deals rows of `length` + 1 tokens. Row n of a source is the same whatever happened before, so a run can be resumed.

    share: of the rows, by source. evidence: share of the rows that begin with a passage of at most `most` tokens; copies: share
    of all rows (part of those) whose passage is a piece of the text."""

    def __init__(self, streams: list[Stream], share: list[float], length: int, end: int, newline: list[int], vocab: int,
                 evidence: float, most: int, seed: int, copies: float = 0.0):
        self.streams, self.length, self.end, self.seed = streams, length, end, seed
        self.share = np.array(share) / sum(share)
        self.copies, self.evidence, self.most, self.newline = copies, evidence, most, np.array(newline, np.uint16)
        count = sum((np.bincount(s.ids, minlength=vocab) for s in streams), np.zeros(vocab, np.int64))
        self.rare = np.maximum(0.0, np.log(count.sum() / (count + 1.0)) - 5.0)  # the commonest ~150 tokens weigh nothing

    def batch(self, step: int, size: int, dealt: list[int]) -> np.ndarray:
        """Rows [size, length + 1] of this step; `dealt` counts the rows each source has given and is advanced."""
        rng = np.random.default_rng([self.seed, step])
        rows = []
        for source in rng.choice(len(self.streams), size, p=self.share):
            rows.append(self.row(self.streams[source], source, dealt[source], rng))
            dealt[source] += 1
        return np.stack(rows)

    def row(self, stream: Stream, source: int, n: int, rng: np.random.Generator) -> np.ndarray:
        """Row n of a source: every epoch cuts the stream at another offset and shuffles the pieces."""
        usable = len(stream.ids) - self.length
        pieces = max(1, usable // self.length)
        epoch, at = divmod(n, pieces)
        order = np.random.default_rng([self.seed, source, epoch])
        offset = int(order.integers(min(self.length, usable)))
        start = offset + int(order.permutation(pieces)[at]) * self.length
        start = min(start, usable)
        text = stream.ids[start:start + self.length]
        luck = rng.random()
        front = self._evidence(stream, start, text, luck < self.copies, rng) if luck < self.evidence else text[:0]
        return np.concatenate([[self.end], front, text])[:self.length + 1].astype(np.int64)

    def _evidence(self, stream: Stream, start: int, text: np.ndarray, copy: bool, rng: np.random.Generator) -> np.ndarray:
        """Of 32 passages drawn from the same document, not touching the text, the one that shares most rare tokens with it;
        or, as a copy, one from the part of the text that follows in the row."""
        which = int(np.searchsorted(stream.starts, start, "right")) - 1
        low, high = stream.starts[which], stream.starts[which + 1] - 1
        size = int(rng.integers(self.most // 4, self.most))
        if copy:
            room = self.length - 2 * size - len(stream.titles[which]) - len(self.newline)  # the row cuts the text off
            begin = int(rng.integers(0, room)) if room > 0 else 0
            return np.concatenate([stream.titles[which], text[begin:begin + size], self.newline])
        begins = rng.integers(low, max(low + 1, high - size), 32)
        begins = begins[(begins + size <= start) | (begins >= start + self.length)]
        if not len(begins) or high - low < size:
            return text[:0]
        weight = np.zeros_like(self.rare)
        asked = text[:self.length - size]
        weight[asked] = self.rare[asked]
        scores = [weight[np.unique(stream.ids[b:b + size])].sum() for b in begins]
        best = int(begins[int(np.argmax(scores))])
        return np.concatenate([stream.titles[which], stream.ids[best:best + size], self.newline])
