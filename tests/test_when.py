"""Schedules, windows and plans, against definitions written out."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralm.errors import UsageError
from ralm.types import Segment
from ralm.when import Adaptive, EveryN, Never, Once, pieces, plan, schedule, window_of, windows


def test_specs():
    assert schedule("once") == Once(32) and schedule("once:7") == Once(7) and schedule("every:4") == EveryN(4)
    assert schedule("adaptive:theta=0.3,rest=8") == Adaptive(0.3, 8) and schedule("never") == Never()


@pytest.mark.parametrize(("spec", "line"), [
    ("evry:4", "Did you mean 'every'"), ("every:0", "n=0"), ("once:0", "after=0"), ("adaptive:theta=2", "not a probability"),
    ("every:2.5", "n=2.5 is no whole number"), ("once:true", "after=True is no whole number"), ("adaptive:rest=0", "rest=0"),
    ("adaptive:after=-1", "after=-1"), ("adaptive:theta=high", "theta=high is not a probability"),
    ("every:n=4,m=2", "unknown option"), ("every:4,5", "at most 1 values"), ("", "empty name"),
    ("every:four", "n=four is no whole number")])
def test_wrong_specs_are_one_line(spec, line):
    with pytest.raises(UsageError, match=line) as caught:
        schedule(spec)
    assert "\n" not in str(caught.value)


def test_every_n_is_the_stride_of_in_context_ralm():
    """With s = 4 evidence is fetched before tokens 4, 8, 12 ...; before the first token there is nothing to ask."""
    assert plan(EveryN(4), 0, 14) == [Segment(0, 4, None), Segment(4, 8, 4), Segment(8, 12, 8), Segment(12, 14, 12)]
    assert plan(EveryN(1), 0, 3) == [Segment(0, 1, None), Segment(1, 2, 1), Segment(2, 3, 2)]


def test_once_never_and_forced():
    assert plan(Once(3), 0, 9) == [Segment(0, 3, None), Segment(3, 9, 3)]
    assert plan(Never(), 0, 9) == [Segment(0, 9, None)]
    assert plan(Once(3), 5, 9, forced=5) == [Segment(5, 9, 5)]
    assert plan(EveryN(4), 5, 12, forced=5) == [Segment(5, 9, 5), Segment(9, 12, 9)]


def test_adaptive_asks_where_the_model_is_unsure():
    when = Adaptive(theta=0.5, rest=3, after=2)
    assert when.due(2, None, 0.4) and not when.due(2, None, 0.5) and not when.due(1, None, 0.4)
    assert not when.due(5, 3, 0.1) and when.due(6, 3, 0.1) and not when.due(6, 3, None)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_predict_every_token_once_within_their_size(n, size, data):
    stride = data.draw(st.integers(1, size))
    plan_ = list(windows(n, size, stride))
    assert [t for _, a, b in plan_ for t in range(a, b)] == list(range(n))
    for i, (context, start, stop) in enumerate(plan_):
        assert 0 <= context <= start < stop <= context + size
        assert i == 0 or start - context == size - stride  # as much context as the window has room for
        for t in range(start, stop):
            assert window_of(t, size, stride)[0] == context  # one token at a time sees the same context


@given(st.sampled_from([Never(), Once(1), Once(5), EveryN(1), EveryN(4), EveryN(7)]), st.integers(0, 20), st.integers(1, 30),
       st.data())
def test_plans_cover_their_range_and_never_look_ahead(when, start, length, data):
    forced = data.draw(st.one_of(st.none(), st.integers(start, start + length - 1)))
    segments = plan(when, start, start + length, forced)
    assert [t for s in segments for t in range(s.start, s.stop)] == list(range(start, start + length))
    assert all(s.at is None or s.at <= s.start for s in segments)
    assert forced is None or forced in {s.at for s in segments}


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 50))
def test_pieces_are_the_same_tokens_under_the_same_evidence(start, length, most):
    segments = plan(EveryN(7), start, start + length)
    cut = pieces(segments, most)
    assert [(t, s.at) for p in cut for s in p for t in range(s.start, s.stop)] == [
        (t, s.at) for s in segments for t in range(s.start, s.stop)]
    assert all(sum(s.stop - s.start for s in p) == most for p in cut[:-1]) and 0 < sum(s.stop - s.start for s in cut[-1]) <= most
    assert cut[0] == segments or len(cut) > 1


def test_schedules_and_contracts_need_no_torch():
    code = ("import sys, ralm, ralm.types, ralm.when, ralm.model, ralm.how, ralm.how.input, ralm.how.cite, ralm.registry\n"
            "ralm.when.schedule('every:4'), ralm.how.fusion('prepend:k=2')\n"
            "assert not {'torch', 'transformers', 'faiss'} & set(sys.modules), 'heavy'")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
