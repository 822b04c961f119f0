"""Planted faults that the laws must catch: a law that cannot fail proves nothing."""

from dataclasses import dataclass, replace

import pytest

torch = pytest.importorskip("torch")

from ralm.errors import RalmError  # noqa: E402
from ralm.how.input import Ensemble, Plain, Prepend  # noqa: E402
from ralm.how.mixing import log_mix_tokens  # noqa: E402
from ralm.index import retriever  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import (  # noqa: E402
    Fixed,
    check_causal,
    check_degenerate,
    check_forgetting,
    check_marginal,
    check_neutral,
    check_normalised,
    check_one_truth,
    check_ralm,
    check_retriever,
    check_stepwise,
    same,
)
from ralm.types import Document, Hits, Segment  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402

SHAPE = dict(query=12, tokens=24)
TEXT = "granite snow tower reef candle mountain sailors"


@pytest.fixture
def ids(lm):
    return lm.tokenizer.encode(TEXT)


def breaks(law: str):
    return pytest.raises(AssertionError, match=law)


def test_the_same_systems_unbroken_pass(lm, bm25):
    check_ralm(RALM(lm, bm25, how=Prepend(k=1, **SHAPE), when="every:4"), TEXT, "tower?", [3, 9])
    check_ralm(RALM(lm, bm25, how=Ensemble(k=3, **SHAPE), when="every:4"), TEXT, "tower?", [3, 9])


class QueriesTheFuture(Prepend):
    """Asks with the tokens it is about to predict."""

    def logprobs(self, lm, ids_BT, segments, fetch, store):
        def peek(_, k, s):
            return fetch([lm.tokenizer.decode(ids_BT[0, max(0, s.start - 8):s.stop].tolist())], k, s)

        return super().logprobs(lm, ids_BT, segments, peek, store)


def test_a_query_made_of_what_it_predicts(lm, bm25, ids):
    with breaks("causal"):
        check_causal(RALM(lm, bm25, how=QueriesTheFuture(k=1, **SHAPE), when="every:4"), ids)


class AsksTheAnswer(Prepend):
    """Where a prompt ends it asks with the tokens that follow; everywhere else it keeps to the rules."""

    def logprobs(self, lm, ids_BT, segments, fetch, store):
        def peek(q, k, s):
            return fetch([lm.tokenizer.decode(ids_BT[0, s.at:].tolist())] if s.at == segments[0].start else q, k, s)

        return super().logprobs(lm, ids_BT, segments, peek, store)


def test_a_query_made_of_the_answer_to_a_prompt(lm, bm25, ids):
    ralm = RALM(lm, bm25, how=AsksTheAnswer(k=1, **SHAPE), when="once:40")
    check_causal(ralm, ids[:30])  # without a prompt nothing shows
    with breaks("causal"):
        check_causal(ralm, ids[:30], (0, 1), prompt="granite?")


class FetchesLater(Prepend):
    """Fetches at the end of its segments, not at their beginning."""

    def logprobs(self, lm, ids_BT, segments, fetch, store):
        later = [Segment(s.start, s.stop, s.at and s.stop) for s in segments]
        return super().logprobs(lm, ids_BT, later, fetch, store)


def test_evidence_that_is_not_due_is_refused_by_the_engine(lm, bm25, ids):
    with pytest.raises(RalmError, match="retrieval is due at"):
        RALM(lm, bm25, how=FetchesLater(k=1, **SHAPE), when="every:4").score(ids)


def test_a_schedule_off_by_one(lm, bm25, ids, monkeypatch):
    """Segments whose evidence is fetched one token too late, as a wrong plan would make them."""
    import ralm.run

    right = ralm.run.plan
    monkeypatch.setattr(ralm.run, "plan", lambda *a: [Segment(s.start, s.stop, s.at and s.at + 1) for s in right(*a)])
    with breaks("causal"):
        check_causal(RALM(lm, bm25, how=Prepend(k=1, **SHAPE), when="every:2"), ids)


class SeesItsTarget(Plain):
    """Rows off by one: the distribution of a token is read after that token."""

    def logprobs(self, lm, ids_BT, segments, fetch, store):
        shifted = torch.cat([ids_BT[:, 1:], ids_BT[:, :1]], 1)
        return super().logprobs(lm, shifted, segments, fetch, store)


