"""The laws with infini-grams: counts in a suffix index, alone, above methods at the input, and above kNN-LM."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ralm.errors import UsageError  # noqa: E402
from ralm.index.suffix import SuffixIndex, compact  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import check_forgetting, check_ralm  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

FUSIONS = ("infgram", "infgram:lam=0.2,sparse=0.5,levels=0", "infgram:lam=0.4,sparse=0.1,levels=2,least=2,most=5",
           "prepend:k=1,query=12,tokens=24+infgram:lam=0.3", "ensemble:k=2,temperature=3,query=12,tokens=24+infgram:lam=0.3")
WORDS = ("the granite reef lighthouse Maria Holt mitochondria cell passage question snow mountain tower candle sailors in "
         "1873 , . é zzz").split()
texts = st.lists(st.sampled_from(WORDS), min_size=8, max_size=18).map(" ".join)
prompts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
quiet = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
TEXT = "The lighthouse of Brennick was built in 1873 by Maria Holt on granite."


@pytest.fixture(scope="module")
def suffix(store, lm):
    """Twelve documents, two of them removed since: their tokens stand between the others."""
    return SuffixIndex(store, lm.tokenizer, lm.name, "laws")


def system(lm, bm25, suffix, how):
    return RALM(lm, bm25 if "+" in how else None, how=how, when="every:4" if "+" in how else "once", suffix=suffix)


def test_counts_matter(lm, suffix):
    """Without this every law could hold because counts change nothing."""
    ids = lm.tokenizer.encode(TEXT)
    base, ours = RALM(lm).score(ids), RALM(lm, how="infgram:lam=0.3,sparse=0.5", suffix=suffix).score(ids)
    assert np.abs(base.logp - ours.logp).mean() > 0.2
    assert ours.convention["suffix"] == repr(suffix) and "suffix" not in base.convention


@settings(max_examples=4, **quiet)
@given(text=texts, prompt=prompts, how=st.sampled_from(FUSIONS))
def test_laws(lm, bm25, suffix, text, prompt, how):
    check_ralm(system(lm, bm25, suffix, how), text, prompt, positions=(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("how", FUSIONS)
def test_laws_everywhere(lm, bm25, suffix, how):
    for text in ("snow on the granite reef , the tower in 1873 zzz .", "é é é the question , the passage ."):
        check_ralm(system(lm, bm25, suffix, how), text, "the lighthouse of Maria Holt")


def test_counts_above_neighbours(store, lm, suffix):
    """kNN-LM below: both are asked, and each alone is what is left when the other has no weight."""
    ids, tokens = lm.tokenizer.encode(TEXT), TokenStore.build(store, lm, "counts", index="exact")
    both = dict(tokens=tokens, suffix=suffix)
    knn = RALM(lm, how="knn:k=9,lam=0.3,temperature=5", tokens=tokens).score(ids).logp
    counts = RALM(lm, how="infgram:lam=0.3", suffix=suffix).score(ids).logp
    assert np.array_equal(RALM(lm, how="knn:k=9,lam=0.3,temperature=5+infgram:lam=0,sparse=0", **both).score(ids).logp, knn)
    assert np.array_equal(RALM(lm, how="knn:k=9,lam=0+infgram:lam=0.3", **both).score(ids).logp, counts)
    together = RALM(lm, how="knn:k=9,lam=0.3,temperature=5+infgram:lam=0.3", **both)
    assert np.abs(together.score(ids).logp - knn).max() > 0.01 and np.abs(together.score(ids).logp - counts).max() > 0.01
    assert together.distributions(ids).double().logsumexp(-1).abs().max() < 1e-4


def test_forgetting_is_exact(tmp_path, lm):
    """After a removal every ln p is that of a store that never held the document; so it is after purging."""
    kept = [Document(f"k{i}", t) for i, t in enumerate(("The tower of granite stands on the reef. " * 3, "Snow on the mountain."))]
    gone = Document("gone", "Maria Holt built the lighthouse of Brennick in 1873, and nobody must read it. " * 2)
    ours, never = Datastore.build(tmp_path / "ours", [kept[0], gone, kept[1]]), Datastore.build(tmp_path / "never", kept)
    ids = lm.tokenizer.encode("Maria Holt built the lighthouse of Brennick in 1873.")
    mine, other = (RALM(lm, how="infgram:lam=0.5", suffix=SuffixIndex(s, lm.tokenizer)) for s in (ours, never))
    before = mine.score(ids).logp
    assert np.array_equal(mine.score(ids, exclude=["gone"]).logp, other.score(ids).logp)
    ours.remove(["gone"])
    check_forgetting(mine, other, ids, ["gone"])
    assert np.array_equal(mine.score(ids).logp, other.score(ids).logp) and np.abs(before - mine.score(ids).logp).max() > 0.5
    ours.compact(purge=True)
    compact(ours)
    assert np.array_equal(mine.score(ids).logp, other.score(ids).logp)


def test_a_system_that_cannot_count_is_refused(tmp_path, lm, bm25, suffix):
    with pytest.raises(UsageError, match="InfiniGram needs a suffix index, none was given"):
        RALM(lm, how="infgram")
    with pytest.raises(UsageError, match="counts at every token"):
        RALM(lm, how="infgram", when="every:4", suffix=suffix)
    other = Datastore.build(tmp_path / "other", [Document("a", "a text")])
    with pytest.raises(UsageError, match=r"passages come from .* counts from"):
        RALM(lm, bm25, how="prepend+infgram", suffix=SuffixIndex(other, lm.tokenizer))
    from tokenizers import Tokenizer, models

    from ralm.lm.gpt import BPE

    words = BPE(Tokenizer(models.WordLevel({"a": 0, "text": 1}, unk_token="a")))
    with pytest.raises(UsageError, match="made with another tokenizer"):
        RALM(lm, how="infgram", suffix=SuffixIndex(other, words, name="words"))
