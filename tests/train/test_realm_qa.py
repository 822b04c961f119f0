"""Open-QA: the loss is what the reader computes, the passages stay, it learns, it resumes, what it writes answers questions."""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from ralm.errors import UsageError  # noqa: E402
from ralm.index.encode import encoder  # noqa: E402
from ralm.lm.masked import Lengths, MaskedReader  # noqa: E402
from ralm.lm.reader import Reader  # noqa: E402
from ralm.lm.spans import log_softmax  # noqa: E402
from ralm.train import recipes  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.realm_qa import span_reader  # noqa: E402


def recipe(sentences, **tables):
    out = {"kind": "realm-qa", "data": {"train": ["train.json"], "held_out": ["dev.json"], "questions": 6, "split": "none"},
           "encoder": {"model": str(sentences), "tokens": 32},
           "reader": {"model": "minilm", "layers": 1, "lr": 1e-3}, "index": {"k": 3, "beam": 8},
           "train": {"steps": 6, "batch": 4, "lr": 1e-3, "schedule": "constant", "save_steps": 5}}
    return {k: {**v, **tables.get(k, {})} if isinstance(v, dict) else v for k, v in out.items()}


def run(r, root, folder, **options):
    task = recipes.make(r, root, folder)
    return task, fit(task, r, folder, **options)


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def test_loss_is_minus_what_the_reader_scores(sentences, people_data, tmp_path):
    """Training equals inference: ln p(answer | question) of Reader over the same passages, plus the early term by hand. Without
    articles, which the reader takes off when it adds up equal answers."""
    for name in ("train", "dev"):
        (tmp_path / f"{name}.json").write_text((people_data / f"{name}.json").read_text().replace("the ", ""))
    task = recipes.make(recipe(sentences), tmp_path, tmp_path / "run")
    task.prepare(0)
    with torch.no_grad():
        task.model.head.null.bias.fill_(-3.0)
        torch.nn.init.normal_(task.model.head.relevance.weight)
    total, readable = 0.0, 0
    for a in task.batch(0)[0]:
        loss, figures = task.loss([a])
        q = task.encoder.many([a.question], "query")
        hits = task.refresher.propose(q, 8)
        texts = [c.text for c in task.corpus.chunks(hits.ids[0])]
        scores = (task.refresher.vectors(hits.ids)[0] @ q[0]).astype(np.float64) / 0.05
        right = [any(x in t for x in a.answers) for t in texts]
        early = -math.log(np.exp(log_softmax(scores))[right].sum()) if any(right) else 0.0
        reading = task.reader().read(a.question, texts[:3], logp=log_softmax(scores[:3]), k=200)
        found = [s.answer_logp for s in reading.spans if s.text.lower() == a.answers[0].lower()]
        assert bool(found) == any(right[:3]) == bool(figures["readable"])
        readable += bool(found)
        assert float(loss.detach()) == pytest.approx((-found[0] if found else 0.0) + early, abs=2e-3)
        total += float(loss.detach())
    assert readable
    whole, _ = task.loss(task.batch(0)[0])
    assert float(whole.detach()) == pytest.approx(total / 4, abs=1e-4)


def test_it_learns_resumes_and_leaves_the_passages_alone(sentences, people_data, tmp_path):
    r = recipe(sentences, train={"steps": 12})
    task, said = run(r, people_data, tmp_path / "whole")
    for until in (5, 8, None):
        again, _ = run(r, people_data, tmp_path / "parts", until=until)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), again.model.parameters()))
    rows = [x for x in lines(tmp_path / "whole") if "loss" in x]
    assert np.mean([x["loss"] for x in rows[-3:]]) < np.mean([x["loss"] for x in rows[:3]])
    before = recipes.make(r, people_data, tmp_path / "new")
    theirs = dict(before.encoder.model.named_parameters())
    moved = {n for n, p in task.encoder.model.named_parameters() if not torch.equal(p, theirs[n])}
    assert moved and all(".sub_modules.query." in n for n in moved)
    last = said["evaluations"][-1]
    assert {"em", "f1", "em_low", "f1_high", "top5", "gold1-before", "top1-bm25"} <= last.keys()
    out = tmp_path / "whole" / "model"
    texts = [c.text for c in task.corpus.chunks(task.corpus.ids[:3])]
    written = encoder(str(out / "retriever"))
    for role in ("query", "passage"):
        np.testing.assert_allclose(written.encode(texts, role), task.encoder.many(texts, role), atol=1e-5)
    a, b = (r.read("who sat here", texts) for r in (Reader.load(out / "reader"), task.reader()))
    assert [s.text for s in a.spans] == [s.text for s in b.spans]


def test_reader_may_stay_as_it_is(sentences, people_data, tmp_path):
    r = recipe(sentences, reader={"trained": False}, train={"steps": 2})
    task, _ = run(r, people_data, tmp_path)
    assert {g.name for g in task.groups()} == {"query encoder", "query encoder norms"}


def test_the_body_of_a_masked_language_model_becomes_a_reader(tmp_path):
    masked = MaskedReader.load("minilm", Lengths(16, 32), layers=1)
    with torch.no_grad():
        masked.model.bert.encoder.layer[0].output.dense.weight.add_(0.1)
    masked.save(tmp_path / "reader")
    model, config = span_reader(str(tmp_path / "reader"))
    assert config.layers == 1 and torch.equal(model.bert.encoder.layer[0].output.dense.weight,
                                              masked.model.bert.encoder.layer[0].output.dense.weight)
    with torch.no_grad():
        masked.model.bert.embeddings.word_embeddings.weight[5] += 1
    masked.save(tmp_path / "other")
    with pytest.raises(UsageError, match="does not stand on MiniLM's embeddings"):
        span_reader(str(tmp_path / "other"))
    with pytest.raises(UsageError, match="is no reader"):
        span_reader(str(tmp_path / "absent"))


@pytest.mark.parametrize(("table", "change", "says"), [
    ("index", {"k": 9}, "of the beam = 8"), ("data", {"train": [], "corpus": ["train.json"]}, "no question"),
    ("train", {"micro": 3}, "multiple of")])
def test_recipes_that_cannot_be(sentences, people_data, tmp_path, table, change, says):
    with pytest.raises(UsageError, match=says):
        recipes.make(recipe(sentences, **{table: change}), people_data, tmp_path).batch(0)