def test_rows_off_by_one(lm, ids):
    with breaks("causal"):
        check_causal(RALM(lm, how=SeesItsTarget()), ids)


@dataclass
class CountsCalls:
    """Not a function of the past: retrieves at every fifth question it is asked, whoever asks."""

    calls: int = 0
    adaptive = False

    def due(self, t, last, confidence):
        self.calls += 1
        return self.calls % 5 == 0


def test_a_schedule_with_a_memory(lm, bm25, ids):
    with breaks("one truth"):
        check_stepwise(RALM(lm, bm25, how=Prepend(k=1, **SHAPE), when=CountsCalls()), ids[:-1])


class MixesLogs(Ensemble):
    """Averages log-probabilities where probabilities are meant."""

    def _mix(self, logp_KSV, hits, targets, skip):
        return logp_KSV.mean(0)[skip:]


class WeighsRaw(Ensemble):
    """Weights that do not sum to one."""

    def _mix(self, logp_KSV, hits, targets, skip):
        return log_mix_tokens(logp_KSV[None, :, skip:], torch.log(torch.from_numpy(hits.scores[:1].copy())))[0]


@pytest.mark.parametrize("how", [MixesLogs, WeighsRaw])
def test_an_unnormalised_mixture(lm, bm25, ids, how):
    with breaks("normalised"):
        check_normalised(RALM(lm, bm25, how=how(k=3, **SHAPE), when="every:4"), ids)


class NotANumber(Ensemble):
    def _mix(self, logp_KSV, hits, targets, skip):
        return logp_KSV[0, skip:] * float("nan")


def test_nan_passes_no_law(lm, bm25, ids):
    ralm = RALM(lm, bm25, how=NotANumber(k=3, **SHAPE), when="every:4")
    for law, check in (("normalised", check_normalised), ("causal", check_causal), ("one truth", check_stepwise)):
        with breaks(law):
            check(ralm, ids)


def test_a_cache_that_keeps_old_evidence(lm, bm25, ids, monkeypatch):
    """A prefix compared by its length only goes on from the states of other passages."""
    from ralm.how.rows import _Seen

    def grown(self, rows, starts, beside=None):
        gap = {len(a) - len(b) for a, b in zip(rows, self.rows)}
        return gap.pop() if len(gap) == 1 and min(gap) > 0 else None

    monkeypatch.setattr(_Seen, "growth", grown)
    fixed = Alternates(bm25.store)
    with breaks("one truth"):
        check_stepwise(RALM(lm, fixed, how=Prepend(k=1, **SHAPE), when="every:1"), ids)


class Alternates(Fixed):
    """Finds one of two long passages, by the length of the query: evidence of equal length that changes."""

    def __init__(self, store):
        super().__init__(store, [0, 1, 2, 3])

    def search(self, queries, k=10, where=None, exclude=()):
        out = Hits.empty(len(queries), k)
        if k:
            out.ids[:, 0], out.scores[:, 0] = [[0, 2][len(q) % 2] for q in queries], 0.0
        return out


class AlwaysASeparator(Prepend):
    """Puts a line break in front of the text even without evidence."""

    def logprobs(self, lm, ids_BT, segments, fetch, store):
        newline = torch.tensor([lm.tokenizer.encode("\n")] * len(ids_BT))
        n = newline.shape[1]
        moved = [Segment(s.start + n, s.stop + n, None if s.at is None else s.at + n) for s in segments]
        for s, logp in super().logprobs(lm, torch.cat([newline, ids_BT], 1), moved, _back(fetch, n), store):
            yield Segment(s.start - n, s.stop - n, s.at), logp


def _back(fetch, n):
    return lambda q, k, s: fetch(q, k, Segment(s.start - n, s.stop - n, s.at - n))


def test_a_separator_without_evidence(lm, bm25, ids):
    with breaks("neutral"):
        check_neutral(RALM(lm, bm25, how=AlwaysASeparator(k=1, **SHAPE), when="every:4"), ids)


class WeighsOne(Ensemble):
    """Gives a single passage less than all of the weight."""

    def _mix(self, logp_KSV, hits, targets, skip):
        return logp_KSV[0, skip:] - 0.1 if len(logp_KSV) == 1 else super()._mix(logp_KSV, hits, targets, skip)


