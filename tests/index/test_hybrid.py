"""Fusion by hand and by brute force; re-ranking against scores computed one pair at a time; the Hits contract of all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm import index
from ralm.errors import UsageError
from ralm.index.dense import Dense
from ralm.index.encode import encoder
from ralm.index.hybrid import Hybrid, fuse
from ralm.index.rerank import reranker
from ralm.index.sparse import BM25
from ralm.testing import Fixed, check_retriever
from ralm.types import Document, Hits
from ralm.what.datastore import Datastore

QUERIES = ["return a list of names", "open a file and read its lines", "the cat sat on the mat", "zzzz qqqq"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, paragraphs, table):
    """400 paragraphs with bm25 and dense indexes."""
    made = Datastore.build(tmp_path_factory.mktemp("hybrid") / "kb", [
        Document(f"d{i}", t, f"Title {i % 7}", metadata={"number": i}) for i, t in enumerate(paragraphs[:400])], split="none")
    Dense(made, table)
    BM25(made)
    return made


def hits(*rows):
    """Hits of (id, score) pairs."""
    out = Hits.empty(len(rows), max(map(len, rows)))
    for q, row in enumerate(rows):
        for i, (id, score) in enumerate(row):
            out.ids[q, i], out.scores[q, i] = id, score
    return out


def test_reciprocal_rank_fusion_by_hand():
    a, b = hits([(7, 9.0), (3, 5.0), (1, 4.0)]), hits([(3, 0.9), (8, 0.8)])
    got = fuse([a, b], 4, "rrf")
    assert got.ids[0].tolist() == [3, 7, 8, 1]
    np.testing.assert_allclose(got.scores[0], [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], rtol=1e-6)
    got = fuse([a, b], 5, "rrf", weights=[2, 1], k0=0)
    assert got.ids[0].tolist() == [3, 7, 1, 8, -1]  # 2/2 + 1/1 = 2, 2/1 = 2, 2/3, 1/2: the tie goes to the smaller id
    np.testing.assert_allclose(got.scores[0][:4], [2, 2, 2 / 3, 1 / 2])


def test_score_fusion_by_hand():
    a, b = hits([(7, 9.0), (3, 5.0), (1, 4.0)]), hits([(3, 0.5)])
    got = fuse([a, b], 4, "score", weights=[1, 0.5])
    assert got.ids[0].tolist() == [7, 3, 1, -1]
    np.testing.assert_allclose(got.scores[0][:3], [1.0, 0.2 + 0.5, 0.0], rtol=1e-6)


LISTS = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), min_size=1, max_size=4)


@given(lists=LISTS, k=st.integers(1, 20), k0=st.sampled_from([0.0, 1.0, 60.0]), weighted=st.booleans(),
       fusion=st.sampled_from(["rrf", "score"]))
@settings(max_examples=150, deadline=None)
def test_fusion_is_brute_force(lists, k, k0, weighted, fusion):
    weights = [i + 0.5 for i in range(len(lists))] if weighted else [1.0] * len(lists)
    found = [hits([(id, 10.0 - n * n) for n, id in enumerate(row)] or [(-1, -np.inf)]) for row in lists]
    total: dict[int, float] = {}
    for row, weight in zip(lists, weights):
        scores = [10.0 - n * n for n in range(len(row))]
        for n, id in enumerate(row):
            spread = scores[0] - scores[-1]
            worth = 1 / (k0 + n + 1) if fusion == "rrf" else (scores[n] - scores[-1]) / spread if spread else 1.0
            total[id] = total.get(id, 0.0) + weight * worth
    order = sorted(total, key=lambda id: (-np.float32(total[id]), id))[:k]
    got = fuse(found, k, fusion, k0, weights)
    assert got.ids[0].tolist() == order + [-1] * (k - len(order))
    np.testing.assert_allclose(got.scores[0][:len(order)], [total[i] for i in order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", [
    "hybrid", "hybrid:fusion=rrf", "hybrid:parts=bm25+dense,weights=2+1,k0=10", "hybrid:parts=bm25",
    "hybrid:parts=tfidf+bm25+dense",
    "hybrid:parts=bm25,rerank=TABLE,depth=9,blend=1",
    "hybrid:rerank=TABLE,depth=7", "hybrid:parts=bm25,rerank=TABLE", "hybrid:parts=dense,rerank=cross:CROSS,depth=5"])
def test_every_form_keeps_the_contract_of_hits(store, table, cross, spec):
    made = index.retriever(spec.replace("TABLE", table).replace("CROSS", str(cross)), store)
    for where in (None, "number < 60", "number < 2", "number < 0"):
        check_retriever(made, QUERIES, where=where)
    excluded = store.document_ids(made.search(QUERIES[:1], 3).row(0).ids[0].tolist())
    again = made.search(QUERIES[:1], 3, exclude=excluded).row(0)
    assert not set(store.document_ids(again.ids[0].tolist())) & set(excluded)
    alone, together = made.search(QUERIES[1:2], 5), made.search(QUERIES, 5)
    assert (alone.ids[0] == together.ids[1]).all()
    np.testing.assert_allclose(alone.scores[0], together.scores[1], atol=1e-6)
    assert made.search([], 3).ids.shape == (0, 3) and made.search(QUERIES, 0).ids.shape == (4, 0)


def test_hybrid_is_the_fusion_of_its_parts(store):
    parts = [BM25(store), Dense(store)]
    right = fuse([p.search(QUERIES, 100) for p in parts], 10)
    for made in (Hybrid(store), Hybrid(store, parts), index.retriever("hybrid", store)):
        got = made.search(QUERIES, 10)
        assert (got.ids == right.ids).all() and (got.scores == right.scores).all()
    assert "BM25" in repr(Hybrid(store)) and "Dense" in repr(Hybrid(store))


def test_one_part_without_re_ranking_is_that_part(store):
    got, right = Hybrid(store, "bm25").search(QUERIES, 5), BM25(store).search(QUERIES, 5)
    assert (got.ids == right.ids).all() and (got.scores == right.scores).all()


def test_minilm_re_ranks_by_its_cosine(store):
    made, mini = Hybrid(store, "bm25", depth=6, rerank="minilm"), encoder("minilm")
    first = BM25(store).search(QUERIES[:2], 6)
    for q, query in enumerate(QUERIES[:2]):
        chunks = store.chunks(first.ids[q].tolist())
        x_KD = mini.encode([f"{c.title}\n{c.text}" for c in chunks])
        cosine = {c.id: float(x @ mini.encode([query], role="query")[0]) for c, x in zip(chunks, x_KD)}
        got = made.search([query], 4)
        order = sorted(cosine, key=lambda id: -cosine[id])[:4]
        assert got.ids[0].tolist() == order
        np.testing.assert_allclose(got.scores[0], [cosine[i] for i in order], atol=1e-5)


def test_blending_adds_what_the_first_stage_said(store, table):
    first = BM25(store).search(QUERIES[:2], 8)
    after = Hybrid(store, "bm25", depth=8, rerank=table).search(QUERIES[:2], 8)
    got = Hybrid(store, "bm25", depth=8, rerank=table, blend=2).search(QUERIES[:2], 8)
    for q in range(2):
        total = {}
        for hits, weight in ((first, 2), (after, 1)):
            s = hits.scores[q]
            for id, value in zip(hits.ids[q].tolist(), s.tolist()):
                total[id] = total.get(id, 0) + weight * (value - s.min()) / (s.max() - s.min())
        np.testing.assert_allclose(got.scores[q], sorted(total.values(), reverse=True), atol=1e-5)
        np.testing.assert_allclose([total[i] for i in got.ids[q].tolist()], got.scores[q], atol=1e-5)


def test_vectors_of_chunks_are_encoded_once_also_through_a_union(store, paragraphs, tmp_path, monkeypatch):
    made = Hybrid(store, "bm25", depth=10, rerank="minilm")
    made.search(QUERIES, 3)
    other = Datastore.build(tmp_path / "kb", [Document("o", "the cat sat on the mat all day")], split="none")
    counted, encode = [], type(made.reranker.model).encode
    monkeypatch.setattr(type(made.reranker.model), "encode", lambda self, texts, role="passage", **kw: (
        counted.append((role, len(texts))), encode(self, texts, role, **kw))[1])
    made.search(QUERIES, 3)
    assert [n for role, n in counted if role == "passage"] == []
    union = Datastore.union(other, store)
    both = Hybrid(union, "bm25", depth=10, rerank="minilm").search(QUERIES, 3)
    new = sum(n for role, n in counted if role == "passage")
    assert 0 < new < 10  # the other store's chunk, and what BM25 over the union brings up newly
    assert union.chunks([int(both.ids[2, 0])])[0].text == "the cat sat on the mat all day"


def test_a_cross_encoder_scores_each_pair_as_it_does_alone(store, cross):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    made = Hybrid(store, "bm25", depth=4, rerank=f"cross:{cross}")
    got = made.search(QUERIES[:1], 4)
    tokenizer = AutoTokenizer.from_pretrained(str(cross))
    model = AutoModelForSequenceClassification.from_pretrained(str(cross)).eval()
    for chunk, score in zip(store.chunks(got.ids[0].tolist()), got.scores[0]):
        inputs = tokenizer(QUERIES[0], f"{chunk.title}\n{chunk.text}", truncation=True, max_length=32, return_tensors="pt")
        with torch.inference_mode():
            logit = float(model(**inputs).logits[0, 0])
        assert min(abs(score - logit), abs(score - 1 / (1 + np.exp(-logit)))) < 1e-4  # as raw score or as probability


def test_removed_documents_are_gone_from_fused_and_re_ranked_lists(store, table, tmp_path):
    import shutil

    shutil.copytree(store.path, tmp_path / "kb")
    copy = Datastore.open(tmp_path / "kb")
    made = [Hybrid(copy), Hybrid(copy, "bm25", rerank=table, depth=20)]
    gone = copy.document_ids(np.unique([m.search(QUERIES[:2], 3).ids for m in made]).tolist())
    copy.remove(gone)
    for m in made:
        found = m.search(QUERIES[:2], 10)
        assert not set(copy.document_ids(found.ids[found.ids >= 0].tolist())) & set(gone)
        check_retriever(m, QUERIES)


@pytest.mark.parametrize("options, said", [
    ({"parts": ""}, "names no retriever"), ({"parts": "bm52"}, "bm25"), ({"fusion": "rff"}, "rrf"), ({"depth": 0}, "depth"),
    ({"weights": "1"}, "one number"), ({"weights": "a+b"}, "not numbers"), ({"weights": "0+0"}, "not all 0"), ({"k0": -1}, "k0"),
    ({"blend": 1}, "needs a rerank"),
    ({"rerank": "cross:"}, "cross:NAME"), ({"rerank": "./nothing"}, "folder"), ({"rerank": "cross:./nothing"}, "folder")])
def test_wrong_options_are_one_line(store, options, said):
    with pytest.raises(UsageError, match=said) as e:
        Hybrid(store, **options)
    assert "\n" not in str(e.value)


def test_a_part_over_another_store_and_a_model_that_is_no_cross_encoder_are_refused(store, tmp_path):
    with pytest.raises(UsageError, match="another datastore"):
        Hybrid(store, [Fixed(Datastore.create(tmp_path / "kb"), [])])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot be read as a cross-encoder"):
        reranker(f"cross:{tmp_path / 'empty'}")
