"""Drawing texts: what is streamed is what is scored; batches, beams and speculation change how fast, never what."""


import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ralm.errors import CapabilityError, UsageError  # noqa: E402
from ralm.lm.hf import HF  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.speculate import Ahead  # noqa: E402
from ralm.types import Done, Retrieved, Token  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

KNN = "knn:k=9,lam=0.5,temperature=5"
READS = "prepend:k=1,query=8,tokens=20"
FUSIONS = ("none", KNN, f"{READS}+{KNN}", READS, "ensemble:k=2,query=8,tokens=20")
KINDS = ("gpt2", "llama", "qwen3", "gemma2", "gpt_neox", "opt")
ALL = (*KINDS, "bloom", "lfm2")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def grid(hows, kinds=ALL):
    """Every model with every method; the usual run takes each method once and the models in turn, the rest is slow."""
    usual = {(kinds[i % len(kinds)], how) for i, how in enumerate(hows)}
    return [(kind, how) if (kind, how) in usual else slow(kind, how) for how in dict.fromkeys(hows) for kind in kinds]


PROMPTS = ["The lighthouse of", "Snow on the granite reef, and", "", "Who saw the tower? Maria Holt, in the winter of 1873,"]


@pytest.fixture(scope="module")
def made(tiny, store, bm25):
    """A system by the kind of its model: (kind, how, when) -> RALM."""
    lms, stores = {}, {}

    def make(kind, how, when="every:4", index="exact"):
        if kind not in lms:
            lms[kind] = HF(tiny.make(kind), tiny.tokenizer(), window=64)
            key = "ffn_in" if kind not in ("bloom", "lfm2") else "hidden"
            stores[kind] = TokenStore.build(store, lms[kind], f"generate-{kind}", key=key, index=index)
        reads, knn = "prepend" in how or "ensemble" in how, "knn" in how
        return RALM(lms[kind], bm25 if reads else None, how=how, when=when if reads else "once",
                    tokens=stores[kind] if knn else None)

    return make


def drawn(events):
    """What a stream said: (token, ln p) pairs, retrievals, the end."""
    events = list(events)
    return ([(e.id, e.logp) for e in events if isinstance(e, Token)], [(e.at, e.query) for e in events if isinstance(e, Retrieved)],
            events[-1].text, events[-1].reason)


# ---- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), grid((KNN, f"{READS}+{KNN}") * 4))
def test_what_is_streamed_is_what_is_scored(made, kind, how):
    """Law 3 for kNN-LM, over the end of a window: greedy tokens are the argmax of the scored distributions, with their ln p."""
    ralm, prompt = made(kind, how), PROMPTS[1]
    tokens, *_ = drawn(ralm.stream(prompt, max_tokens=40))
    ids = [i for i, _ in tokens]
    logp_SV = ralm.distributions(ids, prompt=prompt)
    score = ralm.score(ids, prompt=prompt)
    assert np.allclose([p for _, p in tokens], score.logp, atol=2e-3)
    top = logp_SV.max(-1).values
    assert all(float(top[t] - logp_SV[t, i]) < 1e-3 for t, i in enumerate(ids)) and len(set(ids)) > 3


def test_sampling_from_neighbours_is_reproducible(made):
    ralm = made("llama", KNN)
    one, two, three = (drawn(ralm.stream(PROMPTS[0], max_tokens=12, temperature=1.0, top_p=0.9, seed=s)) for s in (1, 1, 2))
    assert one == two != three


# ---- several at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), grid(FUSIONS))
def test_texts_drawn_together_are_those_drawn_alone(made, kind, how):
    ralm = made(kind, how)
    for settings in (dict(max_tokens=36), dict(max_tokens=12, temperature=0.9, top_k=30, seed=7)):
        events = list(ralm.stream_many(PROMPTS, **settings))
        for i, prompt in enumerate(PROMPTS):
            ours = drawn(e for j, e in events if j == i)
            alone = drawn(ralm.stream(prompt, **(settings | dict(seed=settings.get("seed", 0) + i))))
            assert [t for t, _ in ours[0]] == [t for t, _ in alone[0]] and ours[1:] == alone[1:]
            assert np.allclose([p for _, p in ours[0]], [p for _, p in alone[0]], atol=2e-3)


def test_a_step_of_all_is_one_forward_and_one_search(made, monkeypatch):
    """Rows end at different times; those that go on stay one batch."""
    import copy

    ralm = made("llama", KNN)
    ends = copy.copy(ralm.lm)
    texts = [[e.id for e in ralm.stream(p, max_tokens=20) if isinstance(e, Token)] for p in PROMPTS]
    ends.eos = next(t for t in texts[0][3:] if 0 < sum(t in x[3:] for x in texts) < 4)  # some end, some do not
    ralm = RALM(ends, how=KNN, tokens=ralm.tokens)
    forwards, searches = [], []
    forward, search = ends.forward, ralm.tokens.search
    monkeypatch.setattr(ends, "forward", lambda ids, **k: (forwards.append(tuple(ids.shape)), forward(ids, **k))[1])
    monkeypatch.setattr(ralm.tokens, "search", lambda q, *a, **k: (searches.append(len(q)), search(q, *a, **k))[1])
    done = {i: e for i, e in ralm.stream_many(PROMPTS, max_tokens=20) if isinstance(e, Done)}
    assert {e.reason for e in done.values()} == {"eos", "length"} and sorted(done) == [0, 1, 2, 3]
    assert forwards[0][0] == 4 and all(shape[1] == 1 for shape in forwards[1:])
    assert [shape[0] for shape in forwards] == searches == sorted(searches, reverse=True) and searches[-1] < 4
    assert len(forwards) == max(e.tokens + (e.reason == "eos") for e in done.values())
    monkeypatch.undo()
    for i, prompt in enumerate(PROMPTS):
        assert done[i].text == ralm.generate(prompt, max_tokens=20)


