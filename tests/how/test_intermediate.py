"""CrossAttend through the engine: which evidence acts where, what is searched and when, what may stand together."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ralm.errors import CapabilityError, FingerprintError, UsageError  # noqa: E402
from ralm.how.rows import Beside, PrefixCache, logp_rows, state_rows  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.speculate import Ahead  # noqa: E402
from ralm.testing import distance  # noqa: E402
from ralm.types import Document, Done, Retrieved, Token  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.neighbours import NeighbourStore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

KNN = "knn:k=9,lam=0.5,temperature=5"
TEXT = "Snow lies on the granite reef, and Maria Holt saw the tower of Brennick in winter."
PROMPTS = ["The lighthouse of", "Snow on the granite reef, and", "", "Who saw the tower? Maria Holt, in the winter of 1873,"]


@pytest.fixture
def ids(retro):
    return retro.tokenizer.encode(TEXT)


@pytest.fixture
def ralm(retro, neighbours):
    return RALM(retro, neighbours=neighbours, how="retro:k=2")


@pytest.fixture(scope="module")
def both(retro, neighbours, store):
    tokens = TokenStore.build(store, retro, "intermediate", index="exact")
    return RALM(retro, neighbours=neighbours, how=f"retro:k=2+{KNN}", tokens=tokens)


class Told:
    """A neighbour database that finds what it is told, by query, and remembers what it was asked."""

    def __init__(self, inner, found=None):
        self.inner, self.found, self.asked = inner, found or {}, []
        for name in ("m", "store", "settings", "fingerprint", "retriever", "gather", "chunks", "any"):
            setattr(self, name, getattr(inner, name))

    def search(self, chunks, k, where=None, exclude=()):
        self.asked.append(list(chunks))
        hits = self.inner.search(chunks, k, where=where, exclude=exclude)
        for q, text in enumerate(chunks):
            if text in self.found:
                hits.ids[q], hits.scores[q] = self.found[text], 1.0
        return hits


# ---- which evidence acts where ------------------------------------------------------------------------------------------


def test_the_oracle_one_forward_with_neighbours_given_by_hand(retro, neighbours, ralm, ids):
    """One window: the model itself, told the neighbours of every chunk, without the engine."""
    ids, m = ids[:40], retro.m
    row = [retro.bos, *ids]
    queries = [retro.tokenizer.decode(row[max(1, u * m):(u + 1) * m]) for u in range(len(ids) // m)]
    tokens, mask = neighbours.gather(neighbours.search(queries, 2).ids)
    from ralm.lm.retro import Neighbours

    with torch.no_grad():
        out = retro.forward(torch.tensor([row[:-1]]), neighbours=Neighbours(torch.from_numpy(tokens)[None],
                                                                            torch.from_numpy(mask)[None]))
    want = torch.log_softmax(out.logits[0].float(), -1)
    assert distance(ralm.distributions(ids), want) < 1e-4
    scored = ralm.score(ids)
    assert [e.query for e in scored.evidence] == queries and [e.at for e in scored.evidence] == [(u + 1) * m - 1 for u in range(6)]
    assert scored.under.tolist() == [(t + 1) // m - 1 for t in range(40)] and {e.kind for e in scored.evidence} == {"neighbours"}
    assert scored.at.tolist() == [-1 if u < 0 else (u + 1) * m - 1 for u in scored.under]


@pytest.mark.parametrize("u", [0, 2, 4])
def test_neighbours_of_a_chunk_act_from_its_last_token_on(retro, neighbours, ralm, ids, u):
    m, ids = retro.m, ids[:40]
    query = ralm.score(ids).evidence[u].query
    other = replace(ralm, neighbours=Told(neighbours, {query: [1, 3]}))
    moved = (other.distributions(ids) - ralm.distributions(ids)).abs().amax(-1)
    first = (u + 1) * m - 1
    assert float(moved[:first].max()) == 0 and float(moved[first:first + m].min()) > 1e-4


def test_windows_that_overlap_ask_once_for_a_chunk_and_all_of_a_window_together(retro, neighbours, ids):
    spy = Told(neighbours)
    scored = RALM(retro, neighbours=spy, how="retro").score(ids, window=24, stride=12)  # chunks of windows coincide but the first
    asked = [q for batch in spy.asked for q in batch]
    assert len(spy.asked) <= 1 + -(-(len(ids) - 24) // 12) and len(asked) == len([e for e in scored.evidence if e.query.strip()])
    first = [e for e in scored.evidence if e.at == 17]
    assert len(first) == 2 and first[0].query.endswith(first[1].query)  # the same end, cut by two windows: told apart by `under`
    assert scored.convention["chunks_searched"] == len(scored.evidence) and scored.convention["m"] == 6


def test_evidence_of_two_windows_with_one_end_is_told_apart(retro, neighbours, ids):
    """Window 12, stride 6: chunk 0 of the second window ends where chunk 1 of the first one does."""
    scored = RALM(retro, neighbours=neighbours, how="retro").score(ids[:24], window=12, stride=6)
    a, b = (i for i, e in enumerate(scored.evidence) if e.at == 11)
    assert scored.under[11] == a and set(scored.under[12:17].tolist()) == {b} and set(scored.at[11:17].tolist()) == {11}


def test_what_documents_moved_is_what_moved_the_tokens_under_them(retro, neighbours, store):
    """Also where evidence of two windows ends at one token; each copied run stands in its document."""
    ralm = RALM(retro, neighbours=neighbours, how="retro:k=2")
    made = ralm.explain(TEXT, window=12, stride=6)
    moved: dict[str, float] = {}
    for t, i in enumerate(made.under.tolist()):
        names = neighbours.documents(made.evidence[i].ids.tolist()) if i >= 0 else []
        for name in names:
            moved[name] = moved.get(name, 0.0) + made.gain[t] / len(names)
    assert len({e.at for e in made.evidence}) < len(made.evidence)
    assert made.documents == pytest.approx(moved) and len(moved) > 3
    assert sum(c is not None for c in made.copied) > 10
    for t, c in enumerate(made.copied):
        if c is not None:
            text = store.document(c.document).text[c.start:c.end]
            assert "".join(made.tokens[t + 1 - c.tokens:t + 1]) == text
            assert c.document in neighbours.documents(made.evidence[made.under[t]].ids.tolist())


def test_events_and_citations_resolve(ralm, neighbours, store):
    events = list(ralm.stream("Snow on the granite reef, and Maria Holt", max_tokens=9))
    found = [e for e in events if isinstance(e, Retrieved)]
    assert found and {e.what for e in found} == {"neighbours"}
    order = [e.kind for e in events]
    assert order.index("retrieved") < order.index("token")
    for e in found:
        for c in e.passages:
            assert store.document(c.document).text[c.start:c.end] == c.quote and neighbours.chunks([c.chunk])[0].text == c.quote
    assert any(e.passages for e in found)


# ---- drawing ------------------------------------------------------------------------------------------------------------


def drawn(events):
    events = list(events)
    return ([(e.id, e.logp) for e in events if isinstance(e, Token)],
            [(e.at, e.query, [c.chunk for c in e.passages]) for e in events if isinstance(e, Retrieved)], events[-1].text)


@pytest.mark.parametrize("how", ["retro:k=2", f"retro:k=2+{KNN}"])
def test_texts_drawn_together_are_those_drawn_alone_and_those_scored(both, how):
    ralm = replace(both, how=how)
    for settings in (dict(max_tokens=30), dict(max_tokens=20, temperature=0.9, top_k=30, seed=7, window=20, stride=7)):
        events = list(ralm.stream_many(PROMPTS, **settings))
        for i, prompt in enumerate(PROMPTS):
            tokens, evidence, text = drawn(e for j, e in events if j == i)
            alone = drawn(ralm.stream(prompt, **(settings | dict(seed=settings.get("seed", 0) + i))))
            assert [t for t, _ in tokens] == [t for t, _ in alone[0]] and (evidence, text) == alone[1:]
            window = {key: settings[key] for key in ("window", "stride") if key in settings}
            scored = ralm.score([t for t, _ in tokens], prompt=prompt, **window)
            assert np.allclose([p for _, p in tokens], scored.logp, atol=2e-3)


def test_a_step_of_all_texts_is_one_forward_and_at_most_one_search(retro, neighbours, monkeypatch):
    """Rows at different phases of their chunks, one batch; the encoder runs for those that complete one."""
    spy, forwards = Told(neighbours), []
    ralm, forward = RALM(retro, neighbours=spy, how="retro"), retro.forward

    def watched(ids, **given):
        forwards.append((tuple(ids.shape), "neighbours" in given))
        return forward(ids, **given)

    monkeypatch.setattr(retro, "forward", watched)
    prompts = [*PROMPTS, "The lighthouse", "Snow on the"]
    done = [e for _, e in ralm.stream_many(prompts, max_tokens=16) if isinstance(e, Done)]
    assert len(done) == 6 and len(forwards) == 16 and all(shape == (6, 1) for shape, _ in forwards[1:])
    assert len(spy.asked) <= 16 and max(map(len, spy.asked)) > 1 and not all(given for _, given in forwards)
    lengths = {len(retro.tokenizer.encode(p)) % 6 for p in prompts}
    assert len(lengths) > 2


def test_a_text_longer_than_the_window_goes_on(ralm):
    tokens, evidence, _ = drawn(ralm.stream("Snow on the granite", max_tokens=90))
    logp = ralm.score([t for t, _ in tokens], prompt="Snow on the granite").logp
    assert len(tokens) == 90 and np.allclose([p for _, p in tokens], logp, atol=2e-3) and len(evidence) > 10


@pytest.mark.parametrize("how", ["retro:k=2", f"retro:k=2+{KNN}"])
def test_beams_say_what_is_scored(both, how):
    ralm = replace(both, how=how)
    for best in ralm.beam("Snow on the granite", beams=3, max_tokens=14):
        scored = ralm.score(best.tokens, prompt="Snow on the granite")
        assert best.logp == pytest.approx(scored.logp.sum(), abs=2e-3)
        assert [e.query for e in best.evidence] == [e.query for e in scored.evidence][:len(best.evidence)]


@pytest.mark.parametrize("ahead", [3, 8, "auto"])
def test_speculation_over_neighbours_of_both_kinds_changes_nothing(both, ahead):
    for settings in (dict(max_tokens=30), dict(max_tokens=20, temperature=1.0, seed=3)):
        plain = drawn(both.stream(PROMPTS[1], **settings))
        told = Ahead.of(ahead)
        ours = drawn(both.stream(PROMPTS[1], speculate=told, **settings))
        assert ours == plain and told.checked > (0 if ahead == "auto" else 5)


# ---- what is remembered ---------------------------------------------------------------------------------------------------


def test_a_cache_never_takes_rows_for_those_read_beside_others(retro, neighbours):
    """One growing text read alone, beside two choices of neighbours, and beside none found, in any order, on one cache."""
    g, m = torch.Generator().manual_seed(5), retro.m
    row, cache = [retro.bos], PrefixCache(retro)
    ways = [None, (3, 8), (20, -1), (-1, -1)]
    for turn in range(40):
        row = row + torch.randint(1, 290, (int(torch.randint(0, 3, (1,), generator=g)),), generator=g).tolist()
        for way in (ways[turn % 4], ways[int(torch.randint(0, 4, (1,), generator=g))]):
            beside = None if way is None else Beside((((way,) * (len(row) // m)),), neighbours.gather, m)
            ours, theirs = state_rows(cache, [row], [len(row)], None, beside), logp_rows(retro, [row], [len(row)], beside)
            assert distance(ours[0][0], theirs[0]) < 1e-4
    assert cache.steps > 20


def test_what_was_read_beside_is_restored_with_a_mark(retro, neighbours):
    """Back at a mark, inside a chunk or behind one, the same row goes on by a step; a row beside others is read again."""
    m, row, cache = retro.m, [retro.bos, *range(7, 37)], PrefixCache(retro)

    def read(n, way=(3, 8)):
        beside = Beside((((way,) * (n // m)),), neighbours.gather, m)
        (ours, _), = state_rows(cache, [row[:n]], [n], None, beside)
        assert distance(ours, logp_rows(retro, [row[:n]], [n], beside)[0]) < 1e-4

    for n in (9, 11, 12, 13, 17):
        read(n)
        mark, prefills = cache.mark(), cache.prefills
        for more in (1, 2, 7, 8):
            read(n + more)
        cache.restore(mark)
        read(n + 3)
        assert cache.prefills == prefills
        read(n + 3, (3, 9 + n))
        assert cache.prefills == prefills + 1


def test_rows_that_leave_and_change_places_stay_one_batch(retro, neighbours):
    """Beams and texts that end: each row is known by its tokens and by what it was read beside, wherever it stands."""
    m, cache = retro.m, PrefixCache(retro, moving=True)
    rows = [[retro.bos, *range(7 + i, 24 + i)] for i in range(3)] + [[retro.bos, *range(7, 24)]]
    ways = [(3, 8), (1, -1), (-1, -1), (20, 4)]  # the last row has the first one's tokens beside other neighbours
    for order, more in (("0123", 1), ("3210", 0), ("012", 1), ("120", 0), ("2210", 2), ("31", 1), ("1", 1), ("000", 1)):
        rows, ways = [[*rows[int(i)], *[50 + n] * more] for n, i in enumerate(order)], [ways[int(i)] for i in order]
        beside = Beside(tuple((way,) * (len(r) // m) for way, r in zip(ways, rows)), neighbours.gather, m)
        for i, (ours, _) in enumerate(cache.state_rows(rows, [len(r) for r in rows], None, beside)):
            assert distance(ours, logp_rows(retro, [rows[i]], [len(rows[i])], beside.some([i]))[0]) < 1e-4
    assert (cache.prefills, cache.steps) == (1, 5)


def test_questions_about_rows_tell_what_they_are_read_beside(ralm, neighbours):
    """The same row alone and beside neighbours are two questions, and are never answered by one forward."""
    from ralm.asked import Wanted, open_desk
    from ralm.generate import Lockstep

    row, m = [ralm.lm.bos, *range(7, 26)], ralm.lm.m
    besides = [None, *(Beside((((way,) * (len(row) // m)),), neighbours.gather, m) for way in ((3, 8), (1, -1)))]
    want = [logp_rows(ralm.lm, [row], [len(row)], b)[0] for b in besides]
    desk, desk.sources = open_desk(ralm._run("", "Snow", None, None, (), None), PrefixCache(ralm.lm))
    together = Lockstep(ralm)
    together.enter(ralm._run("", "Snow", None, None, (), None))
    asked = [Wanted("rows", (), ([row], [len(row)], None, b)) for b in besides]
    for b, logp, ((theirs, _),) in zip(besides, want, together._answers(asked)):
        ((ours, _),) = desk.rows([row], [len(row)], None, b)
        assert distance(ours, logp) < 1e-4 and distance(theirs, logp) < 1e-4
    assert min(distance(want[0], want[1]), distance(want[1], want[2])) > 0.01


def test_rows_of_a_batch_are_each_row_alone(retro, neighbours):
    g, m = torch.Generator().manual_seed(1), retro.m
    rows = [[retro.bos, *torch.randint(1, 290, (n,), generator=g).tolist()] for n in (3, 29, 11, 17, 23)]
    chunks = tuple(tuple(tuple(torch.randint(-1, 30, (2,), generator=g).tolist()) for _ in range(len(r) // m)) for r in rows)
    beside = Beside(chunks, neighbours.gather, m)
    for i, ours in enumerate(logp_rows(retro, rows, [1] * 5, beside)):
        assert distance(ours, logp_rows(retro, [rows[i]], [1], beside.some([i]))[0]) < 1e-4
        assert len(rows[i]) < 9 or distance(ours, logp_rows(retro, [rows[i]], [1])[0]) > 0.01


# ---- what fits together ---------------------------------------------------------------------------------------------------


def test_a_swapped_datastore_changes_what_is_said(tmp_path, retro, ralm, ids):
    other = Datastore.build(tmp_path / "other", [Document("a", "Snow lies in spring, and the tower of Ulm is high. " * 3)])
    swapped = RALM(retro, neighbours=NeighbourStore.build(other, retro), how="retro:k=2").score(ids)
    assert np.abs(swapped.logp - ralm.score(ids).logp).max() > 0.1
    assert {c.document for e in swapped.evidence for c in NeighbourStore(other, retro).chunks(e.ids.tolist())} == {"a"}


def test_documents_and_filters_are_left_out(ralm, neighbours, ids):
    whole = ralm.score(ids)
    read = {n for e in whole.evidence for n in neighbours.documents(e.ids.tolist())}
    for ours, gone in ((ralm.score(ids, exclude=["d0"]), {"d0"}), (replace(ralm, where="even = true").score(ids),
                                                                  {f"d{i}" for i in range(1, 10, 2)})):
        now = {n for e in ours.evidence for n in neighbours.documents(e.ids.tolist())}
        assert gone & read and not gone & now and now


def test_a_schedule_of_its_own(ralm, retro, neighbours):
    assert ralm.when.n == 6 and RALM(retro, neighbours=neighbours, how="retro", when="every:6").when == ralm.when
    with pytest.raises(UsageError, match=r"every chunk of 6 tokens: leave it out"):
        RALM(retro, neighbours=neighbours, how="retro", when="every:4")


def test_what_does_not_fit_is_refused(tmp_path, lm, retro, neighbours, bm25, store):
    with pytest.raises(CapabilityError, match=r"needs neighbours from the model.*bundled:retro"):
        RALM(lm, neighbours=neighbours, how="retro")
    with pytest.raises(UsageError, match="needs a neighbour database, none was given"):
        RALM(retro, how="retro")
    with pytest.raises(UsageError, match=r"prepend\+knn, retro\+knn"):
        RALM(retro, bm25, neighbours=neighbours, how="prepend+retro")
    with pytest.raises(UsageError, match="k=-1"):
        RALM(retro, neighbours=neighbours, how="retro:k=-1")
    NeighbourStore.build(store, retro.tokenizer, m=4, name="four")
    with pytest.raises(UsageError, match=r"chunks of 4 tokens.*reads chunks of 6.*m=6"):
        RALM(retro, neighbours=NeighbourStore(store, name="four"), how="retro")
    from tokenizers import Tokenizer, models

    from ralm.lm.gpt import BPE

    words = BPE(Tokenizer(models.WordLevel({"a": 0, "text": 1}, unk_token="a")))
    NeighbourStore.build(store, words, m=6, name="words")
    with pytest.raises(FingerprintError, match="another tokenizer"):
        RALM(retro, neighbours=NeighbourStore(store, name="words"), how="retro")
    other = Datastore.build(tmp_path / "other", [Document("a", "words")])
    with pytest.raises(UsageError, match="one datastore"):
        RALM(retro, neighbours=NeighbourStore.build(other, retro), how="retro+knn", tokens=TokenStore.build(store, retro, "fit"))
    with pytest.raises(UsageError, match="questions are answered from passages"):
        RALM(retro, neighbours=neighbours, how="retro").answer("who?")


def test_a_decoders_token_store_fits_its_retro(store, retro, neighbours):
    made = TokenStore.build(store, retro.base, "decoder")
    RALM(retro, neighbours=neighbours, how="retro+knn", tokens=TokenStore(store, retro, "decoder"))
    assert len(made) == len(TokenStore(store, retro, "decoder"))


def test_an_empty_query_asks_for_nothing(retro, neighbours):
    spy = Told(neighbours)
    scored = RALM(retro, neighbours=spy, how="retro").score("            \n          \n      ")
    assert not any(len(e.ids) for e in scored.evidence) and all(q.strip() for batch in spy.asked for q in batch)
