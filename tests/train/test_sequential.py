"""Sequential training: the frozen half stays frozen, training equals inference, old indexes are noticed, foreign ones refused."""

import json
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from ralm.errors import FingerprintError, UsageError  # noqa: E402
from ralm.how.input import Ensemble  # noqa: E402
from ralm.how.mixing import log_weights  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.train import recipes, snapshot  # noqa: E402
from ralm.train.examples import Example, continuations, target_logp  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.objectives import marginal  # noqa: E402
from ralm.types import Document, Hits  # noqa: E402


@pytest.fixture(scope="session")
def speaker(tmp_path_factory, tiny):
    """A tiny random Llama on disk, as hf:FOLDER."""
    folder = tmp_path_factory.mktemp("speaker")
    tiny.make("llama", max_position_embeddings=256).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return f"hf:{folder}"


def recipe(sentences, speaker, kind="replug-lsr", **tables):
    out = {"kind": kind, "data": {"questions": ["train.json"], "held_out": ["dev.json"], "asked": 8}, "lm": {"model": speaker},
           "encoder": {"model": str(sentences)}, "retrieval": {"k": 3, "tokens": 24}, "objective": {},
           "train": {"steps": 6, "batch": 4, "micro": 2, "lr": 1e-3, "schedule": "constant", "save_steps": 1}}
    return out | {k: out.get(k, {}) | v for k, v in tables.items()}


def made(r, data, folder):
    return recipes.make(r, data, folder)


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def test_target_logp_is_that_of_scoring(speaker):
    from ralm.lm import load

    lm = load(speaker)
    encode = lm.tokenizer.encode
    rows = [(encode(a), encode(b)) for a, b in (("the passage then the question", "then it answers"), ("a", "b"), ("", "reads it"))]
    with torch.no_grad():
        logp, mask = target_logp(lm, rows)
    for (context, target), logp_S, mask_S in zip(rows, logp, mask):
        scored = RALM(lm).score(target, prompt=context)
        assert int(mask_S.sum()) == len(target)
        np.testing.assert_allclose(logp_S[mask_S.bool()].numpy(), scored.logp, atol=1e-5)
    lm.model.requires_grad_(True)
    logp, _ = target_logp(lm, rows)
    logp.sum().backward()
    assert all(p.grad is not None for p in lm.model.parameters())
    with pytest.raises(UsageError, match="the window of"):
        target_logp(lm, [(encode("a b c " * 300), encode("d"))])


def test_continuations_leave_out_their_own_document(speaker):
    from ralm.lm import load

    lm = load(speaker)
    text = "Retrieval reads what others wrote. " * 8
    some = continuations([Document("d", text), Document("short", "a")], lm, 6, 3)
    ids = lm.tokenizer.encode(text)
    assert [(*e.prefix, *e.target) for e in some] == [tuple(ids[a:a + 9]) for a in range(0, len(ids) - 8, 9)]
    assert all(e.exclude == ("d",) and e.query == lm.tokenizer.decode(e.prefix) for e in some)


class Exact:
    """A retriever with the vectors training had, not rounded."""

    def __init__(self, task, index):
        self.task, self.index, self.store = task, index, task.store

    def search(self, queries, k=10, where=None, exclude=()):
        q = torch.from_numpy(self.task.encoder.many(list(queries), "query"))
        rows = self.index.top(q, k, [exclude] * len(queries))
        scores = np.take_along_axis((q @ self.index.vectors_ND.T).numpy(), rows, 1)
        return Hits(self.task.passages.ids[rows], scores.astype(np.float32))


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_training_equals_inference(sentences, speaker, people_data, tmp_path, per):
    r = recipe(sentences, speaker, objective={"name": f"marginal-{per}", "tau_r": 0.2})
    task = made(r, people_data, tmp_path)
    task.prepare(0)
    how = Ensemble(k=3, weights="posterior" if per == "sequence" else "prior", temperature=0.2, tokens=24)
    system = RALM(task.lm, Exact(task, task.index), how=how)
    some = task.examples[:3]
    nats = [system.score(e.target, prompt=e.prefix, query=e.query).nats for e in some]
    assert float(task.loss(some)[0].detach()) == pytest.approx(np.mean(nats), abs=1e-4)
    j = task.judge(some, task.index)
    assert float(marginal(j.logp_BKT, log_weights(j.scores_BK, 0.2), j.mask_BT, per)) == pytest.approx(np.mean(nats), abs=1e-4)


