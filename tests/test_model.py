"""The engine: against transformers' own generate, windows, exclusion, filters, schedules, caches, stop texts, provenance."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ralm.errors import CapabilityError, RalmError, UsageError  # noqa: E402
from ralm.how.input import Ensemble, Prepend  # noqa: E402
from ralm.how.rows import PrefixCache  # noqa: E402
from ralm.lm.hf import HF  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import Fixed, distance  # noqa: E402
from ralm.types import Done, Hits, Retrieved, Token  # noqa: E402

SHAPE = dict(query=8, tokens=24)
TEXT = "Snow lies on the granite reef, and Maria Holt saw the tower in winter. "


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma2", "opt", "bloom", "lfm2"])
def test_greedy_streams_equal_transformers_generate(tiny, kind):
    made = HF(tiny.make(kind), tiny.tokenizer(), window=64)
    prompt = "Who saw the tower?"
    ids = torch.tensor([[made.bos, *made.tokenizer.encode(prompt)]])
    with torch.no_grad():
        out = made.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, use_cache=True,
                                  return_dict_in_generate=True, output_logits=True)
    theirs = out.sequences[0, ids.shape[1]:].tolist()
    logp = [float(torch.log_softmax(x[0].float(), -1)[t]) for x, t in zip(out.logits, theirs)]
    events = list(RALM(made).stream(prompt, max_tokens=16))
    ours = [e for e in events if isinstance(e, Token)]
    if made.eos in theirs:
        theirs = theirs[:theirs.index(made.eos)]
    assert [e.id for e in ours] == theirs and len(set(theirs)) > 2
    assert np.allclose([e.logp for e in ours], logp[:len(theirs)], atol=1e-3)


def test_scoring_without_retrieval_is_the_model(lm):
    ids = lm.tokenizer.encode(TEXT)[:60]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[lm.bos, *ids]]), use_cache=False).logits[0, :-1]
    theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    score = RALM(lm).score(ids)
    assert np.allclose(score.logp, theirs, atol=1e-4) and score.tokens.tolist() == ids and (score.at == -1).all()


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 90), window=st.integers(4, 40), stride=st.integers(1, 40))
def test_each_token_sees_the_context_its_window_says(lm, n, window, stride):
    ids = (lm.tokenizer.encode(TEXT) * 2)[:n]
    if stride > window:
        with pytest.raises(UsageError, match="must lie between"):
            RALM(lm).score(ids, window=window, stride=stride)
        return
    ours = RALM(lm).distributions(ids, window=window, stride=stride)
    assert len(ours) == n
    for t in {0, n // 2, n - 1}:
        begin = 0 if t < window else window + (t - window) // stride * stride + stride - window
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([[lm.bos, *ids[begin:t]]]), use_cache=False).logits[0, -1]
        theirs = torch.log_softmax(logits, -1)
        assert distance(ours[t], theirs) < 1e-4


def test_units_and_convention(lm, bm25):
    text = "Schnee auf Granit: naïve 日本 "
    score = RALM(lm, bm25, how=Prepend(**SHAPE), when="every:4", where="even = true").score(text, exclude=["d0"])
    assert score.bytes == len(text.encode()) and score.words == 5 and len(score.logp) == len(lm.tokenizer.encode(text))
    c = score.convention
    assert c["window"] == 64 and c["evidence_tokens"] == 24 and c["stride"] == 20 and c["excluded"] == ["d0"]
    assert c["where"] == "even = true" and "EveryN(n=4)" in c["when"] and "k=1" in c["how"] and c["retriever"]
    empty = RALM(lm, bm25, how=Prepend(**SHAPE)).score("")
    assert len(empty.logp) == 0 and RALM(lm).distributions("").shape == (0, lm.vocab)


def read(ralm, score):
    return {c.document for e in score.evidence for c in ralm.store.chunks(e.ids.tolist())}


def test_excluded_and_filtered_documents_are_never_read(lm, bm25, store):
    ralm = RALM(lm, bm25, how=Prepend(k=2, **SHAPE), when="every:4")
    ids = lm.tokenizer.encode(TEXT)
    before = read(ralm, ralm.score(ids))
    assert {"d1", "d6"} <= before
    after = read(ralm, ralm.score(ids, exclude=["d6", "d1"]))
    assert after and not {"d1", "d6"} & after
    assert "d6" not in read(ralm, ralm.score(ids, exclude="d6"))  # one id as one string is one id, not its letters
    for exclude in ((), ["d6", "d1"]):  # streams and answers keep to it too
        told = [e for e in ralm.stream(TEXT, max_tokens=3, exclude=exclude) if isinstance(e, Retrieved)]
        found = {c.document for e in told for c in e.passages}
        answered = {c.document for c in ralm.answer(TEXT, max_tokens=3, exclude=exclude).evidence}
        for documents in (found, answered):
            assert documents and (not {"d1", "d6"} & documents) is bool(exclude)
    even = RALM(lm, bm25, how=Prepend(k=2, **SHAPE), when="every:4", where="even = true")
    documents = read(even, even.score(ids))
    assert documents and all(int(d[1:]) % 2 == 0 for d in documents)


def test_where_nothing_may_be_read_nothing_is_kept_free(lm, bm25):
    """A filter that no document passes leaves the model alone, with the whole window for the text."""
    ids, base = lm.tokenizer.encode(TEXT * 2), RALM(lm).score(lm.tokenizer.encode(TEXT * 2))
    evens = [f"d{i}" for i in range(0, 10, 2)]
    for where, exclude in (("even = true", evens), ("even = true and even = false", [])):
        ralm = RALM(lm, bm25, how=Prepend(**SHAPE), when="every:4", where=where)
        score = ralm.score(ids, exclude=exclude)
        assert np.array_equal(score.logp, base.logp) and not score.evidence
        assert score.convention["window"] == lm.window and score.convention["evidence_tokens"] == 0


def test_never_retrieves_nothing_even_after_a_prompt(lm, bm25):
    ralm = RALM(lm, bm25, how=Prepend(**SHAPE), when="never")
    assert not ralm.score(TEXT, prompt="granite?").evidence
    assert not [e for e in ralm.stream("granite?", max_tokens=4) if isinstance(e, Retrieved)]


def test_where_and_when_retrieval_happens(lm, bm25):
    ids = lm.tokenizer.encode(TEXT)[:30]
    score = RALM(lm, bm25, how=Prepend(**SHAPE), when="every:8").score(ids)
    assert [e.at for e in score.evidence] == [8, 16, 24]
    for e in score.evidence:  # the query is the 8 tokens before, never one that is to be predicted
        assert e.query == lm.tokenizer.decode(ids[e.at - 8:e.at])
    assert score.at.tolist() == [-1] * 8 + [8] * 8 + [16] * 8 + [24] * 6
    asked = RALM(lm, bm25, how=Prepend(**SHAPE)).score(ids, prompt="Who saw the tower?")
    n = len(lm.tokenizer.encode("Who saw the tower?"))
    assert [(e.at, e.query) for e in asked.evidence] == [(n, "Who saw the tower?")]
    other = RALM(lm, bm25, how=Prepend(**SHAPE)).score(ids, prompt="Who saw the tower?", query="granite")
    assert [e.query for e in other.evidence] == ["granite"]


@pytest.mark.parametrize("when", ["once", "every:4", "adaptive:theta=0.5", "never"])
def test_a_query_is_asked_even_where_there_is_no_prompt(lm, bm25, when):
    ralm, ids = RALM(lm, bm25, how=Prepend(**SHAPE), when=when), lm.tokenizer.encode(TEXT)[:20]
    score = ralm.score(ids, query="granite")
    first = [] if when == "never" else [(0, "granite")]
    assert [(e.at, e.query) for e in score.evidence][:1] == first and score.at[0] == (-1 if when == "never" else 0)
    told = next(iter(ralm.stream("", query="granite", max_tokens=1)))
    assert isinstance(told, Retrieved) is (when != "never")
    whole, steps = ralm.distributions(ids, query="granite"), ralm.distributions(ids, query="granite", stepwise=True)
    assert distance(whole, steps) < 1e-4
    assert (0 in {e.at for e in ralm.score(ids, query="").evidence}) is False


def test_adaptive_retrieves_exactly_where_the_model_is_unsure(lm, bm25):
    ids = lm.tokenizer.encode(TEXT)[:30]
    base = RALM(lm).distributions(ids)
    sure = base.max(-1).values.exp().sort().values
    theta = float(sure[14:16].mean())  # between two tokens, so that rounding decides nothing
    first = next(t for t in range(1, len(ids)) if float(base[t].max().exp()) < theta)
    score = RALM(lm, bm25, how=Prepend(**SHAPE), when=f"adaptive:theta={theta},rest=5").score(ids)
    at = [e.at for e in score.evidence]
    assert at[0] == first and all(b - a >= 5 for a, b in pairwise(at))
    assert not RALM(lm, bm25, how=Prepend(**SHAPE), when="adaptive:theta=0").score(ids).evidence
    every = RALM(lm, bm25, how=Prepend(**SHAPE), when="adaptive:theta=1").score(ids)
    assert [e.at for e in every.evidence] == list(range(1, 30))


@pytest.mark.parametrize("how", ["none", Prepend(k=2, **SHAPE), Ensemble(k=3, **SHAPE),
                                 Ensemble(k=3, weights="posterior", **SHAPE)])
@pytest.mark.parametrize("when", ["once:6", "every:4"])
def test_distributions_of_a_window_are_made_in_pieces_that_fit(lm, bm25, how, when, monkeypatch):
    """A long window times a large vocabulary is gigabytes; in pieces it is bounded, and nothing changes."""
    from ralm.how import rows

    ralm, ids = RALM(lm, bm25, how=how, when=when), lm.tokenizer.encode(TEXT * 2)[:70]
    whole, forward, sizes = ralm.score(ids), lm.forward, []
    monkeypatch.setattr(lm, "forward", lambda ids, **k: (out := forward(ids, **k), sizes.append(out.logits.numel()))[0])
    most = 9 * getattr(ralm.how, "k", 1) * lm.vocab
    monkeypatch.setattr(rows, "BATCH_LOGITS", most)
    pieces = ralm.score(ids)
    assert np.allclose(pieces.logp, whole.logp, atol=2e-4) and pieces.at.tolist() == whole.at.tolist()
    assert [(e.at, e.query, e.ids.tolist()) for e in pieces.evidence] == [(e.at, e.query, e.ids.tolist()) for e in whole.evidence]
    if "posterior" not in repr(how):  # which looks back to its retrieval
        assert max(sizes) <= most and len(sizes) > 3


class Searches:
    """A real retriever that counts how often it is asked and how many queries at once."""

    def __init__(self, inner):
        self.inner, self.store, self.sizes = inner, inner.store, []

    def search(self, queries, k=10, where=None, exclude=()):
        self.sizes.append(len(queries))
        return self.inner.search(queries, k, where, exclude)


def test_scoring_searches_once_per_window_and_streaming_once_per_retrieval(lm, bm25):
    counted = Searches(bm25)
    RALM(lm, counted, how=Prepend(**SHAPE), when="every:4").score(lm.tokenizer.encode(TEXT)[:36])
    assert counted.sizes == [8]
    counted.sizes.clear()
    list(RALM(lm, counted, how=Prepend(**SHAPE), when="every:4").stream("granite", max_tokens=9))
    assert counted.sizes == [1, 1, 1]


@pytest.fixture
def caches(monkeypatch):
    """Every PrefixCache that is made while a test runs."""
    made, init = [], PrefixCache.__init__

    def remember(self, lm):
        init(self, lm)
        made.append(self)

    monkeypatch.setattr(PrefixCache, "__init__", remember)
    return made


@pytest.mark.parametrize("how", [Prepend(k=1, **SHAPE), Ensemble(k=2, **SHAPE), Ensemble(k=2, weights="posterior", **SHAPE)])
def test_streaming_reads_a_prefix_once(lm, store, caches, how):
    """The same evidence again keeps the cache: one reading of the prefix, then one step a token."""
    list(RALM(lm, Fixed(store, [1, 2]), how=how, when="every:2").stream("Granite", max_tokens=12))
    assert (caches[0].prefills, caches[0].steps) == (1, 11)


def test_streaming_reads_a_prefix_again_only_where_evidence_changed(lm, bm25, caches):
    events = list(RALM(lm, bm25, how=Prepend(k=1, **SHAPE), when="every:4").stream("Granite and snow at the tower", max_tokens=12))
    evidence = [tuple(e.ids) for e in events[-1].evidence]
    changes = 1 + sum(a != b for a, b in pairwise(evidence))
    assert len(evidence) == 3 and caches[0].prefills <= changes and caches[0].prefills + caches[0].steps == 12


def test_stop_texts_are_not_part_of_the_text_even_across_tokens(lm):
    whole = RALM(lm).generate("Granite", max_tokens=20)
    for begin, end in ((4, 7), (0, 2), (9, 10)):
        stop = whole[begin:end]
        events = list(RALM(lm).stream("Granite", max_tokens=20, stop=[stop, "never written"]))
        assert events[-1].text == whole[:whole.index(stop)] and events[-1].reason == "stop"
        assert "".join(e.text for e in events if isinstance(e, Token)) == events[-1].text
    assert RALM(lm).generate("Granite", max_tokens=20, stop="") == whole


def test_the_end_token_ends_the_text_and_is_no_part_of_it(lm):
    import copy

    ids = [e.id for e in RALM(lm).stream("Granite", max_tokens=12) if isinstance(e, Token)]
    ends = copy.copy(lm)
    ends.eos = next(i for n, i in enumerate(ids) if n > 2 and i not in ids[:n])
    events = list(RALM(ends).stream("Granite", max_tokens=12))
    assert [e.id for e in events if isinstance(e, Token)] == ids[:ids.index(ends.eos)] and events[-1].reason == "eos"
    assert events[-1].tokens == ids.index(ends.eos) and events[-1].text == lm.tokenizer.decode(ids[:ids.index(ends.eos)])


def test_tokens_add_up_to_the_text_and_split_characters_wait(lm):
    events = list(RALM(lm).stream("naïve 日本", max_tokens=24, temperature=1.5, seed=3))
    tokens = [e for e in events if isinstance(e, Token)]
    assert "".join(e.text for e in tokens) == events[-1].text and len(tokens) == events[-1].tokens == 24
    assert events[-1].text == lm.tokenizer.decode([e.id for e in tokens]).rstrip("\ufffd")


def test_sampling_is_reproducible_and_reports_the_systems_probability(lm, bm25):
    ralm = RALM(lm, bm25, how=Prepend(**SHAPE))
    drawn = [list(ralm.stream("granite?", max_tokens=8, temperature=0.7, top_p=0.9, seed=seed)) for seed in (1, 1, 2)]
    one, two, three = ([e for e in events if isinstance(e, Token)] for events in drawn)
    assert one == two != three
    score = ralm.score([e.id for e in one], prompt="granite?")
    assert np.allclose([e.logp for e in one], score.logp, atol=2e-4)


def test_events_come_in_order(lm, bm25):
    events = list(RALM(lm, bm25, how=Prepend(**SHAPE), when="every:4").stream("Who built it? granite", max_tokens=9))
    assert isinstance(events[0], Retrieved) and isinstance(events[-1], Done) and events[-1].reason == "length"
    assert [e.at for e in events if isinstance(e, Retrieved)] == [e.at for e in events[-1].evidence]
    for e in events:
        for c in e.passages if isinstance(e, Retrieved) else ():
            assert c.quote == bm25.store.document(c.document).text[c.start:c.end]


def test_a_prompt_longer_than_the_window_keeps_its_end(lm, bm25):
    ralm = RALM(lm, bm25, how=Prepend(**SHAPE))
    events = list(ralm.stream(TEXT * 3 + "granite?", max_tokens=6))
    tokens = [e for e in events if isinstance(e, Token)]
    score = ralm.score([e.id for e in tokens], prompt=TEXT * 3 + "granite?")
    assert np.allclose([e.logp for e in tokens], score.logp, atol=2e-4)


def test_explain_says_what_moved(lm, bm25):
    ralm = RALM(lm, bm25, how=Ensemble(k=2, **SHAPE), when="every:4")
    p = ralm.explain(TEXT * 2)  # several windows: evidence must not outlive its own
    assert "".join(p.tokens) == TEXT * 2 and len(p.logp) == len(p.at) == len(p.tokens)
    assert sum(p.documents.values()) == pytest.approx(float((p.logp - p.logp_lm)[p.at >= 0].sum()), abs=1e-3)
    assert np.allclose((p.logp - p.logp_lm)[p.at < 0], 0, atol=1e-4)  # no evidence, nothing moved: the windows are the same
    assert set(p.documents) <= {d.id for d in bm25.store.documents()} and (p.at < np.arange(len(p.at)) + 1).all()
    alone = RALM(lm, bm25, how=Ensemble(k=2, **SHAPE), when="every:4").explain(TEXT, prompt="granite?")
    assert alone.at[0] == len(lm.tokenizer.encode("granite?"))


def test_explaining_excludes_asks_and_cuts_windows_as_scoring_does(lm, bm25):
    ralm = RALM(lm, bm25, how=Prepend(**SHAPE), when="every:4")
    assert "d6" in ralm.explain(TEXT).documents
    told = dict(prompt="tower?", exclude=["d6"], window=50, stride=9, query="granite")
    p, score = ralm.explain(TEXT, **told), ralm.score(TEXT, **told)
    assert np.array_equal(p.logp, score.logp) and p.at.tolist() == score.at.tolist()
    assert p.evidence[0].query == "granite" and p.documents and "d6" not in p.documents


def test_what_moved_is_shared_by_the_weights(lm, store):
    """Two passages of two documents under one retrieval: the nats it moved are theirs in the proportion of their weights."""
    for scores, share in (([2.0, 0.0], 1 / (1 + np.exp(-2.0))), ([0.0, 0.0], 0.5)):
        p = RALM(lm, Fixed(store, [1, 9], scores), how=Ensemble(k=2, **SHAPE), when="once:1").explain("Snow on granite.")
        first, second = (store.chunks([c])[0].document for c in (1, 9))
        moved = float((p.logp - p.logp_lm)[p.at >= 0].sum())
        assert first != second and abs(moved) > 0.1 and p.documents == pytest.approx(
            {first: share * moved, second: (1 - share) * moved}, abs=1e-3)


def test_a_blank_query_finds_nothing_and_moves_no_other(lm, store):
    """Even where a retriever would find something for it (a dense one does); the other queries keep their own hits."""
    ralm = RALM(lm, Alternates(store), how=Prepend(**SHAPE))
    found = ralm._timed(ralm.retriever, ["", "ab", " \n", "abc", ""], 1, ())[0]
    assert [h.ids.tolist() for h in found] == [[[]], [[0]], [[]], [[2]], [[]]]
    assert not RALM(lm, Alternates(store), how=Prepend(**SHAPE)).score("\n\n\n", prompt="  ").evidence[0].ids.size


class Alternates(Fixed):
    """Finds one of two chunks by the length of the query."""

    def __init__(self, store):
        super().__init__(store, [0, 2])

    def search(self, queries, k=10, where=None, exclude=()):
        out = Hits.empty(len(queries), k)
        out.ids[:, 0], out.scores[:, 0] = [[0, 2][len(q) % 2] for q in queries], 0.0
        return out


# ---- answers ----------------------------------------------------------------------------------------------------------


def test_answers_of_a_language_model_read_evidence_even_with_how_none(lm, bm25, store):
    for how in ("none", Prepend(k=2, **SHAPE), Ensemble(k=2, **SHAPE)):
        answer = RALM(lm, bm25, how=how).answer("tower?", max_tokens=6)
        assert answer.evidence and all(c.quote == store.document(c.document).text[c.start:c.end] for c in answer.evidence)
    nothing = RALM(lm, bm25).answer("zzzz qqqq", max_tokens=4)
    assert nothing.abstained and nothing.answer == "" and not nothing.citations


def test_answers_of_a_reader_are_verbatim(bm25, store):
    from pathlib import Path

    from ralm.lm.reader import Reader

    folder = Path(__file__).resolve().parents[1] / "checkpoints" / "reader"
    if not (folder / "reader.safetensors").is_file():
        pytest.skip(f"no checkpoint in {folder}")
    reader, told = Reader.load(folder), []
    read = reader.read
    reader.read = lambda question, texts, **given: (told.append(given), read(question, texts, **given))[1]
    ralm = RALM(reader, bm25)
    answer = ralm.answer("Who built the lighthouse of Brennick?", k=4)
    # the retriever's say and the titles reach the reader
    odds = np.exp([e.score - answer.evidence[0].score for e in answer.evidence])
    assert len(odds) > 1 and np.allclose(np.exp(told[0]["logp"]), odds / odds.sum())
    assert told[0]["titles"] == [store.document(e.document).title for e in answer.evidence] and any(told[0]["titles"])
    assert not answer.abstained and "Maria Holt" in answer.answer
    assert answer.citations and answer.citations[0].score <= np.exp(answer.score) + 1e-6
    for c in [*answer.citations, *answer.evidence]:
        assert c.quote == store.document(c.document).text[c.start:c.end]
    assert any(answer.answer in c.quote for c in answer.citations)
    assert ralm.answer("Who built the lighthouse of Brennick?", exclude=[d.id for d in store.documents()]).abstained
    for ask in (lambda: ralm.score("x"), lambda: ralm.stream("x"), lambda: ralm.explain("x")):
        with pytest.raises(CapabilityError, match="gives spans only"):
            ask()


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_refused_before_any_work(lm, bm25):
    with pytest.raises(UsageError, match="needs a retriever"):
        RALM(lm, how="prepend")
    with pytest.raises(UsageError, match="question is empty"):
        RALM(lm, bm25).answer("  ")
    with pytest.raises(UsageError, match="needs a retriever to read from"):
        RALM(lm).answer("x")
    with pytest.raises(UsageError, match="k=0"):
        RALM(lm, bm25).answer("x", k=0)
    with pytest.raises(UsageError, match="tokens=24 cannot be shared by k=50"):
        RALM(lm, bm25, how=Prepend(**SHAPE)).answer("x", k=50)
    ralm = RALM(lm, bm25, how=Prepend(**SHAPE))
    for settings_, line in ((dict(window=1), "window 1"), (dict(window=65), "window 65"), (dict(window=0), "window 0"),
                            (dict(window=24), "leaves 0"), (dict(stride=41), "stride 41"), (dict(stride=0), "stride 0")):
        with pytest.raises(UsageError, match=line):
            ralm.score("granite", **settings_)
        with pytest.raises(UsageError, match=line):
            ralm.stream("granite", **settings_)  # not only when the first event is asked for
    for settings_ in (dict(max_tokens=0), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0)):
        with pytest.raises(UsageError):
            ralm.stream("granite", **settings_)


class Reads:
    """What a reader is to the engine: spans, and nothing a fusion could use."""

    name, gives = "a reader", frozenset({"spans"})


def test_a_reader_takes_no_fusion(bm25):
    for how in ("prepend", "ensemble"):
        with pytest.raises(CapabilityError, match="needs logits from the model, 'a reader' gives spans only"):
            RALM(Reads(), bm25, how=how)
    assert RALM(Reads(), bm25).how.how == "none"


class AsksTwice(Prepend):
    def logprobs(self, lm, ids_BT, segments, fetch, store):
        return super().logprobs(lm, ids_BT, segments, lambda _, k, s: fetch(["snow", "granite"], k, s), store)


def test_a_fusion_asks_one_query_per_text(lm, bm25):
    """The engine runs one text at a time; the second query would be dropped without a word."""
    with pytest.raises(RalmError, match="2 queries for one text"):
        RALM(lm, bm25, how=AsksTwice(**SHAPE), when="every:4").score(TEXT)
