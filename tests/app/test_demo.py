"""The demo's own code on a few pages: systems compared on held-out documentation, and one text that is attributed."""

from itertools import islice

import pytest

pytest.importorskip("torch")
from ralm.app import demo
from ralm.app.corpus import topics
from ralm.app.terminal import Output
from ralm.types import Document
from ralm.what.datastore import Datastore


def test_all_ways_to_read_a_datastore_in_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SMALL", 5_000)
    monkeypatch.setattr(demo, "LOOKED_AT", 2)
    pages = [Document(d.id, d.text[:500], d.title) for d in islice(topics(), 20)]
    kb = Datastore.build(tmp_path / "kb", pages[2:])
    script = demo.Script(Output())
    demo.measure(script, kb, pages[:2])
    few = Datastore.open(tmp_path / "kb.small")
    assert len(few) < len(kb)
    rows = {r["name"]: r for r in script.data["compared"]["systems"]}
    assert list(rows) == list(demo.COMPARED) and len({r["tokens"] for r in rows.values()}) == 1
    knn = rows[demo.KNN]
    assert knn["ppl"] < rows["none"]["ppl"] and 0 < knn["retrievals"] == knn["tokens"] and rows[demo.PREPEND]["retrievals"] > 0
    assert all(few.has(d) for r in rows.values() for e in r.get("evidence", ()) for d in e["documents"])
    stored = {d.id: d.text for d in kb.documents()}
    data = script.data["attributed"]
    assert "".join(t["text"] for t in data["tokens"]) == data["text"] and len(data["text"]) <= demo.SENTENCE
    assert data["documents"] and all(stored[n["document"]].startswith(n["target"], n["start"])
                                     for t in data["tokens"] for n in t["neighbours"])
    out = capsys.readouterr().out
    assert all(name in out for name in rows) and "bits a byte of" in out
    assert "with neighbours; what helped most, and where" in out and out.count("weight") == 3
