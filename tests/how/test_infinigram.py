"""∞-gram interpolation against its definition in probabilities, and the laws: normalised, causal, neutral, forgetting."""

import math

import numpy as np
import pytest
import torch

from ralm.errors import UsageError
from ralm.how.infinigram import InfiniGram
from ralm.how.input import Plain
from ralm.index.suffix import SuffixIndex
from ralm.registry import make
from ralm.types import Document, Segment
from ralm.what.datastore import Datastore

TEXT = "Maria Holt drilled for two summers. The lighthouse of Brennick was built in 1873 by Robert Hooke, who saw the sea."


class Fetch:
    """What a fusion asks: counts of one index under one filter. No passages."""

    tokens = None

    def __init__(self, index, **filters):
        self.index, self.filters, self.asked = index, filters, []

    def suffix(self, ids, start, stop, **options):
        self.asked += range(start, stop)
        return self.index.match(ids, start, stop, **options, **self.filters)


@pytest.fixture(scope="module")
def index(tmp_path_factory, store, lm):
    """Over a copy: the shared store stays without it."""
    kept = Datastore.build(tmp_path_factory.mktemp("infgram") / "kb", store.documents(), split="none")
    return SuffixIndex(kept, lm.tokenizer, lm.name)


def read(how, lm, ids, fetch, segments=None, targets=False):
    segments = segments or [Segment(0, len(ids), None)]
    call = how.targets if targets else how.logprobs
    with torch.inference_mode():
        return torch.cat([p[0] for _, p in call(lm, torch.tensor([ids], dtype=torch.long), segments, fetch, None)])


PUBLISHED = InfiniGram(lam=0.2, sparse=0.5, levels=0)


@pytest.mark.parametrize("how", [PUBLISHED, InfiniGram(), InfiniGram(lam=0.7, sparse=0.1, least=2, levels=2),
                                 InfiniGram(lam=0.0, sparse=0.9, levels=1), InfiniGram(lam=1.0, sparse=1.0, most=1, levels=0),
                                 InfiniGram(lam=0.3, sparse=0.0, most=0), InfiniGram(lam=0.3, levels=9, most=3)])
def test_the_mixture_is_its_definition(index, lm, how):
    ids = lm.tokenizer.encode(TEXT)[:60]
    found = index.match(ids, least=how.least, most=how.most)
    below = [index.match(ids, most=n) for n in range(1, how.levels + 1)]
    alone, mixed = read(Plain(), lm, ids, Fetch(index)), read(how, lm, ids, Fetch(index))
    assert mixed.dtype == torch.float32 and torch.isfinite(mixed.double().logsumexp(-1)).all()
    assert mixed.double().logsumexp(-1).abs().max() < 1e-5
    for t in range(len(ids)):
        expected, weights = alone[t].double().exp().numpy(), []
        for estimate in [*(m for n, m in enumerate(below, 1) if n < found.length[t]), found]:
            tokens, counts = estimate.followers(t)
            p_inf = np.zeros(lm.vocab)
            p_inf[tokens] = counts / counts.sum()
            weights.append(how.sparse if len(tokens) == 1 else how.lam)
            expected = (1 - weights[-1]) * expected + weights[-1] * p_inf
        np.testing.assert_allclose(mixed[t].double().exp().numpy(), expected, atol=1e-6)
        if not any(weights):
            assert torch.equal(mixed[t], alone[t])  # bit for bit
    scored = read(how, lm, ids, Fetch(index), targets=True)
    gathered = mixed.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert torch.equal(torch.isneginf(scored), torch.isneginf(gathered))
    torch.testing.assert_close(scored, gathered, atol=2e-5, rtol=0)


def test_text_of_the_store_becomes_probable_and_other_text_stays_possible(index, lm):
    how, ids = PUBLISHED, lm.tokenizer.encode(TEXT)[:60]
    copied = lm.tokenizer.encode(next(d.text for d in index.store.documents() if d.text.startswith("The lighthouse")))[:60]
    alone, mixed = read(Plain(), lm, copied, Fetch(index), targets=True), read(how, lm, copied, Fetch(index), targets=True)
    assert (mixed[20:] > math.log(0.5) - 1e-6).all() and mixed.sum() > alone.sum() / 3
    assert torch.isfinite(read(how, lm, ids, Fetch(index), targets=True)).all()


