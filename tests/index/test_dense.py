"""Dense retrieval against brute force in float64, on real datastores, and its promises: laws 7 and 8, filters, unions, damage."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralm import index
from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.index import ann, dense, exact, manifest, vectors
from ralm.index.dense import Dense
from ralm.index.static import unit
from ralm.testing import check_retriever
from ralm.types import Document
from ralm.what.datastore import Datastore

CHILD = Path(__file__).with_name("encode_child.py")
QUERIES = ["return a list of names", "open a file and read its lines", "the cat sat on the mat", "abstract method"]


def make(path, texts, first=0):
    documents = [Document(f"d{i}", t, metadata={"number": i, "even": i % 2 == 0}) for i, t in enumerate(texts, first)]
    return Datastore.build(path, documents, split="none")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, paragraphs, table):
    """1,500 paragraphs with their vectors; not to be changed by a test (see `copy`)."""
    store = make(tmp_path_factory.mktemp("corpus") / "kb", paragraphs[:1500])
    Dense(store, table)
    return store


@pytest.fixture
def copy(corpus, tmp_path):
    shutil.copytree(corpus.path, tmp_path / "kb")
    return Datastore.open(tmp_path / "kb")


def brute(store, retriever, queries, k, where=None, exclude=()):
    """Cosine by hand: every allowed chunk's text encoded alone, stored as float16, products in float64."""
    model = retriever._opened().leaves[0].encoder
    allowed, ids, out = store.allow(where, exclude), store.chunk_ids(), []
    x_ND = model.encode([c.text for c in store.chunks(ids.tolist())]).astype(np.float16).astype(np.float64)
    for q in model.encode(queries, role="query").astype(np.float64):
        s = (x_ND * q).sum(1).astype(np.float32)
        order = [i for i in np.lexsort((ids, -s)) if allowed[ids[i]]][:k] if q.any() else []
        out.append((ids[order], s[order]))
    return out


def agree(hits, truth):
    for q, (ids, scores) in enumerate(truth):
        row = hits.row(q)
        assert row.ids[0].tolist() == ids.tolist()
        assert (row.scores[0] == scores).all()


# ---- exact ----------------------------------------------------------------------------------------------------------


def test_exact_search_is_brute_force_with_and_without_filters(corpus):
    found = Dense(corpus)
    assert found.recall == 1 and "flat" in repr(found)
    for where, exclude in ((None, ()), ("number < 40", ()), ("even = true and number > 700", ("d702", "d704"))):
        agree(found.search(QUERIES, 7, where, exclude), brute(corpus, found, QUERIES, 7, where, exclude))
        check_retriever(found, QUERIES, where=where)
    assert found.search([], 3).ids.shape == (0, 3) and found.search(QUERIES, 0).ids.shape == (4, 0)
    with pytest.raises(UsageError, match="one text"):
        found.search("a text")
    with pytest.raises(UsageError, match="at least 0"):
        found.search(QUERIES, -1)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 700), q=st.integers(1, 9), k=st.integers(1, 40),
       block=st.sampled_from([7, 64, 4096]), share=st.sampled_from([None, 0.02, 0.3, 0.9]), few=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exact_top_equals_numpy_for_any_blocks_ties_and_masks(monkeypatch, seed, n, q, k, block, share, few):
    monkeypatch.setattr(exact, "BLOCK", block)
    rng = np.random.default_rng(seed)
    x = unit(rng.standard_normal((n, 24))).astype(np.float16)
    if few:  # many equal vectors: the tie rule decides
        x = x[rng.integers(0, min(n, 3), n)]
    rows = InMemory(x)
    queries = unit(np.concatenate([rng.standard_normal((q, 24)), x[:1]]))
    allowed = None if share is None else rng.random(n) < share
    ids, scores = exact.top(rows, queries, k, allowed)
    true = (x[None].astype(np.float64) * queries[:, None]).sum(2).astype(np.float32)
    for i in range(len(queries)):
        order = [r for r in np.lexsort((np.arange(n), -true[i])) if allowed is None or allowed[r]][:k]
        assert ids[i].tolist() == order + [-1] * (k - len(order))
        assert (scores[i][:len(order)] == true[i][order]).all()


