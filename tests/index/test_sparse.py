"""The sparse index against brute force in float64, against the package bm25s, and against its own promises (laws 7 and 8)."""

import importlib.util
import io
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralm.errors import FingerprintError, UsageError
from ralm.index import sparse
from ralm.index.sparse import BM25, TFIDF
from ralm.testing import check_retriever
from ralm.types import Document
from ralm.what.datastore import Datastore

_spec = importlib.util.spec_from_file_location("brute", Path(__file__).parent / "brute.py")
brute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(brute)
FORMS, make, scores = brute.FORMS, brute.make, brute.scores

DATA = Path(os.environ.get("RALM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.sampled_from(["cat", "dogs", "the", "Zürich", "東京", "naïve", "3.14", "don't", "run", "running", "x"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12)
CATS = ["the cat sat on the mat", "dogs chase cats", "a dog and a dog", "Zürich is a city", "cats, cats and more cats"]


def searcher(store, form, **options):
    return TFIDF(store, **options) if form == "tfidf" else BM25(store, form=form, **options)


@given(texts=TEXTS, query=st.lists(WORDS, max_size=8).map(" ".join), form=st.sampled_from(FORMS),
       k1=st.sampled_from([0.0, 0.9, 1.5]), b=st.sampled_from([0.0, 0.4, 1.0]), delta=st.sampled_from([0.0, 0.5, 1.2]))
@QUICK
def test_every_form_is_the_formula(tmp_path_factory, texts, query, form, k1, b, delta):
    store = make(tmp_path_factory.mktemp("s") / "kb.ralm", texts)
    options = {} if form == "tfidf" else {"k1": k1, "b": b, "delta": delta}
    found = searcher(store, form, stop="none", **options)
    hits = found.search([query], k=len(texts) + 2)
    want, shares = scores(texts, query, found.settings, form, k1, b, delta)
    assert set(hits.row(0).ids[0].tolist()) == set(np.nonzero(shares)[0].tolist())
    np.testing.assert_allclose(hits.row(0).scores[0], want[hits.row(0).ids[0]], rtol=1e-5, atol=1e-7)
    check_retriever(found, [query, *texts[:2]], k=4)


@pytest.mark.parametrize("form", FORMS[:5])
def test_scores_are_those_of_bm25s(tmp_path, form):
    import bm25s

    rng = np.random.default_rng(1)
    texts = [" ".join(f"w{w}" for w in rng.zipf(1.4, rng.integers(1, 60)) % 500) for _ in range(300)]
    queries = [" ".join(f"w{w}" for w in rng.zipf(1.4, rng.integers(1, 12)) % 520) for _ in range(40)]
    ours = BM25(make(tmp_path / "kb.ralm", texts), form=form, k1=1.2, b=0.6, stemmer="none", stop="none").search(queries, k=300)
    theirs = bm25s.BM25(k1=1.2, b=0.6, delta=0.5, method=form)
    theirs.index([t.split() for t in texts], show_progress=False)
    for q, query in enumerate(queries):
        known = [w for w in query.split() if w in theirs.vocab_dict]
        want = theirs.get_scores(known) if known else np.zeros(300, np.float32)
        row = ours.row(q)
        np.testing.assert_allclose(row.scores[0], want[row.ids[0]], rtol=1e-5, atol=1e-6)
        others = np.setdiff1d(np.arange(300), row.ids[0])
        assert len(others) == 0 or want[others].max() <= want.min() + 1e-5  # theirs: the constant of chunks that share no term


def test_the_forms_in_numbers(tmp_path):
    """Two chunks, one term, worked by hand: N = 2, df = 1, tf = 1, |d| = 1, avgdl = 2."""
    store = make(tmp_path / "kb.ralm", ["cat", "dog fox emu"])
    norm = 1.5 * (0.25 + 0.75 * 0.5)
    want = {"robertson": 0.0, "lucene": math.log(2) / (1 + norm), "atire": math.log(2) * 2.5 / (1 + norm),
            "bm25l": math.log(2) * 2.5 * (1.6 + 0.5) / (1.5 + 1.6 + 0.5), "bm25+": math.log(3) * (2.5 / (1 + norm) + 0.5),
            "tfidf": math.log(2)}
    for form, score in want.items():
        hits = searcher(store, form).search(["cat"], 2)
        assert hits.ids.tolist() == [[0, -1]] and hits.scores[0, 0] == pytest.approx(score, rel=1e-6), form


def test_queries_with_nothing_or_too_much(tmp_path):
    found = BM25(make(tmp_path / "kb.ralm", CATS))
    hits = found.search(["", "unknown words", "the", "cat", "cat unknown", "CATS cat"], k=50)
    assert hits.ids.shape == (6, 50) and (hits.ids[:3] == -1).all() and np.isneginf(hits.scores[:3]).all()
    assert np.array_equal(hits.ids[3], hits.ids[4]) and np.array_equal(hits.scores[3], hits.scores[4])
    np.testing.assert_allclose(hits.scores[5, :3], 2 * hits.scores[3, :3])
    assert found.search([], 3).ids.shape == (0, 3) and found.search(["cat"], 0).ids.shape == (1, 0)
    with pytest.raises(UsageError, match="this is one text"):
        found.search("cat")
    with pytest.raises(UsageError, match="k = -1"):
        found.search(["cat"], -1)


def test_inflected_queries_find_inflected_text(tmp_path):
    """The stored analyser cuts the query, whoever opens the index (FlashRAG's index with a stemmer scores these 0)."""
    path = tmp_path / "kb.ralm"
    BM25(make(path, ["He was running", "The cities of the plain", "Generously given"]), stemmer="porter")
    found = BM25(Datastore.open(path))
    assert found.settings.stemmer == "porter"
    hits = found.search(["runs", "city", "generous"], 1)
    assert hits.ids[:, 0].tolist() == [0, 1, 2] and (hits.scores > 0).all()


def test_titles_are_indexed_unless_told_otherwise(tmp_path):
    store = make(tmp_path / "a.ralm", ["born in Weimar"], ["Goethe"])
    assert BM25(store).search(["goethe"], 1).ids[0, 0] == 0
    store = make(tmp_path / "b.ralm", ["born in Weimar"], ["Goethe"])
    assert BM25(store, title=False).search(["goethe"], 1).ids[0, 0] == -1


def test_filters_act_before_top_k_and_leave_statistics_alone(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", [
        Document(f"d{i}", "cat " * (1 + i % 5) + "filler " * (i % 7), metadata={"year": 1990 + i})
        for i in range(40)], split="none")
    found = BM25(store)
    whole = found.search(["cat"], 40)
    some = found.search(["cat"], 5, where="year >= 2020", exclude=["d39"])
    keep = (whole.ids[0] >= 30) & (whole.ids[0] != 39)
    assert some.ids[0].tolist() == whole.ids[0][keep][:5].tolist() and np.array_equal(some.scores[0], whole.scores[0][keep][:5])
    check_retriever(found, ["cat", "filler"], where="year < 1995")


@given(texts=TEXTS, gone=st.sets(st.integers(0, 11)), query=st.lists(WORDS, max_size=6).map(" ".join), form=st.sampled_from(FORMS))
@QUICK
def test_forgetting_is_never_having_known(tmp_path_factory, texts, gone, query, form):
    """Law 7: after a removal, bit for bit the scores of a store that never held the document; and version 1 is what it was."""
    path = tmp_path_factory.mktemp("s") / "kb.ralm"
    store = make(path, texts)
    found = searcher(store, form)
    before, first = found.search([query], 20), store.version
    gone = sorted(g for g in gone if g < len(texts))
    if not gone:
        return
    store.remove([f"d{g}" for g in gone])
    left = [i for i in range(len(texts)) if i not in gone]
    fresh = searcher(make(path.with_name("fresh.ralm"), [texts[i] for i in left]), form).search([query], 20)
    after = found.search([query], 20)
    n = (after.ids[0] >= 0).sum()
    assert [left[i] for i in fresh.ids[0, :n]] == after.ids[0, :n].tolist() and np.array_equal(fresh.scores, after.scores)
    again = searcher(Datastore.open(path, version=first), form).search([query], 20)
    assert np.array_equal(again.ids, before.ids) and np.array_equal(again.scores, before.scores)


def test_a_union_is_one_store(tmp_path):
    texts = CATS + ["the emu and the cat", "dog"]
    a, b = make(tmp_path / "a.ralm", texts[:3]), make(tmp_path / "b.ralm", texts[3:])
    whole = BM25(make(tmp_path / "whole.ralm", texts))
    both = BM25(Datastore.union(a, b))
    queries = ["cat", "dog cat", "zürich emu"]
    for form in (both, whole):
        check_retriever(form, queries)
    assert np.array_equal(both.search(queries, 9).ids, whole.search(queries, 9).ids)
    assert np.array_equal(both.search(queries, 9).scores, whole.search(queries, 9).scores)
    a.remove(["d0"])
    whole.store.remove(["d0"])
    assert np.array_equal(BM25(Datastore.union(a, b)).search(queries, 9).scores, whole.search(queries, 9).scores)
    BM25(make(tmp_path / "c.ralm", CATS), stemmer="none")
    with pytest.raises(FingerprintError, match=r"stemmer = 'english' and None"):
        BM25(Datastore.union(a, Datastore.open(tmp_path / "c.ralm")))


def test_an_interrupt_while_terms_are_learnt_leaves_nothing_half_done(tmp_path, monkeypatch):
    store = Datastore.build(tmp_path / "kb.ralm", [Document(f"d{i}", t) for i, t in enumerate(CATS)], split="none")
    BM25(store)
    store.add([Document("more", "cats on a mat")])
    found, learn, calls = BM25(store), sparse.Asked.learn, []

    def once(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(self, *args)

    monkeypatch.setattr(sparse.Asked, "learn", once)
    with pytest.raises(KeyboardInterrupt):
        found.search(["cat mat"], 9)
    again, fresh = found.search(["cat mat dog"], 9), BM25(store).search(["cat mat dog"], 9)
    assert np.array_equal(again.ids, fresh.ids) and np.array_equal(again.scores, fresh.scores)


@pytest.mark.parametrize("form", FORMS)
def test_many_blocks_with_removals_filters_and_appends(tmp_path, form):
    """Some hundred chunks, clustered as real text is, over two segments: every hit and score as brute force has it."""
    rng = np.random.default_rng(3)
    texts = [" ".join(f"w{w}" for w in (rng.zipf(1.3, rng.integers(1, 40)) * (1 + i // 100)) % 90) for i in range(600)]
    store = Datastore.build(tmp_path / "kb.ralm", [Document(f"d{i}", t, metadata={"n": i}) for i, t in enumerate(texts[:450])],
                            split="none")
    found = searcher(store, form, stop="none", stemmer="none")
    store.add(Document(f"d{i}", t, metadata={"n": i}) for i, t in enumerate(texts[450:], 450))
    store.remove([f"d{i}" for i in range(0, 600, 7)])
    left = [i for i in range(600) if i % 7]
    queries = ["w1 w2", "w80 w3 w3 w1", "w77", "w5 w6 w7 w8 w9 w10 w11 w12", "w1 w0"]
    every, some = np.arange(600), ("n >= 300", np.arange(600) >= 300)
    for where, mask in ((None, every >= 0), some, ("n = 55", every == 55), some, some):  # bounds of its own the second time
        for k in (1, 10, 700):
            hits = found.search(queries, k, where=where)
            for q, query in enumerate(queries):
                want, shares = scores([texts[i] for i in left], query, found.settings, form)
                row, place = hits.row(q), {i: n for n, i in enumerate(left)}
                may = [n for n, i in enumerate(left) if shares[n] and mask[i]]
                assert len(row.ids[0]) == min(k, len(may))
                got = want[[place[i] for i in row.ids[0]]]
                np.testing.assert_allclose(row.scores[0], got, rtol=1e-5, atol=1e-7)
                np.testing.assert_allclose(got, np.sort(want[may])[::-1][:k], rtol=1e-5, atol=1e-7)


def test_threads_give_the_same(tmp_path):
    rng = np.random.default_rng(2)
    store = make(tmp_path / "kb.ralm", [" ".join(f"w{w}" for w in rng.integers(0, 50, 20)) for _ in range(200)])
    queries = [" ".join(f"w{w}" for w in rng.integers(0, 60, 5)) for _ in range(101)]
    one, many = BM25(store).search(queries, 7), BM25(store, threads=4).search(queries, 7)
    assert np.array_equal(one.ids, many.ids) and np.array_equal(one.scores, many.scores)


def test_options_that_are_wrong(tmp_path):
    store = make(tmp_path / "kb.ralm", CATS)
    with pytest.raises(UsageError, match=r"unknown form of BM25 'lucen'\. Did you mean 'lucene'"):
        BM25(store, form="lucen")
    for wrong in ({"k1": -1}, {"b": 1.5}, {"delta": -0.1}, {"k1": math.nan}, {"threads": 0}):
        with pytest.raises(UsageError):
            BM25(store, **wrong)
    assert not (store.path / "index").exists()


@pytest.fixture(scope="module")
def arguana():
    if not (DATA / "retrieval" / "arguana.zip").is_file():
        pytest.skip(f"no retrieval/arguana.zip in {DATA}")
    with zipfile.ZipFile(DATA / "retrieval" / "arguana.zip") as z:
        corpus, queries = ([json.loads(line) for line in z.open(f"arguana/{n}.jsonl")] for n in ("corpus", "queries"))
        lines = io.TextIOWrapper(z.open("arguana/qrels/test.tsv"), "utf-8").read().splitlines()[1:]
    return corpus, queries, dict(line.split("\t")[:2] for line in lines)


def test_arguana_scores_as_published(tmp_path, arguana):
    """BEIR ArguAna with Anserini's settings: k1 = 0.9, b = 0.4, Porter, Lucene's stop words, title and text as one field. Published
    (flat): nDCG@10 0.3970, R@100 0.9324. Most queries are documents of the corpus; as in BEIR and Anserini (-removeQuery) the
    document whose id is the query's is not counted as a hit."""
    corpus, queries, relevant = arguana
    store = make(tmp_path / "kb.ralm", [d["text"] for d in corpus], [d.get("title", "") for d in corpus])
    names, chunk_of = [d["_id"] for d in corpus], store.document_ids(store.chunk_ids())
    hits = BM25(store, k1=0.9, b=0.4, stemmer="porter", stop="english").search([q["text"] for q in queries], 101)
    gains, recalls = [], []
    for query, row in zip(queries, hits.ids):
        found = [names[int(chunk_of[i][1:])] for i in row if i >= 0]
        found = [name for name in found if name != query["_id"]][:100]
        rank = found.index(relevant[query["_id"]]) if relevant[query["_id"]] in found else 1000
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0.0)
        recalls.append(rank < 100)
    assert len(gains) == 1406
    assert np.mean(gains) == pytest.approx(0.3970, abs=0.01) and np.mean(recalls) == pytest.approx(0.9324, abs=0.005)
