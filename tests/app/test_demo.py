"""The demo's own code on a few pages: what kNN-LM says of held-out documentation, and one text that is attributed."""

from itertools import islice

import pytest

pytest.importorskip("torch")
from ralm.app import demo
from ralm.app.corpus import topics
from ralm.app.terminal import Output
from ralm.types import Document
from ralm.what.datastore import Datastore


def test_neighbours_help_a_model_that_never_saw_documentation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEAR", 8_000)
    pages = [Document(d.id, d.text[:600], d.title) for d in islice(topics(), 30)]
    kb = Datastore.build(tmp_path / "kb", pages[2:])
    script = demo.Script(Output())
    demo.measure(script, kb, pages[:2])
    alone, passages, knn = script.data["perplexity"].values()
    assert knn["ppl"] < alone["ppl"] and knn["tokens"] == alone["tokens"] == passages["tokens"]
    assert 0 < knn["retrievals"] == knn["tokens"]
    stored = {d.id: d.text for d in kb.documents()}
    data = script.data["attributed"]
    assert "".join(t["text"] for t in data["tokens"]) == data["text"] and len(data["text"]) <= demo.SENTENCE
    assert data["documents"] and all(stored[n["document"]].startswith(n["target"], n["start"])
                                     for t in data["tokens"] for n in t["neighbours"])
    out = capsys.readouterr().out
    assert "tokens at the output" in out and "with neighbours; what helped most, and where" in out and out.count("weight") == 3
    assert len(Datastore.open(tmp_path / "kb.tokens")) < len(kb)
