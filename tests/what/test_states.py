"""Revisions: one number per stored state of a document, and which of them a version holds."""

from ralm.testing import documents
from ralm.types import Document
from ralm.what.datastore import Datastore


def test_states_are_kept_and_filtered(tmp_path):
    kb = Datastore.build(tmp_path / "kb", documents(["one", "two", "three"], metadata={"year": 1999}))
    kb.add([Document("d1", "two again", metadata={"year": 2001})])
    kb.remove(["d2"])
    found = dict(kb.states())
    assert [(s.id, s.text) for s in found.values()] == [("d0", "one"), ("d1", "two"), ("d2", "three"), ("d1", "two again")]
    assert [s.text for r, s in found.items() if kb.revisions()[r]] == ["one", "two again"]
    assert [s.text for r, s in found.items() if kb.revisions("year > 2000")[r]] == ["two again"]
    assert [s.text for r, s in found.items() if kb.revisions(exclude=["d1"])[r]] == ["one"]
    assert len(kb.revisions()) == kb.revision_rows == 4
    assert [s.text for _, s in kb.states(first=2)] == ["three", "two again"]
    assert kb.stored_revisions().tolist() == list(found) and kb.characters() == sum(len(s.text) for s in found.values())
    assert kb.characters(first=2) == len("three" + "two again") and kb.characters(first=4) == 0
    old = Datastore.open(tmp_path / "kb", version=1 + next(h.version for h in kb.history() if h.action == "create"))
    assert [s.text for r, s in found.items() if r < old.revision_rows and old.revisions()[r]] == ["one", "two", "three"]