def test_nothing_to_count_is_the_model_bit_for_bit(index, lm):
    ids = lm.tokenizer.encode(TEXT)[:40]
    alone, scored = read(Plain(), lm, ids, Fetch(index)), read(Plain(), lm, ids, Fetch(index), targets=True)
    fetches = [(InfiniGram(), Fetch(index, where="even = true and even = false")), (InfiniGram(lam=0, sparse=0), Fetch(index)),
               (InfiniGram(least=10**9), Fetch(index))]
    none = Fetch(index)
    none.suffix = None
    for how, fetch in [*fetches, (InfiniGram(), none)]:
        assert torch.equal(read(how, lm, ids, fetch), alone) and torch.equal(read(how, lm, ids, fetch, targets=True), scored)
    assert fetches[1][1].asked == []  # weights of 0 ask nothing


def test_later_tokens_change_no_earlier_distribution(index, lm):
    ids = lm.tokenizer.encode(TEXT)[:40]
    whole = read(InfiniGram(), lm, ids, Fetch(index))
    for t in (1, 7, 20, 39):
        other = ids[:t] + [(i + 3) % lm.vocab for i in ids[t:]]
        torch.testing.assert_close(read(InfiniGram(), lm, other, Fetch(index))[:t + 1], whole[:t + 1], atol=1e-5, rtol=0)


def test_a_text_read_in_pieces_or_token_by_token_is_the_same(index, lm):
    """Segments of one window, and the last position alone with nothing behind it, as `stream` asks."""
    ids, how = lm.tokenizer.encode(TEXT)[:40], InfiniGram(lam=0.4)
    whole = read(how, lm, ids, Fetch(index))
    pieces = read(how, lm, ids, Fetch(index), [Segment(0, 7, None), Segment(7, 8, None), Segment(8, 40, None)])
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    for t in (0, 5, 39):
        fetch = Fetch(index)
        torch.testing.assert_close(read(how, lm, ids[:t], fetch, [Segment(t, t + 1, None)])[0], whole[t], atol=1e-5, rtol=0)
        assert fetch.asked == [t]
    both = torch.tensor([ids, ids[::-1]])
    with torch.inference_mode():
        (_, batch), = how.logprobs(lm, both, [Segment(0, 40, None)], Fetch(index), None)
    torch.testing.assert_close(batch[0], whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch[1], read(how, lm, ids[::-1], Fetch(index)), atol=1e-5, rtol=0)


def test_a_removed_document_was_never_there(tmp_path, index, lm):
    ids, how = lm.tokenizer.encode(TEXT)[:60], InfiniGram(lam=0.6, sparse=0.8)
    documents = list(index.store.documents())
    store = Datastore.build(tmp_path / "kb", [*documents, Document("more", TEXT)], split="none")
    late = SuffixIndex(store, lm.tokenizer)
    before = read(how, lm, ids, Fetch(late))
    assert not torch.equal(before, read(how, lm, ids, Fetch(index)))
    excluded = read(how, lm, ids, Fetch(late, exclude=["more"]))
    store.remove(["more"])
    assert torch.equal(read(how, lm, ids, Fetch(late)), read(how, lm, ids, Fetch(index)))
    assert torch.equal(excluded, read(how, lm, ids, Fetch(index)))


def test_an_index_of_a_larger_vocabulary_is_refused(index):
    found = index.match([5], 0, 1)
    with pytest.raises(UsageError, match=r"the index holds token \d+, the model has 3 tokens"):
        InfiniGram().mix(torch.full((1, 3), -math.log(3)), found)


@pytest.mark.parametrize("spec, message", [
    ("infgram:lam=1.5", "lam=1.5 is not a weight"), ("infgram:sparse=-0.1", "sparse=-0.1 is not a weight"),
    ("infgram:least=0", "least=0 is no whole number"), ("infgram:levels=-1", "levels=-1 is no whole number"),
    ("infgram:most=2.5", "most=2.5 is no whole number"),
    ("infgram:lam=much", "lam=much is not a weight"), ("infgram:length=3", "unknown option of fusion 'infgram' 'length'")])
def test_wrong_options_are_one_clear_line(spec, message):
    with pytest.raises(UsageError, match=message):
        make("fusion", spec, {"infgram": InfiniGram})
    assert make("fusion", "infgram:lam=0.3,most=none", {"infgram": InfiniGram}) == InfiniGram(lam=0.3)
