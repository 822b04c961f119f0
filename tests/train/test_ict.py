"""Inverse cloze: a sentence and its passage without it, in one of ten cases with it; it learns, resumes, uses nothing held out."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from ralm.errors import UsageError  # noqa: E402
from ralm.train import recipes  # noqa: E402
from ralm.train.ict import Loss, cloze  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.objectives import contrastive  # noqa: E402
from ralm.types import Chunk  # noqa: E402

TEXT = "The cat sat on the dog a lot.  It was the third time in a year. Too short. Then the dog sat on the cat again."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Passages of three sentences about one name each, and a held-out file of questions."""
    folder, rng = tmp_path_factory.mktemp("ict"), np.random.default_rng(0)
    rows = []
    for n in range(40):
        name = "".join(rng.choice(list("abcdefghij"), 5))
        text = f"{name} sat on the cat here. Then {name} sat on the dog too. The dog {name} sat there."
        rows.append({"id": str(n), "title": "", "text": text})
    (folder / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    held = [{"context": f"zz{c} sat on the cat. The dog zz{c} sat there too.", "qas": [{"id": c, "question": f"who sat zz{c}",
                                                                                       "answers": ["cat"]}]} for c in "abc"]
    (folder / "held.json").write_text(json.dumps({"data": [{"title": "", "paragraphs": held}]}))
    return folder


def recipe(sentences, **tables):
    out = {"kind": "ict", "data": {"corpus": ["all.jsonl"], "held_out": ["held.json"], "split": "none"},
           "encoder": {"model": str(sentences), "tokens": 32}, "loss": {"temperature": 0.1, "words": 4},
           "train": {"steps": 30, "batch": 8, "lr": 3e-3, "schedule": "constant"}}
    return {k: {**v, **tables.get(k, {})} if isinstance(v, dict) else v for k, v in out.items()}


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def test_a_sentence_is_taken_out_nine_times_of_ten():
    rng, kept = np.random.default_rng(0), 0
    chunk = Chunk(0, "d", 0, len(TEXT), TEXT, "Cats")
    seen = set()
    for _ in range(400):
        made = cloze(chunk, rng, Loss())
        seen.add(made.query)
        assert made.passage.startswith("Cats\n") and (made.query in made.passage) == made.kept
        body = made.passage.removeprefix("Cats\n")
        assert made.kept or sorted((made.query + " " + body).split()) == sorted(TEXT.split())  # nothing else is lost
        kept += made.kept
    assert len(seen) == 3 and 20 < kept < 62 and "Too short." not in seen
    assert cloze(Chunk(0, "d", 0, 9, "The cat sat on the dog a lot."), rng, Loss()) is None


def test_it_learns_and_resumes(sentences, root, tmp_path):
    r = recipe(sentences)
    whole = recipes.make(r, root, tmp_path / "whole")
    said = fit(whole, r, tmp_path / "whole")
    for until in (7, None):
        parts = recipes.make(r, root, tmp_path / "parts")
        fit(parts, r, tmp_path / "parts", until=until)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.encoder.model.parameters(), parts.encoder.model.parameters()))
    rows = [x for x in lines(tmp_path / "whole") if "loss" in x]
    assert np.mean([x["loss"] for x in rows[-5:]]) < 0.7 * np.mean([x["loss"] for x in rows[:3]])
    assert {"top1", "gold1-before", "top5-bm25"} <= said["evaluations"][-1].keys()
    assert not any("zz" in c.query for step in range(30) for c in whole.batch(step)[0])  # held out


def test_loss_is_in_batch_and_passages_differ(sentences, root, tmp_path):
    task = recipes.make(recipe(sentences), root, tmp_path)
    part = task.batch(3)[0]
    assert len({c.passage for c in part}) == 8 and task.batch(3)[0] == part != task.batch(4)[0]
    loss, figures = task.loss(part)
    q = torch.from_numpy(task.encoder.many([c.query for c in part], "query"))
    d = torch.from_numpy(task.encoder.many([c.passage for c in part], "passage"))
    assert float(loss.detach()) == pytest.approx(float(contrastive(q, d, torch.arange(8), 0.1)), abs=1e-5)
    assert figures["queries"] == 8 and 0 <= figures["right"] <= 1
    with pytest.raises(UsageError, match="a batch is"):
        recipes.make(recipe(sentences, train={"batch": 64}), root, tmp_path / "b").batch(0)