@pytest.mark.parametrize("kind", ["replug-lsr", "ra-dit-lm"])
def test_the_frozen_half_stays_and_the_other_learns(sentences, speaker, people_data, tmp_path, kind):
    r = recipe(sentences, speaker, kind, train={"steps": 10, "batch": 4, "micro": 0, "lr": 3e-3, "save_steps": 0})
    task = made(r, people_data, tmp_path)
    frozen, learning = (task.lm, task.encoder) if kind == "replug-lsr" else (task.encoder, task.lm)
    before = [{n: p.detach().clone() for n, p in x.model.named_parameters()} for x in (frozen, learning)]
    said = fit(task, r, tmp_path)
    assert all(torch.equal(p, before[0][n]) for n, p in frozen.model.named_parameters())
    moved = {n for n, p in learning.model.named_parameters() if not torch.equal(p, before[1][n])}
    assert moved and (kind == "ra-dit-lm" or all("document" not in n for n in moved))
    rows = [x for x in lines(tmp_path) if "loss" in x]
    assert {"loss", "utility", "index_age", "overlap", "examples", "tokens"} <= rows[0].keys()
    assert [x["index_age"] for x in rows] == list(range(10)) and all(x["overlap"] == 1 for x in rows)
    if kind == "ra-dit-lm":
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    last = said["evaluations"][-1]
    assert {"nats", "nats-before_low", "nats_without", "ppl", "top1", "top3-before"} <= last.keys()
    assert (last["nats-before"] != 0) and last["ppl"] == pytest.approx(np.exp(last["nats"]), rel=1e-3)


def test_a_retriever_learns_what_the_model_finds_useful(sentences, speaker, people_data, tmp_path):
    """By heart: the divergence from the model's judgement falls on the examples trained on."""
    r = recipe(sentences, speaker, objective={"preset": "atlas-pdist", "tau_r": 0.2, "tau_u": 0.3},
               train={"steps": 30, "batch": 4, "micro": 0, "lr": 1e-2, "save_steps": 0})
    task = made(r, people_data, tmp_path)
    task.examples = task.examples[:4]
    task.held = []
    fit(task, r, tmp_path)
    losses = [x["loss"] for x in lines(tmp_path) if "loss" in x]
    assert min(losses[-5:]) < 0.5 * losses[0]


def test_stopped_and_resumed_is_uninterrupted_with_indexes_in_between(sentences, speaker, people_data, tmp_path):
    r = recipe(sentences, speaker, retrieval={"refresh": 2, "trains": "both"}, train={"steps": 7, "save_steps": 3})
    whole = made(r, people_data, tmp_path / "whole")
    fit(whole, r, tmp_path / "whole")
    for until in (1, 2, 5, None):
        parts = made(r, people_data, tmp_path / "parts")
        fit(parts, r, tmp_path / "parts", until=until)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    for a, b in zip(whole.encoder.model.parameters(), parts.encoder.model.parameters()):
        assert torch.equal(a, b)
    rows = [x for x in lines(tmp_path / "whole") if "loss" in x]
    assert [x["index_age"] for x in rows] == [0, 1, 0, 1, 0, 1, 0] and any(x["overlap"] < 1 for x in rows)
    assert len(list((tmp_path / "whole").glob("index-*.safetensors"))) <= 3


def test_an_index_that_is_not_this_runs_is_refused(sentences, speaker, people_data, tmp_path):
    r = recipe(sentences, speaker, retrieval={"refresh": 4, "trains": "both"})
    fit(made(r, people_data, tmp_path), r, tmp_path, until=2)
    file, = tmp_path.glob("index-*.safetensors")
    good = file.read_bytes()
    task = made(r, people_data, tmp_path)
    other = snapshot.Snapshot.of(task.encoder, task.passages, 0)
    other.weights = "0" * 32
    other.save(tmp_path)
    with pytest.raises(FingerprintError, match="index of other weights"):
        fit(task, r, tmp_path)
    file.write_bytes(good[:100])
    with pytest.raises(FingerprintError, match="cannot be read"):
        fit(made(r, people_data, tmp_path), r, tmp_path)
    file.write_bytes(good)
    task = made(r, people_data, tmp_path)
    task.passages.texts[0] += "!"
    with pytest.raises(FingerprintError, match="index of other passages"):
        fit(task, r, tmp_path)
    assert fit(made(r, people_data, tmp_path), r, tmp_path)["finished"]


