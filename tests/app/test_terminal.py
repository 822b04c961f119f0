"""What is printed: JSON that is JSON, tables that line up, progress that is honest where stderr is no terminal."""

import json

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralm import progress
from ralm.app import terminal

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                      lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4), max_leaves=12)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # its first draw is slow on a busy machine
@given(st.dictionaries(st.text(), VALUES))
def test_whatever_is_printed_is_json(data):
    def none(name):
        raise AssertionError(name)
    text = terminal.dumps(data)
    assert "\n" not in text
    json.loads(text, parse_constant=none)


def test_numpy_paths_and_times_become_json():
    from datetime import datetime
    from pathlib import Path

    data = {"a": np.float32(0.5), "b": np.array([1.0, np.nan]), "c": Path("x/y"), "d": datetime(2024, 1, 2), "e": np.int64(3)}
    assert json.loads(terminal.dumps(data)) == {"a": 0.5, "b": [1.0, None], "c": "x/y", "d": "2024-01-02T00:00:00", "e": 3}


def test_tables_line_up():
    assert terminal.table([["a", 1], ["bbb", 22]], ["name", "n"], right=[1]) == ["name   n", "a      1", "bbb   22"]
    assert terminal.table([]) == []


def test_figures_for_people():
    assert [terminal.size(n) for n in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]
    assert [terminal.duration(s) for s in (0.25, 42, 61, 7300)] == ["0.2 s", "42 s", "1 min 01 s", "2 h 01 min"]
    assert terminal.number(float("nan")) == "-" and terminal.count(1, "chunk") == "1 chunk"


def test_progress_without_a_terminal_speaks_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    talk = terminal.Talk()
    monkeypatch.setattr(progress, "_sink", talk)
    with progress.task("read", total=100e6, unit="B") as advance:
        for _ in range(10):
            clock[0] += 3
            advance(10e6)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["read: 40.0 MB of 100.0 MB, 18 s left", "read: 80.0 MB of 100.0 MB, 6.0 s left", "read: 100.0 MB in 30 s"]


def test_quiet_is_quiet(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_sink", terminal.Talk(quiet=True))
    with progress.task("read", total=1) as advance:
        advance(1)
    progress.note("something")
    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal_leave_nothing_behind(capsys, monkeypatch):
    talk = terminal.Talk()
    talk.terminal = True
    monkeypatch.setattr(progress, "_sink", talk)
    with progress.task("encode", total=2, unit="chunks") as advance:
        advance(1)
        progress.note("a note between")
        with progress.task("inner") as more:
            more(3)
    assert talk.progress is None and not talk.tasks
    assert "a note between" in capsys.readouterr().err
