"""The store against a plain dict: random adds, updates, removals, compactions and purges, every version remembered."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from ralm.errors import StoreError, UsageError
from ralm.types import Document
from ralm.what.datastore import Datastore
from ralm.what.rows import clean

names = st.sampled_from(["a", "b", "c", "ä/ö.txt", "it's", "e"])
texts = st.lists(st.sampled_from(["one", "two", "three\x00", "fünf", "\ud800", "  ", "\n"]), max_size=9).map(" ".join)
years = st.none() | st.integers(1990, 1995)
documents = st.builds(lambda id, text, year: Document(id, text, title=f"T{id}", metadata={"year": year}), names, texts, years)


class Store(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = Datastore.create(self.folder / "kb", split="words:2")
        self.now: dict[str, Document] = {}
        self.past: dict[int, dict[str, Document]] = {1: {}}
        self.seen: dict[int, tuple[str, str]] = {}  # chunk id -> (document, text), never to change

    def teardown(self):
        shutil.rmtree(self.folder)

    def remember(self):
        for version in range(max(self.past) + 1, self.store.version):
            self.past[version] = self.past[version - 1]  # a new column, a merge of files: the same documents
        self.past[self.store.version] = dict(self.now)

    @rule(batch=st.lists(documents, max_size=5), size=st.integers(1, 6))
    def add(self, batch, size):
        self.store.add(batch, batch=size)
        if len(batch) <= size:  # several batches make several versions; those in between are checked by the crash tests
            self.now |= {d.id: d for d in batch}
            self.remember()
        else:
            self.now |= {d.id: d for d in batch}
            self.past = {v: d for v, d in self.past.items()} | {self.store.version: dict(self.now)}

    @rule(ids=st.lists(names, min_size=1, max_size=3))
    def remove(self, ids):
        if all(i in self.now for i in ids):
            assert self.store.remove(ids).documents == len(set(ids))
            self.now = {k: d for k, d in self.now.items() if k not in ids}
            self.remember()
        else:
            with pytest.raises(UsageError):
                self.store.remove(ids)

    @rule(year=st.integers(1989, 1996))
    def remove_where(self, year):
        if "year" in self.store.columns():
            gone = {k for k, d in self.now.items() if d.metadata["year"] is not None and d.metadata["year"] < year}
            assert self.store.remove(where=f"year < {year}").documents == len(gone)
            self.now = {k: d for k, d in self.now.items() if k not in gone}
            self.remember()

    @rule()
    def compact(self):
        self.store.compact()
        self.remember()

    @rule()
    def purge(self):
        before = self.store.version
        self.store.compact(purge=True)
        assert self.store.version > before
        alive = set(self.store.chunk_ids().tolist())
        for gone in set(self.seen) - alive:
            with pytest.raises(StoreError, match="has no chunk"):
                self.store.chunks([gone])
        self.seen = {i: c for i, c in self.seen.items() if i in alive}
        self.past = {self.store.version: dict(self.now)}

    @rule()
    def reopen(self):
        self.store = Datastore.open(self.store.path)

    @rule(data=st.data())
    def travel(self, data):
        version = data.draw(st.sampled_from(sorted(self.past)))
        self.check(Datastore.open(self.store.path, version=version), self.past[version])

    @invariant()
    def now_is_now(self):
        self.check(self.store, self.now)
        for id, chunk in zip(self.seen, self.store.chunks(list(self.seen))):
            assert (chunk.document, chunk.text) == self.seen[id]

    def check(self, store: Datastore, want: dict[str, Document]):
        held = {d.id: d for d in store.documents()}
        assert {k: (clean(d.text), d.title, dict(d.metadata)) for k, d in want.items()} == {
            k: (d.text, d.title, dict(d.metadata)) for k, d in held.items()}
        assert len(store) == len(want)
        chunks = store.chunks(store.chunk_ids())
        assert store.n_chunks == len(chunks) and len(store.alive) == store.chunk_rows
        spans: dict[str, list] = {}
        for chunk in chunks:
            assert chunk.text == held[chunk.document].text[chunk.start:chunk.end]
            assert self.seen.setdefault(chunk.id, (chunk.document, chunk.text)) == (chunk.document, chunk.text)
            spans.setdefault(chunk.document, []).append(chunk.text)
        assert {k: " ".join(v).split() for k, v in spans.items()} == {
            k: clean(d.text).split() for k, d in want.items() if d.text.split()}


def test_store_is_a_dict_with_versions():
    run_state_machine_as_test(Store, settings=settings(max_examples=12, stateful_step_count=12, deadline=None,
                                                       suppress_health_check=list(HealthCheck)))


@pytest.mark.slow
def test_store_is_a_dict_with_versions_long():
    run_state_machine_as_test(Store, settings=settings(max_examples=150, stateful_step_count=30, deadline=None,
                                                       suppress_health_check=list(HealthCheck)))
