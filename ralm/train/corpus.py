"""The corpus of a retriever that is trained with a language model: passages of a datastore, texts to mask, questions about it.

    corpus = Corpus(section(recipe, "data", Data), root, run_folder)
    corpus.draw(masker, cut, seed, step, 8)      # 8 masked sentences, a function of seed and step
    corpus.candidates(examples, hits, 7)         # of what an index proposed, without what gives the answer away
    corpus.held_out()                            # questions with answers as HeldOut, None where there are none

    [data]  corpus = ["qa/squad.json.zst", "passages/wiki.jsonl.zst"]   # SQuAD's form, or whatever `ralm ingest` reads
            store = "kb.ralm"                  # or a datastore that is there
            texts = ["news.jsonl.zst"]         # what is masked, where that is not the corpus itself
            split = "markdown:400"             # how documents are cut
            documents = 0                      # of each corpus file, evenly spread; 0: all
            train = ["qa/squad.json.zst"]      # questions to learn from (realm-qa), about paragraphs of the corpus
            held_out = ["qa/dev.json.zst"]     # questions; their paragraphs are in the corpus, but no text of theirs is masked
            questions = 0                      # of the held-out ones, evenly spread; 0: all
            masks = 0                          # sentences of the held-out paragraphs that are masked in an evaluation"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ralm.errors import ReadError, UsageError
from ralm.eval.files import opened
from ralm.lm.masked import Masked
from ralm.train.heldout import HeldOut
from ralm.train.pairs import Pairs, read_pairs
from ralm.train.salient import Masker
from ralm.types import Chunk, Document, Hits
from ralm.what.datastore import Datastore
from ralm.what.split import split

SPARE = 8  # proposals beyond those asked for: some give the answer away
KNOWN = 200_000  # passages kept in memory


@dataclass(frozen=True)
class Data:
    corpus: list
    texts: list
    train: list
    held_out: list
    store: str = ""
    split: str = "markdown:400"
    documents: int = 0
    questions: int = 0
    masks: int = 0


class Example(NamedTuple):
    """A masked sentence, as it stood, and the passage it is from."""

    row: Masked
    sentence: str
    chunk: int


class Corpus:
    def __init__(self, data: Data, root: Path, folder: Path):
        if bool(data.store) == bool(data.corpus or data.held_out or data.train):
            raise UsageError("[data] gives store and corpus files, or neither: give a datastore, or files that one is made of")
        self.data, self.root, self.held = data, root, set()
        if data.store:
            self.store = Datastore.open(root / data.store)
        else:
            self.store = self._made(folder)
        self.ids = self.store.chunk_ids()
        self.documents = np.array(self.store.document_ids(self.ids.tolist()), object)
        self.free = self.ids[[d not in self.held for d in self.documents]]
        self.reserved = self.ids[[d in self.held for d in self.documents]]
        if not len(self.free) and not data.texts:
            raise UsageError(f"{self.store.path} holds no passage to train on; give [data] corpus")
        self._known: dict[int, Chunk] = {}
        self.x = [c for name in data.texts for d in documents(root / name) for c in _cut(d, data.split)]

    def _made(self, folder: Path) -> Datastore:
        """The datastore of the recipe's files in the run's folder, under a hash of what it holds; a begun one is finished."""
        wanted: dict[str, Document] = {}
        for name in self.data.held_out:
            some = list(documents(self.root / name))
            self.held |= {d.id for d in some}
            wanted |= {d.id: d for d in some}
        for name in (n for n in self.data.train if n not in self.data.corpus):
            wanted |= {d.id: d for d in documents(self.root / name)}
        for name in self.data.corpus:
            some = list(documents(self.root / name))
            step = max(1.0, len(some) / self.data.documents) if self.data.documents else 1.0
            wanted |= {d.id: d for d in (some[int(i * step)] for i in range(int(len(some) / step))) if d.id not in wanted}
        digest = hashlib.sha256(json.dumps([self.data.split, [(d.id, d.title, d.text) for d in wanted.values()]]).encode())
        path = folder / f"corpus-{digest.hexdigest()[:12]}.ralm"
        store = Datastore.open(path) if (path / "store.json").is_file() else None
        done = store is not None and len(store) == len(wanted)
        return store if done else Datastore.build(path, wanted.values(), self.data.split)

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """Passages by id, remembered."""
        new = [i for i in dict.fromkeys(map(int, ids)) if i not in self._known]
        if new:
            if len(self._known) + len(new) > KNOWN:
                self._known.clear()
                new = list(dict.fromkeys(map(int, ids)))
            self._known |= dict(zip(new, self.store.chunks(new)))
        return [self._known[int(i)] for i in ids]

    def texts(self) -> list[str]:
        """Every passage, as index/dense encodes it, in the order of `ids`."""
        return [whole(c) for c in self.chunks(self.ids)] if len(self.ids) <= KNOWN else [
            whole(c) for at in range(0, len(self.ids), 4096) for c in self.store.chunks(self.ids[at:at + 4096].tolist())]

    # ---- masked sentences

    def draw(self, masker: Masker, cut: Callable[..., Masked | None], seed: int, step: int, count: int,
             held: bool = False) -> list[Example]:
        """`count` masked sentences of the free passages (held: of the reserved ones): the same for the same seed and step."""
        rng, among = np.random.default_rng([seed, step, 11 + held]), self.reserved if held else self.free
        out: list[Example] = []
        for _ in range(50):
            for chunk in (self.chunks(rng.choice(among, 2 * count)) if held or not self.x else
                          [self.x[i] for i in rng.integers(len(self.x), size=2 * count)]):
                if (drawn := masker.draw(chunk.text, rng)) is None:
                    continue
                (start, end, _), spans = drawn
                sentence = chunk.text[start:end]
                if (row := cut(sentence, [(a - start, b - start) for a, b in spans])) is not None:
                    out.append(Example(row, sentence, chunk.id))
                    if len(out) == count:
                        return out
        raise UsageError(f"{self.store.path} has hardly a sentence to mask ({len(out)} of {count} found): use another kind of "
                         "masking ([masking] kind), or longer passages ([data] split)")

    def candidates(self, examples: Sequence[Example], hits: Hits, k: int) -> list[list[Chunk]]:
        """Of each example's proposals the first k that are no trivial ones: not the passage it was taken from, nor another that
        holds the unmasked sentence (overlapping passages, copies). Fewer where fewer were proposed."""
        found = self.chunks(np.unique(hits.ids[hits.ids >= 0]))
        by_id = {c.id: c for c in found}
        out = []
        for example, row in zip(examples, hits.ids.tolist()):
            some = (by_id[i] for i in row if i >= 0 and i != example.chunk)
            sentence = squeezed(example.sentence)
            out.append([c for c in some if sentence not in squeezed(c.text)][:k])
        return out

    # ---- questions

    def asked(self, names: Sequence[str]) -> Pairs:
        """The questions of some files, asked of the whole corpus; positives are the passages of its own paragraph that hold an
        answer, or the whole paragraph where none does."""
        pairs, place = Pairs(), {}
        for c in self.chunks(self.ids):
            place[c.id] = pairs.passage(c.title, c.text)  # copies are one
        rows: dict[str, list[int]] = {}
        for i, d in zip(self.ids.tolist(), self.documents):
            rows.setdefault(d, []).append(i)
        for name in names:
            given = read_pairs(self.root / name)
            own = [d.id for d in documents(self.root / name)]
            for question, good, answers in zip(given.queries, given.positives, given.answers):
                some = self.chunks([i for g in good for i in rows.get(own[g], ())])
                right = [c for c in some if any(a in c.text for a in answers)] or some
                if right:
                    pairs.add(question, [place[c.id] for c in right], answers=answers)
        return pairs

    def held_out(self) -> HeldOut | None:
        return HeldOut(self.asked(self.data.held_out), limit=self.data.questions) if self.data.held_out else None


def _cut(d: Document, spec: str) -> list[Chunk]:
    """The passages of a document that is in no datastore; their number is that of none."""
    return [Chunk(-1, d.id, a, b, d.text[a:b], d.title, d.source) for a, b in split(spec)(d.text)]


def whole(c: Chunk) -> str:
    """As index/dense encodes a passage."""
    return f"{c.title}\n{c.text}" if c.title else c.text


def squeezed(text: str) -> str:
    return " ".join(text.split())


def documents(path: Path) -> Iterator[Document]:
    """The documents of a file: the paragraphs of SQuAD's form in order, or whatever `ralm ingest` reads.

    Raises ReadError for a file that is absent or holds none."""
    if ".json" in path.suffixes:
        with opened(path) as file:
            try:
                data = json.loads(file.read())
            except ValueError as e:
                raise ReadError(f"{path} is not JSON ({e})") from e
        if isinstance(data, dict) and isinstance(data.get("data"), list):
            for n, p in enumerate(read_pairs(path).passages):
                yield Document(f"{path.name}/{p.title}/{n}", p.text, title=p.title)
            return
    from ralm.what.read import read

    yield from read(str(path))