@given(seed=st.integers(0, 10_000), dim=st.integers(1, 1100), n=st.integers(1, 40), k=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_scores_are_numpys_sums_bit_by_bit(seed, dim, n, k):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, dim)) * 10.0 ** rng.integers(-8, 1, (n, dim))).astype(np.float16)  # subnormal ones among them
    q = rng.standard_normal((3, dim)).astype(np.float32)
    q[1] = 0
    near = np.where(rng.random((3, n)) < 0.8, np.argsort(rng.random((3, n)), 1), -1)
    allowed, ids = rng.random(n) < 0.9, np.cumsum(rng.integers(1, 9, n))
    products = x.astype(np.float64) * q[:, None].astype(np.float64)
    true = products.sum(2)
    assert all(exact._sum(p, exact._plan(dim), np.empty(9)) == t for p, t in zip(products[0], true[0]))
    whole = InMemory(x)
    whole.maps, whole.starts = [x], np.array([0, n])
    for rows in (InMemory(x), whole):
        found, scores, least = exact.score(rows, q, near, k, allowed, ids)
        for i in range(3):
            kept = [r for r in near[i] if r >= 0 and allowed[r] and i != 1]
            order = sorted(kept, key=lambda r, i=i: (-np.float32(true[i, r]), r))[:k]
            assert found[i].tolist() == ids[order].tolist() + [-1] * (k - len(order))
            assert (scores[i, :len(order)] == true[i, order].astype(np.float32)).all() and np.isneginf(scores[i, len(order):]).all()
        assert least == min((found >= 0).sum(1))


class InMemory(vectors.Rows):
    def __init__(self, x):
        half = len(x) // 3
        self.maps, self.starts = [x[:half], x[half:]], np.array([0, half, len(x)])
        self.dim, self.ids = x.shape[1], np.arange(len(x))


def test_scores_do_not_depend_on_company(corpus):
    found = Dense(corpus)
    together = found.search(QUERIES, 20)
    for q, query in enumerate(QUERIES):
        alone = found.search([query], 20)
        assert (alone.ids[0] == together.ids[q]).all() and (alone.scores[0] == together.scores[q]).all()
        narrow = found.search([query], 20, where="number < 700")
        common = np.isin(narrow.ids[0], together.ids[q])
        assert set(zip(narrow.ids[0][common].tolist(), narrow.scores[0][common].tolist())) <= set(
            zip(together.ids[q].tolist(), together.scores[q].tolist()))


def test_equal_texts_tie_by_id_and_unknown_words_score_zero_and_find_nothing(tmp_path, table):
    store = make(tmp_path / "kb", ["a cat", "㍿㍿", "a dog", "a cat", "", "a cat"])
    hits = Dense(store, table).search(["a cat", "㍿"], 6)
    same = [c.id for c in store.chunks(hits.row(0).ids[0].tolist()) if c.text == "a cat"]
    assert hits.ids[0][:3].tolist() == same == sorted(same)
    strange = next(c.id for c in store.chunks(store.chunk_ids().tolist()) if c.text == "㍿㍿")
    assert hits.scores[0][hits.ids[0] == strange].tolist() == [0.0]
    assert (hits.ids[1] == -1).all() and np.isneginf(hits.scores[1]).all()
    assert not np.isnan(hits.scores).any()


def test_an_empty_store_and_an_emptied_one(tmp_path, table):
    store = Datastore.create(tmp_path / "kb", split="none")
    found = Dense(store, table)
    assert (found.search(["a"], 3).ids == -1).all()
    store.add([Document("a", "one text"), Document("b", "another")])
    assert (found.search(["a text"], 3).ids[0] >= 0).sum() == 2
    store.remove(["a", "b"])
    assert (found.search(["a text"], 3).ids == -1).all()


