"""Perplexity against transformers' own loss, sums over shards, and what must not be retrieved."""

import math
from dataclasses import asdict

import pytest

from ralm.errors import UsageError
from ralm.eval.perplexity import Counts, counts, evaluate_perplexity
from ralm.model import RALM
from ralm.types import Document

WIKI = [" = Valkyria = \n Senjō no Valkyria 3 : <unk> , is a game . \n",
        " \n = = Gameplay = = \n The game took a team of 5 @,@ 000 . \n"]


def nats(tiny, lm, text):
    """Sum of negative log-likelihoods of a text that fits one window, by transformers alone."""
    import torch

    ids = [lm.bos, *tiny.tokenizer()(text)["input_ids"]]
    with torch.inference_mode():
        logp = tiny.make("llama")(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -float(logp[range(len(ids) - 1), ids[1:]].sum()), len(ids) - 1


def test_convention_of_wikitext(tiny, lm):
    """Word perplexity is exp(nats / white-space words), bits are per UTF-8 byte, and no context crosses documents."""
    text = [t[:55] for t in WIKI]
    found = evaluate_perplexity(RALM(lm), text)
    want = [nats(tiny, lm, t) for t in text]
    total, tokens = sum(n for n, _ in want), sum(t for _, t in want)
    words, size = sum(len(t.split()) for t in text), sum(len(t.encode()) for t in text)
    assert (found["tokens"], found["words"], found["bytes"], found["documents"]) == (tokens, words, size, 2)
    assert size > sum(map(len, text))  # there is a letter of two bytes among them
    assert found["nats_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["word_ppl"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    low, high = found["intervals"]["ppl"]
    assert low <= found["ppl"] <= high
    assert found["convention"]["average"].startswith("micro") and found["convention"]["window"] == lm.window


def test_shards_add_up(lm):
    texts = [(f"t{i}", w) for i, w in enumerate([*WIKI, "a b c", ""])]
    whole = evaluate_perplexity(RALM(lm), texts, window=32, stride=8)
    parts = [evaluate_perplexity(RALM(lm), part, window=32, stride=8) for part in (texts[:1], texts[1:])]
    total = sum((counts(row) for part in parts for row in part["rows"]), Counts())
    for name, value in (asdict(total) | total.figures()).items():
        assert whole[name] == pytest.approx(value), name
    assert (whole["convention"]["window"], whole["convention"]["stride"]) == (32, 8)
    empty = Counts()
    assert math.isnan(empty.ppl()) and math.isnan(empty.bits_per_byte()) and Counts(1e6, 1, 1, 1).ppl() == math.inf


class Spy:
    """A retriever that notes what was excluded."""

    def __init__(self, inner):
        self.inner, self.store, self.seen = inner, inner.store, []

    def search(self, queries, k=10, where=None, exclude=()):
        hits = self.inner.search(queries, k, where, exclude)
        self.seen.append((set(exclude), set(self.store.document_ids([i for i in hits.ids.ravel().tolist() if i >= 0]))))
        return hits

    def __repr__(self):
        return "Spy()"


def test_what_is_scored_is_not_retrieved(lm, bm25):
    """By id (the text may have changed since) and by text (the id may be another)."""
    store = bm25.store
    d0, d3 = store.document("d0"), store.document("d3")
    texts = [Document("d0", d0.text + " More."), Document("a file of mine", f"\n{d3.text} \n"), ("other", "granite reef of rock")]
    spy = Spy(bm25)
    ralm = RALM(lm, spy, how="prepend:k=2,tokens=20", when="every:8")
    found = evaluate_perplexity(ralm, texts)
    assert [row["excluded"] for row in found["rows"]] == [["d0"], ["d3"], []] and found["excluded_documents"] == 2
    assert {frozenset(excluded) for excluded, _ in spy.seen} == {frozenset({"d0"}), frozenset({"d3"}), frozenset()}
    assert not any(excluded & hits for excluded, hits in spy.seen)
    assert any(hits for _, hits in spy.seen) and found["retrievals"] > 3
    assert found["passages_read"] == sum(row["passages_read"] for row in found["rows"]) == found["passages_cut"] > 3  # of 10 tokens
    assert not {"passages_read", "passages_cut", "excluded"} & found["convention"].keys()
    spy.seen.clear()
    own = evaluate_perplexity(ralm, texts, exclude_self=False)
    assert any("d3" in hits for _, hits in spy.seen) and own["excluded_documents"] == 0
    assert own["convention"]["own_document"] == "may be retrieved"


def test_ledger_continues(lm, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    first = evaluate_perplexity(RALM(lm), [("a", WIKI[0])], ledger=path)
    scored = []
    inner = RALM.score
    monkeypatch.setattr(RALM, "score", lambda self, text, **kw: scored.append(text) or inner(self, text, **kw))
    both = evaluate_perplexity(RALM(lm), [("a", WIKI[0]), ("b", WIKI[1])], ledger=path)
    assert scored == [WIKI[1]] and both["rows"][0] == first["rows"][0]
    with pytest.raises(UsageError, match="another text under the id 'a'"):
        evaluate_perplexity(RALM(lm), [("a", "new")], ledger=path)
    with pytest.raises(UsageError, match="made with window = None, this run has 16"):
        evaluate_perplexity(RALM(lm), [("a", WIKI[0])], window=16, ledger=path)


def test_a_ledger_is_of_one_system(tiny, lm, store, tmp_path):
    """Rows made by another retriever or in another precision are other figures: they are refused, not mixed in."""
    from ralm.index import retriever
    from ralm.lm.hf import HF

    def score(model, spec):
        ralm = RALM(model, retriever(spec, store), how="prepend:k=1,tokens=20", when="every:8")
        return evaluate_perplexity(ralm, [("a", WIKI[0])], ledger=tmp_path / "rows.jsonl")

    assert score(lm, "bm25")["ppl"] == score(lm, "bm25")["ppl"]  # a retriever opened anew is the same system
    half = HF(tiny.make("llama"), tiny.tokenizer(), dtype="bf16", window=64)
    for model, spec, part in ((lm, "tfidf", "retriever"), (lm, "bm25:k1=2", "retriever"), (half, "bm25", "lm")):
        with pytest.raises(UsageError, match=f"made with {part} = "):
            score(model, spec)


def test_wrong_requests(lm):
    with pytest.raises(UsageError, match="no text"):
        evaluate_perplexity(RALM(lm), [])
    with pytest.raises(UsageError, match="'a' is given twice"):
        evaluate_perplexity(RALM(lm), [("a", "x"), ("a", "y")])
    with pytest.raises(UsageError, match="'b' cannot be scored: window 1000"):
        evaluate_perplexity(RALM(lm), [("b", "x")], window=1000)
