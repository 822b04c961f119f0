"""Known ways in which systems of this kind go wrong without a word, kept as tests."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ralm.errors import RalmError
from ralm.eval.answers import em_squad
from ralm.index import retriever
from ralm.testing import Fixed
from ralm.types import Document
from ralm.what.datastore import Datastore


@pytest.mark.parametrize("spec", ["bm25", "tfidf"])
def test_queries_are_analysed_as_the_index_was(store, spec):
    """An index of stems asked with whole words scores inflected queries 0 and returns any document."""
    search = retriever(spec, store).search
    for query, document in (("mountains", "d6"), ("RETRIEVAL reading", "d4"), ("candles burning", "d8")):
        hits = search([query], k=1)
        assert hits.scores[0, 0] > 0 and store.chunks(hits.ids[0].tolist())[0].document == document


def test_no_evidence_is_not_an_arbitrary_document(store):
    hits = retriever("bm25", store).search(["zzzz qqqq"], k=3)
    assert (hits.ids == -1).all() and np.isneginf(hits.scores).all()


def test_ensembles_mix_probabilities_not_logits(lm, store):
    import torch

    from ralm.how.input import Ensemble, Prepend
    from ralm.model import RALM

    ids = lm.tokenizer.encode("Snow on granite.")
    shape = dict(query=8, tokens=24)
    each = torch.stack([RALM(lm, Fixed(store, [c]), how=Prepend(k=1, **shape), when="once:1").distributions(ids) for c in (1, 2)])
    mixed = RALM(lm, Fixed(store, [1, 2]), how=Ensemble(k=2, **shape), when="once:1").distributions(ids)
    assert torch.allclose(mixed.exp(), each.exp().mean(0), atol=1e-5)
    logits = torch.log_softmax(each.mean(0), -1)
    assert 0.5 * float((mixed.exp() - logits.exp()).abs().sum(-1).max()) > 0.05  # total variation: it would have shown


def test_the_two_marginals_are_two_named_things(lm, store):
    """Per token (prior) and per sequence (posterior) agree on the first token and nowhere else."""
    from ralm.how.input import Ensemble
    from ralm.model import RALM

    ids = lm.tokenizer.encode("Snow on granite.")
    prior, posterior = (RALM(lm, Fixed(store, [1, 2, 3]), how=Ensemble(k=3, weights=w, query=8, tokens=24)).score(
        ids, prompt="tower?") for w in ("prior", "posterior"))
    gap = np.abs(prior.logp - posterior.logp)
    assert gap[0] < 1e-5 and gap[1:].max() > 0.01 and "weights='posterior'" in repr(Ensemble(weights="posterior"))


def test_temperature_scales_scores_and_never_the_vocabulary(lm, store):
    from ralm.how.input import Ensemble
    from ralm.model import RALM

    ids = lm.tokenizer.encode("Snow on granite.")
    one, other = (RALM(lm, Fixed(store, [1], [5.0]), how=Ensemble(k=1, temperature=t, query=8, tokens=24), when="once:1").score(ids)
                  for t in (1.0, 0.01))
    assert np.array_equal(one.logp, other.logp)


def test_a_marginal_over_one_token_still_depends_on_the_scores(lm, store):
    """One-token answers must not lose p(z|x): as scores move to one passage, ln p moves to what that passage alone gives."""
    from ralm.how.input import Ensemble, Prepend
    from ralm.model import RALM

    ids, shape = lm.tokenizer.encode("Snow")[:1], dict(query=8, tokens=24)
    each = np.array([RALM(lm, Fixed(store, [c]), how=Prepend(k=1, **shape)).score(ids, prompt="tower?").logp[0] for c in (1, 2)])
    for weights in ("prior", "posterior"):
        for gap in (-30.0, -1.0, 0.0, 2.0, 30.0):
            ralm = RALM(lm, Fixed(store, [1, 2], [gap, 0.0]), how=Ensemble(k=2, weights=weights, **shape))
            p = 1 / (1 + np.exp(-gap))
            want = np.log(p * np.exp(each[0]) + (1 - p) * np.exp(each[1]))
            assert ralm.score(ids, prompt="tower?").logp[0] == pytest.approx(want, abs=1e-4)
    assert abs(each[0] - each[1]) > 0.1


def test_confidence_is_a_probability_and_low_confidence_retrieves(lm, bm25):
    """A threshold held against log-probabilities is inverted or always passed; here more caution means more retrieval."""
    from ralm.how.input import Prepend
    from ralm.model import RALM

    ids = lm.tokenizer.encode("Snow lies on the granite reef, and Maria Holt saw the tower.")[:30]
    counts = [len(RALM(lm, bm25, how=Prepend(k=1, query=8, tokens=24), when=f"adaptive:theta={theta}").score(ids).evidence)
              for theta in (0.0, 0.3, 0.7, 1.0)]
    assert counts == sorted(counts) and counts[0] == 0 < counts[1] < counts[3] == len(ids) - 1


def test_bits_per_byte_count_the_bytes(lm):
    """Bits per byte are bits over UTF-8 bytes, not the logarithm of a perplexity per token over eight."""
    from ralm.model import RALM

    text = "naïve 日本 granite"
    score = RALM(lm).score(text)
    assert score.bits_per_byte() == pytest.approx(-score.logp.sum() / np.log(2) / len(text.encode()))
    assert abs(score.bits_per_byte() - np.log2(score.ppl()) / 8) > 0.5 and len(text.encode()) > len(text)


def test_markers_count_from_one():
    """[0] names no passage (least of all the last one), nor does a number above theirs."""
    from ralm.how.cite import resolve
    from ralm.types import Citation

    passages = [Citation("a", 0, 16, "Granite is hard.", 1.0), Citation("b", 0, 16, "Snow is granite.", 1.0)]
    assert [c.document for _, c in resolve("Granite is hard [1].", passages)] == ["a"]
    assert resolve("Granite is hard [0]. Granite is hard [3]. Granite is hard [-1].", passages) == []


def test_recall_is_a_share_of_what_is_relevant():
    """One of three relevant documents found is a recall of a third; whether any was found has another name."""
    pytest.importorskip("ir_measures")
    from ralm.eval.retrieval import evaluate_run, topk_accuracy

    found = evaluate_run({"q": [("a", 2.0), ("x", 1.0)]}, {"q": {"a": 1, "b": 1, "c": 1}}, ["R@2", "Success@2"])["measures"]
    assert found == pytest.approx({"R@2": 1 / 3, "Success@2": 1})
    assert topk_accuracy([["no", "the answer"]], [["answer", "reply"]], (1, 2)) == {1: 0.0, 2: 1.0}


def test_every_module_imports():
    """With the packages that the extras name, at the versions installed here: a method that cannot be imported is not there."""
    pytest.importorskip("faiss")
    pytest.importorskip("httpx")
    import importlib
    import pkgutil

    import ralm

    names = [m.name for m in pkgutil.walk_packages(ralm.__path__, "ralm.")]
    assert len(names) > 50
    for name in names:
        importlib.import_module(name)


def test_reading_loses_no_document(tmp_path):
    """57 documents, with empty lines, long lines and line separators inside strings, are 57 documents; all can be found."""
    from ralm.what.read import read

    texts = [f"Number {i} is word{i}x.\u2028And\x0bmore " + "filler " * (i * 40) for i in range(57)]
    lines = [json.dumps({"id": f"n{i}", "text": t}, ensure_ascii=bool(i % 2)) for i, t in enumerate(texts)]
    (tmp_path / "many.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    store = Datastore.build(tmp_path / "kb.ralm", read(tmp_path / "many.jsonl"), split="words:20")
    assert len(store) == 57 == len(list(store.documents()))
    found = retriever("bm25", store).search([f"word{i}x" for i in range(57)], k=1).ids[:, 0].tolist()
    assert sorted(c.document for c in store.chunks(found)) == sorted({d.id for d in store.documents()})


def test_exact_match_ignores_case_punctuation_and_articles():
    assert em_squad("The Cat.", ["cat"]) and em_squad("  A  CAT ", ["the cat!"]) and not em_squad("cats", ["cat"])


def test_importing_search_leaves_the_threads_of_faiss_alone():
    code = ("import faiss\nbefore = faiss.omp_get_max_threads()\nimport ralm.index, ralm.index.dense, ralm.index.sparse\n"
            "assert faiss.omp_get_max_threads() == before == 3, (before, faiss.omp_get_max_threads())")
    pytest.importorskip("faiss")
    import os

    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "3"})


def test_an_evaluation_that_fails_says_so():
    """A measure over the questions that happened to work would be a number about something else."""
    from ralm.eval.qa import evaluate_qa

    def breaks(question, **_):
        raise RalmError("the model is gone")

    with pytest.raises(RalmError, match="gone"):
        evaluate_qa(breaks, [{"id": "1", "question": "Who?", "answers": ["she"]}])


def test_a_text_cannot_retrieve_itself_where_it_is_excluded(lm, store, bm25):
    from ralm.how.input import Prepend
    from ralm.model import RALM

    text = store.document("d6").text
    ralm = RALM(lm, bm25, how=Prepend(k=1, query=12, tokens=24), when="every:4")
    own = {c.document for e in ralm.score(text).evidence for c in store.chunks(e.ids.tolist())}
    assert "d6" in own  # which is why it has to be excluded
    rest = {c.document for e in ralm.score(text, exclude=["d6"]).evidence for c in store.chunks(e.ids.tolist())}
    assert rest and "d6" not in rest


def test_the_same_document_twice_is_one(tmp_path):
    store = Datastore.build(tmp_path / "kb.ralm", [Document("a", "one text"), Document("a", "one text")])
    store.add([Document("a", "one text")])
    assert len(store) == 1 and store.n_chunks == 1