def test_minilm_over_a_real_store_finds_what_is_meant_and_titles_are_read(tmp_path):
    store = Datastore.build(tmp_path / "kb", [
        Document("a", "It rose to power in the fourth century and fell in the seventh.", "Kingdom of Aksum"),
        Document("b", "A feline rested upon the rug.", "Pets"),
        Document("c", "Interest rates were raised by the central bank.", "Economy"),
    ], split="none")
    found = Dense(store)
    ids = found.search(["Where did the cat sit?", "monetary policy", "history of Aksum"], 1).ids[:, 0]
    assert store.document_ids(ids.tolist()) == ["b", "c", "a"]
    plain = Dense(store, "minilm", name="plain", title=False)
    aksum = ["history of Aksum"]
    assert found.search(aksum, 1).scores[0, 0] > plain.search(aksum, 3).scores[0].max() + 0.1
    with pytest.raises(FingerprintError, match="title"):
        Dense(store, name="plain", title=True)


# ---- growing (law 8) ------------------------------------------------------------------------------------------------


def state(store, name="dense"):
    """What the vectors of a store are, whatever parts they lie in."""
    folder = store.path / "index" / name
    rows = vectors.Rows(folder, manifest.load(folder))
    return rows.ids.tolist(), rows.take(np.arange(len(rows))).tobytes()


def test_appending_in_pieces_equals_one_build_and_costs_only_the_new_rows(tmp_path, paragraphs, table, monkeypatch):
    whole = make(tmp_path / "whole", paragraphs[:600])
    Dense(whole, table)
    parts = make(tmp_path / "parts", paragraphs[:100])
    found, counted = Dense(parts, table), []
    encode = vectors.Static.encode
    monkeypatch.setattr(vectors.Static, "encode", lambda self, texts, **kw: counted.append(len(texts)) or encode(self, texts, **kw))
    for a in range(100, 600, 50):
        parts.add([Document(f"d{i}", paragraphs[i], metadata={"number": i, "even": i % 2 == 0}) for i in range(a, a + 50)])
        index.update(parts)
    assert counted == [50] * 10
    assert state(parts) == state(whole)
    sizes = [p.rows for p in manifest.load(parts.path / "index" / "dense").parts]
    assert len(sizes) <= 6 and sum(sizes) == 600  # neighbours merge
    ours, theirs = found.search(QUERIES, 9), Dense(whole).search(QUERIES, 9)
    assert (ours.ids == theirs.ids).all() and (ours.scores == theirs.scores).all()


