import numpy as np
import pytest

from ralm.errors import StoreError, UsageError
from ralm.types import Document
from ralm.what.datastore import Datastore


def store(path, names, **metadata) -> Datastore:
    return Datastore.build(path, [Document(n, f"{n} one two three four", metadata=metadata) for n in names], split="words:2")


@pytest.fixture
def parts(tmp_path):
    return store(tmp_path / "a", ["x", "y"], year=2001), store(tmp_path / "b", ["y", "z"], genre="law"), store(tmp_path / "c", [])


def test_a_union_is_its_parts_in_order(parts):
    a, b, c = parts
    both = Datastore.union(a, b, c)
    assert len(both) == 4 and both.n_chunks == 12 and both.chunk_rows == 12
    assert [(p.path, o) for p, o in both.parts] == [(a.path, 0), (b.path, 6), (c.path, 12)]
    asked = [11, 0, 6, 6, 5]
    chunks = both.chunks(asked)
    assert [k.id for k in chunks] == asked and [k.document for k in chunks] == ["z", "x", "y", "y", "y"] == both.document_ids(asked)
    assert chunks[2].text == b.chunks([0])[0].text
    ids = np.concatenate([i for i, _, _ in both.texts(first=4)])
    assert ids.tolist() == list(range(4, 12))
    assert [t for _, _, texts in both.texts() for t in texts] == [k.text for k in both.chunks(range(12))]
    assert [d.id for d in both.documents()] == ["x", "y", "y", "z"]
    assert both.document("z") == b.document("z") and both.document("y") == a.document("y")


def test_filters_apply_in_every_part(parts):
    a, b, _ = parts
    both = Datastore.union(a, b)
    assert both.allow("year = 2001").tolist() == [True] * 6 + [False] * 6  # b has no year: nothing of it matches
    assert both.allow("genre = 'law'").sum() == 6 and both.allow("id = 'y'").sum() == 6
    assert [d.id for d in both.documents("genre = 'law'")] == ["y", "z"]
    assert set(both.document_ids(np.flatnonzero(both.allow(exclude=["y"])))) == {"x", "z"}
    with pytest.raises(UsageError, match="unknown column 'yaer'"):
        both.allow("yaer = 2001")
    with pytest.raises(UsageError, match="not understood"):
        both.allow("year =")


def test_removal_in_a_part_shows_and_growth_is_refused(parts):
    a, b, _ = parts
    both = Datastore.union(a, b)
    before = both.fingerprint()
    a.remove(["x"])
    assert both.allow().sum() == 9 and both.fingerprint() != before
    a.add([Document("new", "text")])
    with pytest.raises(StoreError, match="make the union again"):
        both.chunks([6])
    assert both.refresh().chunks([7])[0].document == "y"


def test_what_a_union_refuses(parts):
    a, b, _ = parts
    both = Datastore.union(Datastore.union(a), b)
    for change in (lambda: both.add([]), lambda: both.remove(["x"]), lambda: both.compact(), lambda: both.lock()):
        with pytest.raises(UsageError, match="read-only"):
            change()
    with pytest.raises(UsageError, match="twice"):
        Datastore.union(a, b, Datastore.open(a.path))
    with pytest.raises(UsageError, match="at least one"):
        Datastore.union()
    for wrong in (-1, 12):
        with pytest.raises(StoreError, match="no chunk"):
            both.chunks([0, wrong])
    with pytest.raises(StoreError, match="no part"):
        both.document("nobody")