def test_one_passage_that_is_not_prepended(lm, bm25, ids):
    with breaks("degenerate"):
        check_degenerate(RALM(lm, bm25, how=WeighsOne(k=3, **SHAPE), when="every:4"), ids)


class NeverLearns(Ensemble):
    """Calls itself a posterior and keeps the prior."""

    def _mix(self, logp_KSV, hits, targets, skip):
        return log_mix_tokens(logp_KSV[None, :, skip:], self.log_prior(hits.scores[0]))[0]


def test_a_posterior_that_stays_the_prior(lm, bm25, ids):
    check_marginal(RALM(lm, bm25, how=Ensemble(k=3, temperature=3.0, **SHAPE)), "granite tower snow", ids[:12])
    with breaks("training equals inference"):
        check_marginal(RALM(lm, bm25, how=NeverLearns(k=3, temperature=3.0, **SHAPE)), "granite tower snow", ids[:12])


class DrawsFromAnother:
    """A retriever that answers differently each time it is asked."""

    def __init__(self, store):
        self.store, self.calls = store, 0

    def search(self, queries, k=10, where=None, exclude=()):
        self.calls += 1
        return Fixed(self.store, [self.calls % 4]).search(queries, k, where, exclude)


def test_a_retriever_that_changes_its_mind(lm, store):
    with breaks("one truth"):
        check_one_truth(RALM(lm, DrawsFromAnother(store), how=Prepend(k=1, **SHAPE)), "granite tower snow")


class Remembers:
    """Searches an index of an older version and says that it belongs to the newer one."""

    def __init__(self, old, store):
        self.inner, self.store = old, store

    def search(self, queries, k=10, where=None, exclude=()):
        return self.inner.search(queries, k, where, exclude)


def test_a_removed_document_that_is_still_read(lm, tmp_path):
    keep = [Document("a", "Granite is hard."), Document("b", "Snow on the mountain, the sea is near.")]
    had = Datastore.build(tmp_path / "had", [*keep, Document("x", "Snow on the tower, granite reef and candle.")])
    version = had.version
    retriever("bm25", had)
    had.remove(["x"])
    old = retriever("bm25", Datastore.open(tmp_path / "had", version=version))
    never = Datastore.build(tmp_path / "never", keep)
    text = lm.tokenizer.encode(TEXT)
    right, wrong = retriever("bm25", had), Remembers(old, had)
    systems = [RALM(lm, r, how=Prepend(k=1, **SHAPE), when="every:4") for r in (right, wrong, retriever("bm25", never))]
    check_forgetting(systems[0], systems[2], text, ["x"])
    check_retriever(right, ["snow on the tower"])
    with breaks("forgetting"):
        check_forgetting(systems[1], systems[2], text, ["x"])
    with breaks("not allowed"):
        check_retriever(wrong, ["snow on the tower"])


class Unsorted(Fixed):
    def search(self, queries, k=10, where=None, exclude=()):
        hits = super().search(queries, k, where, exclude)
        return Hits(hits.ids[:, ::-1].copy(), hits.scores[:, ::-1].copy())


def test_a_retriever_with_hits_out_of_order(store):
    check_retriever(Fixed(store, [0, 1, 2], [3.0, 2.0, 1.0]), ["x"], k=3)
    with breaks("scores descend"):
        check_retriever(Unsorted(store, [0, 1, 2], [3.0, 2.0, 1.0]), ["x"], k=3)
    with breaks("padding stands before a hit"):
        check_retriever(Unsorted(store, [0, 1, 2]), ["x"], k=5)


def test_comparisons_see_nan(ids):
    import numpy as np

    with breaks("law"):
        same(np.array([1.0, np.nan]), np.array([1.0, 2.0]), "law")


def test_laws_leave_the_system_as_it_was(lm, bm25):
    ralm = RALM(lm, bm25, how=Prepend(k=1, **SHAPE), when="every:4")
    before = replace(ralm)
    check_ralm(ralm, "granite snow", "tower?", [2])
    assert (ralm.how, ralm.when, ralm.where) == (before.how, before.when, before.where)