@pytest.mark.parametrize("step", [2, 5])
def test_killed_while_encoding_and_resumed_equals_uninterrupted(tmp_path, paragraphs, table, step):
    stores = [make(tmp_path / name, paragraphs[:600]) for name in ("killed", "whole")]
    killed = subprocess.run([sys.executable, str(CHILD), str(stores[0].path), table, str(step)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    found = manifest.load(stores[0].path / "index" / "dense")
    assert found.stop == 128 * ((step - 1) // 2)  # units of 64, committed by twos
    for store in stores:
        Dense(store, table)
    assert state(stores[0]) == state(stores[1])
    named = {p.name for p in manifest.load(stores[0].path / "index" / "dense").parts if p.files}
    there = {p.name for p in (stores[0].path / "index" / "dense").iterdir() if p.is_dir()}
    assert there == named  # what the killed one left half-written is gone


def test_reopening_needs_no_encoder_named_and_changes_nothing(corpus, table):
    before = (corpus.path / "index" / "dense" / "manifest.json").read_bytes()
    assert (Dense(corpus).search(QUERIES, 5).ids == Dense(corpus, table).search(QUERIES, 5).ids).all()
    assert (corpus.path / "index" / "dense" / "manifest.json").read_bytes() == before
    assert index.retriever("dense", corpus).search(QUERIES, 1).ids.shape == (4, 1)


def test_a_read_only_store_can_be_searched_and_says_what_it_cannot_do(corpus):
    """As a user who may read and not write: root becomes nobody for it (and the tests' own folder is closed to nobody)."""
    right, root = Dense(corpus).search(QUERIES, 3), os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        complete, behind = Path(folder) / "complete", Path(folder) / "behind"
        shutil.copytree(corpus.path, complete)
        shutil.copytree(corpus.path, behind)
        Datastore.open(behind).add([Document("new", "a new text")])
        everything = [Path(folder), *Path(folder).rglob("*")]
        for p in everything:
            p.chmod(0o555 if p.is_dir() else 0o444)
        try:
            if root:
                os.seteuid(65534)
            assert (Dense(Datastore.open(complete)).search(QUERIES, 3).ids == right.ids).all()
            with pytest.raises(StoreError, match="cannot"):
                Dense(Datastore.open(behind))
            with pytest.raises(StoreError, match="cannot"):
                Dense(Datastore.open(complete), index="hnsw", name="other")
        finally:
            if root:
                os.seteuid(0)
            for p in everything:
                p.chmod(0o755)


# ---- forgetting (law 7) ---------------------------------------------------------------------------------------------


def test_removed_documents_are_not_found_and_compact_drops_their_vectors(copy):
    found = Dense(copy)
    first = found.search(QUERIES, 10)
    gone = copy.document_ids(np.unique(first.ids[:, :4]).tolist())
    copy.remove(gone)
    agree(found.search(QUERIES, 10), brute(copy, found, QUERIES, 10))
    after = found.search(QUERIES, 10)
    assert not np.isin(after.ids, first.ids[:, :4]).any()
    old = Dense(Datastore.open(copy.path, version=copy.version - 1))
    assert (old.search(QUERIES, 10).ids == first.ids).all()  # the version before has them still
    copy.compact(purge=True)
    index.compact(copy)
    ids, _ = state(copy)
    assert ids == copy.chunk_ids().tolist() and not np.isin(first.ids[:, :4], ids).any()
    again = Dense(copy).search(QUERIES, 10)
    assert (again.ids == after.ids).all() and (again.scores == after.scores).all()
    copy.add([Document("late", "return a list of names of the cats")])
    assert copy.document_ids(Dense(copy).search(["return a list of names of the cats"], 1).ids[0].tolist()) == ["late"]


# ---- approximate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivfpq"])
def test_approximate_kinds_reach_their_recall_and_score_exactly(copy, paragraphs, kind, monkeypatch):
    monkeypatch.setattr(dense, "NARROW", 50)
    truth, near = Dense(copy), Dense(copy, index=kind)
    facts = manifest.load(copy.path / "index" / "dense").facts["ann"]
    assert facts["kind"] == kind and facts["rows"] == 1500 and facts["recall@10"] == near.recall >= ann.TARGET
    queries = [" ".join(p.split()[2:9]) for p in paragraphs[1500:1700]]
    for where in (None, "number < 900", "number < 120", "number < 30"):
        right, ours = truth.search(queries, 10, where), near.search(queries, 10, where)
        recall = np.mean([np.isin(a, b).mean() for a, b in zip(right.ids, ours.ids)])
        assert recall > near.recall - 0.05
        assert (ours.ids >= 0).sum() == (right.ids >= 0).sum()  # k hits wherever k are allowed
        for q in range(len(queries)):
            known = dict(zip(right.ids[q].tolist(), right.scores[q].tolist()))
            assert all(known[i] == s for i, s in zip(ours.ids[q].tolist(), ours.scores[q].tolist()) if i in known)
        check_retriever(near, queries[:3], where=where)
    assert "flat" in repr(Dense(copy, index="flat")) and kind in repr(Dense(copy))  # asked for flat: exact, nothing is made anew


def test_a_filter_is_worked_out_once_and_another_one_anew(copy, monkeypatch):
    monkeypatch.setattr(dense, "NARROW", 50)
    found = Dense(copy, index="hnsw")
    leaf, everything, few = found._opened().leaves[0], copy.allow(), copy.allow("number < 700")
    assert leaf.filter(few) is leaf.filter(few) and leaf.filter(everything).filter is None and leaf.filter(few).count == 700
    assert leaf.filter(few).selector(1500)[1] == 700 and leaf.filter(few).selector(100)[1] == leaf.mask(few)[:100].sum()
    loose = few.copy()  # may be changed by its owner: never remembered
    assert leaf.filter(loose) is not leaf.filter(loose)
    before = found.search(QUERIES, 5, "number < 700")
    copy.remove(copy.document_ids(before.ids[:, 0].tolist()))
    assert not np.isin(found.search(QUERIES, 5, "number < 700").ids, before.ids[:, 0]).any()


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_where_few_are_gone_hits_are_those_of_a_search_that_asks_at_every_row(copy, monkeypatch, kind):
    monkeypatch.setattr(dense, "NARROW", 50)
    near = Dense(copy, index=kind)
    first = near.search(QUERIES[:1], 40)
    copy.remove(copy.document_ids(first.ids[0].tolist()))  # 40 of 1,500: nearly all are allowed, none of what FAISS finds first is
    leaf = near._opened().leaves[0]
    allowed, q_QD = leaf.filter(copy.allow()), leaf.encode(QUERIES)
    assert 0 < 1 - allowed.count / 1500 < ann.LOOSE
    assert np.isin(leaf.ids[leaf.near.search(q_QD[:1], 10, allowed)], first.ids).all()
    ours, asking = near.search(QUERIES, 10), leaf._near(q_QD, 10, allowed, None, strict=True)
    assert (ours.ids >= 0).all() and not np.isin(ours.ids, first.ids).any()
    assert (ours.ids == asking.ids).all() and (ours.scores == asking.scores).all()


def test_query_vectors_of_another_length_are_refused(copy):
    for kind in ("flat", "hnsw"):
        with pytest.raises(UsageError, match=r"\[2, 3\].*\[Q, \d+\]"):
            Dense(copy, index=kind).nearest(np.ones((2, 3), np.float32))


def test_an_approximate_index_grows_by_its_tail_and_forgets(copy, paragraphs, monkeypatch):
    monkeypatch.setattr(dense, "NARROW", 50)
    monkeypatch.setattr(ann, "TAIL", 150)
    near = Dense(copy, index="hnsw")
    copy.add([Document(f"n{i}", t, metadata={"number": 5000}) for i, t in enumerate(paragraphs[1500:1600])])
    hits = near.search(paragraphs[1500:1600], 1)  # in the tail, which is searched exactly
    assert copy.document_ids(hits.ids[:, 0].tolist()) == [f"n{i}" for i in range(100)]
    assert near._opened().leaves[0].near.rows == 1500
    copy.add([Document("n100", "one hundred and first"), *(Document(f"m{i}", f"text {i} " * (i % 7 + 1)) for i in range(60))])
    assert near._opened().leaves[0].near.rows == 1661  # over TAIL: taken into the graph
    hits = near.search(paragraphs[1500:1600], 1)
    assert np.mean([a == f"n{i}" for i, a in enumerate(copy.document_ids(hits.ids[:, 0].tolist()))]) > 0.95
    gone = [f"n{i}" for i in range(0, 100, 2)]
    copy.remove(gone)
    assert not set(copy.document_ids(np.unique(near.search(paragraphs[1500:1600], 10).ids).tolist())) & set(gone)
    copy.compact(purge=True)
    index.compact(copy)
    again = Dense(copy)
    assert again._opened().leaves[0].near.rows == len(copy) == 1611
    check_retriever(again, QUERIES)


def test_auto_takes_an_index_when_there_are_many_rows(copy, monkeypatch):
    assert [ann.kind_of("auto", n) for n in (10, 100_000, 100_001, 5_000_000)] == ["flat", "flat", "hnsw", "ivfpq"]
    monkeypatch.setattr(ann, "FLAT", 1000)
    assert "hnsw" in repr(Dense(copy))
    with pytest.raises(UsageError, match=r"unknown dense index 'hnws'.*hnsw"):
        Dense(copy, index="hnws")


def test_faiss_flat_finds_the_same(corpus):
    """The oracle of the field: FAISS's own exact index over the same vectors."""
    import faiss

    found = Dense(corpus)
    leaf = found._opened().leaves[0]
    flat = faiss.IndexFlatIP(leaf.rows.dim)
    flat.add(leaf.rows.take(np.arange(len(leaf.rows))).astype(np.float32))
    scores, rows = flat.search(leaf.encode(QUERIES), 10)
    ours = found.search(QUERIES, 10)
    np.testing.assert_allclose(ours.scores, scores, atol=1e-6)
    assert (leaf.ids[rows] == ours.ids).mean() > 0.9  # ties and last digits aside


# ---- unions, mismatches, damage -------------------------------------------------------------------------------------


def test_a_union_is_searched_as_one(tmp_path, paragraphs, table):
    whole = make(tmp_path / "whole", paragraphs[:300])
    a, b = make(tmp_path / "a", paragraphs[:120]), make(tmp_path / "b", paragraphs[120:300], first=120)
    union = Datastore.union(a, b)
    ours, theirs = Dense(union, table), Dense(whole, table)
    for where in (None, "number > 100 and number < 150"):
        found, right = ours.search(QUERIES, 8, where), theirs.search(QUERIES, 8, where)
        assert (found.scores == right.scores).all()
        texts = [[c.text for c in s.chunks(row.tolist())] for s, h in ((union, found), (whole, right)) for row in h.ids]
        assert texts[:4] == texts[4:]
        check_retriever(ours, QUERIES, where=where)


def test_another_encoder_is_refused_naming_both_and_may_live_beside(copy, table, tiny):
    with pytest.raises(FingerprintError, match=r"encoder = 'm2v:.*'st:.*rebuild"):
        Dense(copy, f"st:{tiny}")
    before = Dense(copy).search(QUERIES, 3)
    other = Dense(copy, f"st:{tiny}", name="tiny")
    assert index.built(copy) == ["dense", "dense-tiny"]
    assert "st:" in repr(other) and (Dense(copy, name="tiny").search(QUERIES, 3).ids == other.search(QUERIES, 3).ids).all()
    assert (Dense(copy).search(QUERIES, 3).ids == before.ids).all()
    copy.add([Document("new", "a new text")])
    index.update(copy)
    assert {manifest.load(copy.path / "index" / n).stop for n in index.built(copy)} == {copy.chunk_rows}


def test_a_model_that_changed_under_its_name_is_refused(tmp_path, tiny):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    store = make(tmp_path / "kb", ["the cat sat", "the dog"])
    Dense(store, f"st:{model}").search(["cat"], 1)
    weights = next(model.rglob("model.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(FingerprintError, match="weights or tokenizer changed"):
        Dense(store).search(["cat"], 1)


def test_a_foreign_index_and_damaged_files_are_refused(copy, tmp_path, monkeypatch):
    other = make(tmp_path / "other", ["a", "b"])
    shutil.copytree(copy.path / "index", other.path / "index")
    with pytest.raises(FingerprintError, match="datastore"):
        Dense(other)
    folder = copy.path / "index" / "dense"
    part = next(p for p in manifest.load(folder).parts if "vectors.npy" in p.files)
    file = folder / part.name / "vectors.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-10])
    with pytest.raises(StoreError, match="bytes"):
        Dense(copy)
    file.write_bytes(good[:200] + os.urandom(len(good) - 200))
    with pytest.raises(StoreError, match=r"vectors.npy is not what was written .*ralm index .* --index dense:m2v:.* --rebuild"):
        Dense(copy)
    with monkeypatch.context() as unchecked, pytest.raises(StoreError, match="lengths"):
        unchecked.setattr("ralm.what.sums.differing", lambda *a: iter(()))
        Dense(copy)
    file.write_bytes(good)
    Dense(copy, index="hnsw")
    turned = np.load(file)[::-1].copy()
    np.save(file, turned)
    with monkeypatch.context() as unchecked, pytest.raises(StoreError, match="do not find themselves"):
        unchecked.setattr("ralm.what.sums.differing", lambda *a: iter(()))
        Dense(copy)
    assert manifest.verify(folder, manifest.load(folder))


@pytest.mark.parametrize("options, said",
                         [({"effort": 0}, "effort"), ({"name": "../x"}, "letters"), ({"encoder": "./no"}, "folder")])
def test_wrong_options_are_one_line(tmp_path, options, said):
    store = make(tmp_path / "kb", ["a"])
    with pytest.raises(UsageError, match=said):
        Dense(store, **options)