def test_scores_are_those_of_live_weights(sentences, speaker, people_data, tmp_path):
    r = recipe(sentences, speaker, retrieval={"refresh": 0, "trains": "both"})
    task = made(r, people_data, tmp_path)
    task.prepare(0)
    with torch.no_grad():
        for p in task.encoder.model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    some = task.examples[:2]
    j = task.judge(some, task.index, "retriever")
    q, d = task.encoder.many([e.query for e in some], "query"), task.encoder.many(task.passages.texts, "passage")
    live = np.take_along_axis(q @ d.T, j.top_BK, 1)
    np.testing.assert_allclose(j.scores_BK.detach().numpy(), live, atol=1e-5)
    stale = np.take_along_axis(q @ task.index.vectors_ND.numpy().T, j.top_BK, 1)
    assert np.abs(stale - live).max() > 1e-3
    grad, = torch.autograd.grad(task.loss(some)[0], [next(task.encoder.model.parameters())])
    assert grad.abs().sum() > 0


def test_snapshot_finds_and_excludes(sentences, speaker, people_data, tmp_path):
    task = made(recipe(sentences, speaker), people_data, tmp_path)
    index = snapshot.Snapshot.of(task.encoder, task.passages, 0)
    q = torch.from_numpy(task.encoder.many([e.query for e in task.examples[:3]], "query"))
    top = index.top(q, 5)
    own = str(task.passages.documents[top[1, 0]])
    without = index.top(q, 5, [(), (own,), ()])
    assert (without[[0, 2]] == top[[0, 2]]).all() and without[1, :4].tolist() == top[1, 1:].tolist()
    assert index.overlap(index, q, 5) == 1.0
    some = index.top(q, len(task.passages) + 2, [[str(d) for d in task.passages.documents]] * 3)
    assert (some == -1).all()


def test_best_is_the_head_of_a_sorted_row():
    s = np.random.default_rng(0).integers(0, 9, (5, 40)).astype(np.float32)
    for k in (1, 7, 40, 60):
        got = snapshot.best(s, k)
        full = np.argsort(-s, axis=1, kind="stable")[:, :k]
        assert (np.take_along_axis(s, got, 1) == np.take_along_axis(s, full, 1)).all()
        for row, scores in zip(got, s):
            assert all(a < b for a, b in pairwise(row) if scores[a] == scores[b]) and len(set(row)) == len(row)


def test_texts_judge_by_their_own_continuation(sentences, speaker, tmp_path):
    rows = [{"id": f"d{i}", "text": f"The keeper of tower {i} wrote the weather down. " * 6} for i in range(6)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other.jsonl").write_text(json.dumps({"id": "o", "text": "Another keeper wrote the weather down twice. " * 8}))
    r = recipe(sentences, speaker, train={"steps": 2})
    r["data"] = {"texts": ["docs.jsonl"], "held_out": ["other.jsonl"], "query": 8, "target": 4, "split": "words:12", "asked": 5}
    task = made(r, tmp_path, tmp_path / "run")
    task.prepare(0)
    example = task.examples[0]
    j = task.judge([example], task.index)
    assert example.exclude[0] not in task.passages.documents[j.top_BK[0]] and len(task.held) == 5
    said = fit(task, r, tmp_path / "run")
    assert said["finished"] and "top1" not in said["evaluations"][-1]


@pytest.mark.parametrize(("table", "change", "says"), [
    ("retrieval", {"trains": "passages"}, "query or both"), ("objective", {"preset": "atlas-loop"}, "leaving passages out"),
    ("objective", {"preset": "replug"}, "Did you mean 'replug-lsr'"), ("objective", {"name": "kl"}, "unknown"),
    ("data", {"texts": ["x.jsonl"]}, "one of them"), ("lm", {"model": "bundled:reader"}, "no distributions"),
    ("train", {"batch": 500}, "80 examples")])
def test_recipes_that_cannot_be(sentences, speaker, people_data, tmp_path, table, change, says):
    r = recipe(sentences, speaker)
    r[table] = r[table] | change
    with pytest.raises(UsageError, match=says):
        made(r, people_data, tmp_path).batch(0)


def test_missing_candidates_weigh_nothing(sentences, speaker, people_data, tmp_path):
    task = made(recipe(sentences, speaker), people_data, tmp_path)
    task.prepare(0)
    e = task.examples[0]
    all_but_two = tuple(str(d) for d in task.passages.documents[2:])
    few = Example(e.query, e.prefix, e.target, all_but_two, e.answers)
    j = task.judge([few], task.index, "retriever")
    assert (j.top_BK[0] >= 0).sum() == 2 and torch.isneginf(j.scores_BK[0, 2])
    loss, figures = task.loss([few])
    assert torch.isfinite(loss) and np.isfinite(figures["utility"])
