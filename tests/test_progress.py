"""One sink for all progress: silent by default, every stage stopped even where the work fails."""

import pytest

from ralm import progress


class Record:
    def __init__(self):
        self.log = []

    def start(self, stage, total, unit):
        self.log.append(("start", stage, total, unit))
        return len(self.log)

    def advance(self, task, amount):
        self.log.append(("advance", task, amount))

    def stop(self, task):
        self.log.append(("stop", task))

    def note(self, text):
        self.log.append(("note", text))


@pytest.fixture
def sink():
    before, record = progress._sink, Record()
    progress.use(record)
    yield record
    progress.use(before)


def test_tasks_and_notes_reach_the_sink(sink):
    with progress.task("encode", 10, "B") as advance:
        advance(4)
        advance()
        progress.note("skipped one")
    assert sink.log == [("start", "encode", 10, "B"), ("advance", 1, 4), ("advance", 1, 1), ("note", "skipped one"), ("stop", 1)]


def test_a_failing_task_is_stopped(sink):
    with pytest.raises(ValueError), progress.task("encode"):
        raise ValueError
    assert sink.log[-1] == ("stop", 1)


def test_silent_by_default(capsys):
    with progress.task("encode", 3) as advance:
        advance(3)
    progress.note("said to nobody")
    assert capsys.readouterr() == ("", "")
