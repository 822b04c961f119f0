"""Evidence at the input: what rows hold, what the window allows, what is shared, against rows written out."""

import pytest

torch = pytest.importorskip("torch")

from ralm.errors import UsageError  # noqa: E402
from ralm.how import fusion  # noqa: E402
from ralm.how.input import Ensemble, Passages, Prepend  # noqa: E402
from ralm.how.mixing import log_weights  # noqa: E402
from ralm.how.rows import PrefixCache  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import Fixed, distance  # noqa: E402
from ralm.types import LMOut  # noqa: E402

CLOSE = 1e-4  # chunks 1, 2, 3 and 9 of the store are alive, 4 to 6 were removed
SHAPE = dict(query=8, tokens=24)


class Watched:
    """A model that writes down every row it is given (padding taken away)."""

    def __init__(self, lm):
        self.inner, self.rows = lm, []
        for name in ("name", "tokenizer", "window", "vocab", "bos", "eos", "gives"):
            setattr(self, name, getattr(lm, name))

    def forward(self, ids, *, past=None, mask=None, keep=None, neighbours=None) -> LMOut:
        real = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1]:]
        self.rows += [row[m.bool()].tolist() for row, m in zip(ids, real)]
        assert ids.shape[1] + (past.length if past is not None else 0) <= self.window
        return self.inner.forward(ids, past=past, mask=mask, keep=keep)


def after(lm, row):
    with torch.no_grad():
        return torch.log_softmax(lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1], -1)


def passage(lm, store, chunk, share):
    (c,) = store.chunks([chunk])
    tokens = lm.tokenizer.encode((c.title + "\n" if c.title else "") + c.text + "\n")
    return tokens if len(tokens) <= share else tokens[:share - 1] + lm.tokenizer.encode("\n")


def test_prepend_is_bos_then_passages_best_last_then_text(lm, store):
    ids = lm.tokenizer.encode("Snow on granite.")
    ours = RALM(lm, Fixed(store, [1, 9], [2.0, 1.0]), how=Prepend(k=2, **SHAPE), when="once:1").distributions(ids)
    evidence = passage(lm, store, 9, 12) + passage(lm, store, 1, 12)
    assert distance(ours[0], after(lm, [lm.bos])) < CLOSE
    for t in range(1, len(ids)):
        assert distance(ours[t], after(lm, [lm.bos, *evidence, *ids[:t]])) < CLOSE


@pytest.mark.parametrize("weights", ["prior", "posterior"])
def test_ensemble_is_a_weighted_mean_of_probabilities(lm, store, weights):
    ids, scores = lm.tokenizer.encode("Snow on granite."), [3.0, 1.0, 0.5]
    how = Ensemble(k=3, weights=weights, temperature=2.0, **SHAPE)
    ours = RALM(lm, Fixed(store, [1, 9, 2], scores), how=how, when="once:1").distributions(ids)
    order = log_weights(torch.tensor([scores]), 2.0)[0].exp().double()
    for t in range(1, len(ids)):
        p = torch.stack([after(lm, [lm.bos, *passage(lm, store, c, 24), *ids[:t]]) for c in (1, 9, 2)]).exp().double()
        assert distance(ours[t], (order[:, None] * p).sum(0).log().float()) < CLOSE
        order = order * p[:, ids[t]] if weights == "posterior" else order
        order = order / order.sum()


def test_every_row_fits_the_window_and_texts_see_the_same_context_with_or_without_evidence(lm, store):
    """Evidence takes room that was kept for it; it never pushes text out of a window (long passages, long texts)."""
    watched, ids = Watched(lm), lm.tokenizer.encode("The granite reef and the tower in winter. " * 6)
    for how in (Prepend(k=2, query=8, tokens=40), Ensemble(k=3, query=8, tokens=40)):
        watched.rows.clear()
        score = RALM(watched, Fixed(store, [0, 1, 2]), how=how, when="every:4").score(ids)
        assert len(score.logp) == len(ids) > 2 * watched.window and score.convention["evidence_tokens"] == 40
        assert max(map(len, watched.rows)) == watched.window


def test_a_window_that_evidence_would_fill_is_refused(lm, store):
    with pytest.raises(UsageError, match="evidence may take 64 tokens of a window of 64, which leaves 0"):
        RALM(lm, Fixed(store, [0]), how=Prepend(tokens=64)).score("granite")