def test_many_texts_stop_at_their_own_stops(lm):
    ralm = RALM(lm)
    whole = ralm.generate_many(PROMPTS[:2], max_tokens=20)
    stop = whole[0][4:6]
    assert ralm.generate_many(PROMPTS[:2], max_tokens=20, stop=[stop]) == [ralm.generate(p, max_tokens=20, stop=[stop])
                                                                           for p in PROMPTS[:2]]
    assert ralm.generate_many([]) == []


# ---- beams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "beams", "penalty"), [
    (kind, *rest) if kind in ("llama", "gemma2") else slow(kind, *rest) for kind in KINDS
    for rest in ((1, 1.0), (3, 1.0), (4, 0.0), (5, 2.0))])
def test_beams_are_those_of_transformers(tiny, kind, beams, penalty):
    lm = HF(tiny.make(kind), tiny.tokenizer(), window=64)
    ids = torch.tensor([[lm.bos, *lm.tokenizer.encode("Who saw the tower?")]])
    first = int(lm.forward(ids).logits[0, -1].topk(9).indices[-1])
    for eos in (lm.eos, first):  # one that does not come, and one that is near
        lm.eos = eos
        with torch.no_grad():
            theirs = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, num_beams=beams, do_sample=False,
                                       num_return_sequences=beams, length_penalty=penalty, eos_token_id=eos, pad_token_id=0,
                                       return_dict_in_generate=True, output_scores=True)
        ours = RALM(lm).beam("Who saw the tower?", beams=beams, max_tokens=9, length_penalty=penalty)
        want = [tuple(x[:x.index(eos)] if eos in x else x) for x in theirs.sequences[:, ids.shape[1]:].tolist()]
        if beams == 1:  # transformers searches greedily then, and tells no score
            assert ours[0].tokens == want[0]
            continue
        assert [h.tokens for h in ours] == want
        assert np.allclose([h.score for h in ours], theirs.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("how", [*map(slow, ("none", f"{READS}+{KNN}")), KNN])
def test_as_many_beams_as_tokens_search_everything(made, how):
    ralm, V = made("llama", how), made("llama", how).lm.vocab
    best = ralm.beam(PROMPTS[0], beams=V, max_tokens=2, length_penalty=0.0)
    first_V = ralm.distributions([0], prompt=PROMPTS[0])[0]
    pairs = {}
    for t in range(V):
        if t == ralm.lm.eos:
            continue
        second_V = ralm.distributions([t, 0], prompt=PROMPTS[0])[1]
        pairs |= {((t, u) if u != ralm.lm.eos else (t,)): float(first_V[t] + second_V[u]) for u in range(V)}
    pairs[()] = float(first_V[ralm.lm.eos])
    want = sorted(pairs.items(), key=lambda pair: -pair[1])[:8]
    assert [h.tokens for h in best[:8]] == [ids for ids, _ in want]
    assert np.allclose([h.logp for h in best[:8]], [p for _, p in want], atol=1e-3)


@pytest.mark.parametrize("how", FUSIONS[1:])
def test_a_beam_has_the_probability_that_scoring_gives_it(made, how):
    """Over windows and changes of evidence; and with one beam it is the greedy stream."""
    ralm = made("llama", how)
    best = ralm.beam(PROMPTS[3], beams=3, max_tokens=20)
    assert [h.score for h in best] == sorted((h.score for h in best), reverse=True) and len({h.tokens for h in best}) == 3
    for h in best:
        assert h.reason == "length" and h.logp == pytest.approx(ralm.score(list(h.tokens), prompt=PROMPTS[3]).logp.sum(), abs=5e-3)
    (greedy,) = ralm.beam(PROMPTS[3], beams=1, max_tokens=20)
    assert greedy.text == ralm.generate(PROMPTS[3], max_tokens=20) and greedy.logp <= best[0].logp + 1e-3


# ---- speculation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "how"), grid((*FUSIONS[1:], KNN, f"{READS}+{KNN}", KNN, f"{READS}+{KNN}")))
def test_speculation_changes_no_bit(made, kind, how):
    """Tokens, their ln p to the last bit, retrievals and their queries; greedy and drawn; over windows and stops."""
    ralm = made(kind, how)
    for prompt, ways, settings in ((PROMPTS[1], (5, "auto"), dict(max_tokens=40)),
                                   (PROMPTS[2], (2,), dict(max_tokens=12, temperature=1.0, seed=3)),
                                   (PROMPTS[3], (4,), dict(max_tokens=12, temperature=0.6, top_p=0.9, seed=4))):
        plain = drawn(ralm.stream(prompt, **settings))
        for steps in ways:
            assert drawn(ralm.stream(prompt, speculate=steps, **settings)) == plain, (prompt, steps)


@pytest.mark.parametrize("how", [KNN, f"{READS}+{KNN}", READS])
def test_speculation_is_put_to_the_test(made, how, monkeypatch):
    """Steps turn out right and wrong, and one search serves several tokens: without this the test above could hold of nothing."""
    ralm = made("llama", how, when="every:1")
    asked = ralm.tokens if "knn" in how else ralm.retriever
    sizes, search = [], asked.search
    monkeypatch.setattr(asked, "search", lambda q, *a, **k: (sizes.append(len(q)), search(q, *a, **k))[1])
    right = checked = 0
    for prompt in PROMPTS:
        ahead = Ahead(4)
        events = list(ralm.stream(prompt, max_tokens=24, speculate=ahead))
        assert events[-1].tokens == 24 and ahead.checked >= 20 and ahead.searches < 24
        right, checked = right + ahead.right, checked + ahead.checked
    assert 0 < right < checked and max(sizes) == 4 and len(sizes) < 24 * len(PROMPTS)


def test_the_end_and_stops_are_found_where_they_are(made):
    import copy

    ralm = made("llama", KNN)
    ids = [e.id for e in ralm.stream(PROMPTS[1], max_tokens=24) if isinstance(e, Token)]
    ends = copy.copy(ralm.lm)
    ends.eos = ids[9]
    ended = RALM(ends, how=KNN, tokens=ralm.tokens)
    stop = ralm.generate(PROMPTS[1], max_tokens=24)[5:7]
    for r, settings in ((ended, {}), (ralm, dict(stop=[stop])), (ralm, dict(exclude=["d1", "d6"]))):
        plain = drawn(r.stream(PROMPTS[1], max_tokens=24, **settings))
        for steps in (3, 8):
            assert drawn(r.stream(PROMPTS[1], max_tokens=24, speculate=steps, **settings)) == plain


def test_inverted_lists_answer_each_query_alone(made, store, monkeypatch):
    """Of many queries an approximate index may find others than of one: the check asks one by one."""
    pytest.importorskip("faiss")
    from ralm.index import inverted
    from ralm.what import token_store

    monkeypatch.setattr(inverted, "LEAST", 100)
    lm = made("llama", "none").lm
    tokens = TokenStore.build(store, lm, "lists", index="ivf")
    search = token_store.nearest.exact
    monkeypatch.setattr(token_store._Leaf, "_search", lambda self, q, k, allowed: (
        self.near.search(q, k, allowed), search(self.rows.keys, q, k, allowed))[1] if len(q) == 1 else 1 / 0)
    assert tokens.leaves[0].near is not None
    ralm = RALM(lm, how=KNN, tokens=tokens)
    assert drawn(ralm.stream(PROMPTS[0], max_tokens=12, speculate=4)) == drawn(ralm.stream(PROMPTS[0], max_tokens=12))


def test_how_many_steps_pay():
    """OS^3: many where a search is dear and guesses are right, one where it is cheap or they are wrong."""
    def chosen(right, searching, alone=0.1):
        ahead = Ahead(alone=alone)
        ahead.rounds.extend([(8, 8, right, 8 * 0.01, searching)] * 6)
        return ahead.next()

    assert chosen(8, 0.12) > 16 and 3 < chosen(6, 0.12) < chosen(8, 0.12) and chosen(0, 0.12) == 1
    assert chosen(6, 8 * 0.1) < chosen(6, 0.12)  # a search of eight costs eight searches: less is gained
    assert Ahead.of(None) is Ahead.of(0) is Ahead.of("1") is None and Ahead.of("6").steps == 6 and Ahead.of("auto").next() > 1


def test_what_cannot_be_is_refused_before_any_work(made, lm):
    ralm = RALM(lm)
    for ask, line in ((lambda: ralm.stream("x", speculate="many"), "speculate=many"),
                      (lambda: ralm.stream("x", speculate=-2), "speculate=-2"),
                      (lambda: ralm.stream_many("x"), "list of them"), (lambda: ralm.stream_many(["x"], max_tokens=0), "no token"),
                      (lambda: ralm.beam("x", beams=0), "beams"), (lambda: ralm.beam("x", length_penalty="a"), "length_penalty")):
        with pytest.raises(UsageError, match=line):
            ask()


class Reads:
    name, gives = "a reader", frozenset({"spans"})


def test_a_reader_draws_nothing():
    for ask in (lambda r: r.stream_many(["x"]), lambda r: r.beam("x"), lambda r: r.stream("x", speculate=4)):
        with pytest.raises(CapabilityError, match="spans only"):
            ask(RALM(Reads()))
