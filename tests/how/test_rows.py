"""Rows through a model: batches, jobs and cached prefixes give what each row gives alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ralm.how import rows as rows_module  # noqa: E402
from ralm.how.rows import PrefixCache, left_pad, logp_jobs, logp_rows  # noqa: E402
from ralm.testing import distance  # noqa: E402

CLOSE = 1e-4


def alone(lm, row, start):
    """The oracle: one row, no padding, no cache."""
    with torch.no_grad():
        return torch.log_softmax(lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, start - 1:], -1)


def draw(seed, n, longest=30):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (n,), generator=g).tolist()
    rows = [[0, *torch.randint(1, 290, (k - 1,), generator=g).tolist()] for k in lengths]
    return rows, [int(torch.randint(1, len(r) + 1, (1,), generator=g)) for r in rows]


def test_left_padding():
    ids, mask = left_pad([[5, 6], [7, 8, 9]], 0)
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]] and mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert left_pad([[1, 2], [3, 4]], 0)[1] is None


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_rows_of_any_lengths_equal_each_row_alone(lm, seed, n):
    rows, starts = draw(seed, n)
    for row, start, ours in zip(rows, starts, logp_rows(lm, rows, starts)):
        assert ours.shape == (len(row) - start + 1, lm.vocab)
        assert distance(ours, alone(lm, row, start)) < CLOSE


def test_small_batches_change_nothing_and_bound_the_forward(lm, monkeypatch):
    rows, starts = draw(3, 9)
    whole = logp_rows(lm, rows, starts)
    jobs = [(rows[i:i + 3], starts[i:i + 3]) for i in (0, 3, 6)]
    sizes = []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda ids, **k: (sizes.append(ids.numel()), forward(ids, **k))[1])
    for tokens, logits in ((60, 1 << 26), (8192, 40 * lm.vocab), (1, 1)):
        monkeypatch.setattr(rows_module, "BATCH_TOKENS", tokens)
        monkeypatch.setattr(rows_module, "BATCH_LOGITS", logits)
        sizes.clear()
        parts = [logp for job in logp_jobs(lm, jobs) for logp in job]
        assert all(distance(a, b) < CLOSE for a, b in zip(parts, whole, strict=True))
        assert max(sizes) <= max(tokens, max(map(len, rows))) and len(sizes) > 1


def test_jobs_of_a_run_share_forwards(lm, monkeypatch):
    rows, starts = draw(4, 8)
    calls = []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda ids, **k: (calls.append(len(ids)), forward(ids, **k))[1])
    list(logp_jobs(lm, [([r], [s]) for r, s in zip(rows, starts)]))
    assert calls == [8]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12),
       st.integers(0, 99))
def test_a_cache_is_exact_whatever_it_is_asked(lm, turns, seed):
    """Texts that grow under evidence that comes and goes, two rows at a time, against each row alone."""
    g = torch.Generator().manual_seed(seed)
    evidence = {name: [torch.randint(1, 290, (3 + 2 * i + j,), generator=g).tolist() for j in range(2)]
                for i, name in enumerate("ABC")}
    cache, text = PrefixCache(lm), [0]
    for name, more, back in turns:
        text = text + torch.randint(1, 290, (more,), generator=g).tolist()
        rows = [[0, *e, *text] for e in evidence[name]]
        for row, ours in zip(rows, cache.logp_rows(rows, [len(r) - back for r in rows])):
            assert ours.shape == (back + 1, lm.vocab) and distance(ours, alone(lm, row, len(row) - back)) < CLOSE


def test_prefixes_are_reused(lm):
    cache, text = PrefixCache(lm), list(range(1, 20))
    for n in range(5, 10):
        cache.logp_rows([[0, *text[:n]]], [n + 1])
    assert (cache.prefills, cache.steps) == (1, 4)
    cache.logp_rows([[0, *text[:9]]], [10])  # the same again costs nothing
    assert (cache.prefills, cache.steps) == (1, 4)
    cache.logp_rows([[0, 77, *text[:9]]], [11])  # other evidence
    assert (cache.prefills, cache.steps) == (2, 4)
    cache.logp_rows([[0, *text[:12]]], [13])  # the first evidence again: only the three new tokens
    assert (cache.prefills, cache.steps) == (2, 5)
    cache.logp_rows([[0, *text[:12]]], [4])  # distributions that were dropped must be made again
    assert (cache.prefills, cache.steps) == (3, 5)
    cache.logp_rows([[0, *text[:13]]], [14])  # only the last is kept
    assert len(cache.logp_rows([[0, *text[:13]]], [13])[0]) == 2 and (cache.prefills, cache.steps) == (3, 7)
    cache.logp_rows([[0, *text[:14]]], [14])  # one new, two wanted, the other is remembered
    assert distance(cache.logp_rows([[0, *text[:14]]], [14])[0], alone(lm, [0, *text[:14]], 14)) < CLOSE
    assert (cache.prefills, cache.steps) == (3, 8)


def test_memory_is_bounded(lm):
    cache = PrefixCache(lm)
    for i in range(40):
        cache.logp_rows([[0, i + 1, *range(1, 30)]], [31])
    assert sum(len(r) for s in cache.seen for r in s.rows) <= 4 * lm.window and len(cache.seen) > 1