@pytest.mark.parametrize(("spec", "line"), [
    ("prepend:k=2.5", "k=2.5 is no whole number"), ("prepend:k=-1", "k=-1"), ("prepend:query=0", "query=0"),
    ("prepend:tokens=1.5", "tokens=1.5"), ("prepend:k=3,tokens=2", "cannot be shared by k=3"), ("ensemble:k=true", "k=True"),
    ("ensemble:temperature=0", "temperature=0"), ("ensemble:temperature=inf", "temperature=inf"),
    ("ensemble:temperature=warm", "temperature=warm"), ("ensemble:weights=equal", "neither 'prior' nor 'posterior'")])
def test_wrong_specs_are_one_line(spec, line):
    with pytest.raises(UsageError, match=line) as caught:
        fusion(spec)
    assert "\n" not in str(caught.value) and "not supported" not in str(caught.value)


def test_remembered_passages_are_those_of_their_share(lm, store):
    cache = PrefixCache(lm)
    long, short = Passages(cache, store, 30)([1])[0], Passages(cache, store, 10)([1])[0]
    assert (len(long), len(short)) == (30, 10) and Passages(cache, store, 30)([1]) == [long]


def test_only_prepended_passages_share_their_tokens():
    assert fusion("ensemble:k=8,tokens=4") == Ensemble(k=8, tokens=4)


def test_segments_with_equal_evidence_share_one_row(lm, store):
    ids, watched = lm.tokenizer.encode("Snow lies on granite."), Watched(lm)
    RALM(watched, Fixed(store, [3]), how=Prepend(k=1, **SHAPE), when="every:2").score(ids)
    assert len(watched.rows) == 2  # before the first retrieval, and everything after it


def test_passages_are_cut_to_their_share_and_keep_their_line_break(lm, store):
    newline = lm.tokenizer.encode("\n")
    for share in (1, 5, 200):
        for tokens in Passages(lm, store, share)([0, 1, 1, 0]):
            assert len(tokens) <= share and tokens[-len(newline):] == newline


@pytest.mark.parametrize(("how", "share"), [(Prepend(k=3, query=8, tokens=24), 8), (Ensemble(k=3, query=8, tokens=40), 40)])
def test_passages_that_do_not_fit_are_counted(lm, store, how, share):
    """Cutting is no secret: the convention says how many of the passages that were read were cut."""
    score = RALM(lm, Fixed(store, [1, 2, 9]), how=how, when="every:4").score("Snow lies on the granite reef.")
    long = sum(len(passage(lm, store, c, 10_000)) > share for c in (1, 2, 9))
    assert (score.convention["passages_read"], score.convention["passages_cut"]) == (3, long) and long > 0
    short = next(c for c in store.chunk_ids().tolist() if len(passage(lm, store, c, 10_000)) <= 40)
    fits = RALM(lm, Fixed(store, [short]), how=Prepend(k=1, query=8, tokens=40), when="once:1").score("Snow", prompt="G")
    assert (fits.convention["passages_read"], fits.convention["passages_cut"]) == (1, 0)
    assert RALM(lm).score("Snow").convention["passages_read"] == 0


def test_a_title_stands_above_its_passage(lm, store):
    (chunk,) = [c for c in store.chunks(store.chunk_ids().tolist()) if c.document == "d1" and c.start == 0]
    assert lm.tokenizer.decode(Passages(lm, store, 500)([chunk.id])[0]) == f"T1\n{chunk.text}\n"


def test_weights_of_large_scores_stay_finite(lm, store):
    """Inner products near 380, as trained dense retrievers give them, must not become nan."""
    ids = lm.tokenizer.encode("Snow on granite.")
    retriever = Fixed(store, [1, 2, 3], [381.0, 380.0, 200.0])
    for weights in ("prior", "posterior"):
        score = RALM(lm, retriever, how=Ensemble(k=3, weights=weights, **SHAPE), when="every:4").score(ids)
        assert torch.isfinite(torch.tensor(score.logp)).all()
        assert score.evidence[0].weights == pytest.approx([0.731, 0.269, 0.0], abs=1e-3)
