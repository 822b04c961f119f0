"""DPR: it learns, resumes, its large batches and its ranks have the gradient of one batch, and what it writes is read by others."""

import json
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from ralm.errors import UsageError  # noqa: E402
from ralm.index.dense import Dense  # noqa: E402
from ralm.index.encode import encoder  # noqa: E402
from ralm.train import ranks, recipes  # noqa: E402
from ralm.train.encoder import Encoder, Trainable  # noqa: E402
from ralm.train.independent import DualEncoder  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402

CPU = torch.device("cpu")


def recipe(sentences, loss=None, held=(), **train):
    return {"kind": "dpr", "data": {"train": ["train.json"], "held_out": list(held)}, "encoder": {"model": str(sentences)},
            "loss": {"temperature": 0.1, "mined": 4} | (loss or {}),
            "train": {"steps": 8, "batch": 8, "micro": 3, "lr": 3e-3, "schedule": "constant"} | train}


def task(r, data, folder):
    return recipes.make(r, data, folder)


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def gradients(t, parts):
    """The mean gradient over the parts, and the mean loss."""
    named = dict(t.encoder.model.named_parameters())
    for p in named.values():
        p.grad = None
    total = 0.0
    for part in parts:
        loss, _ = t.loss(part)
        (loss / len(parts)).backward()
        total += float(loss.detach()) / len(parts)
    return total, {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


def test_it_learns_beside_bm25_and_the_untrained_encoder(sentences, people_data, tmp_path):
    r = recipe(sentences, held=["dev.json"], steps=60, evaluate_steps=60)
    said = fit(task(r, people_data, tmp_path), r, tmp_path)
    rows = [x for x in lines(tmp_path) if "loss" in x]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and rows[-1]["right"] > rows[0]["right"]
    last = said["evaluations"][-1]
    assert {"top1", "gold5", "mrr", "top5-bm25_low", "gold1-untrained_high"} <= last.keys() and said["counts"] == {"queries": 480}
    assert last["mrr"] > 0 and last["gold1-untrained"] == pytest.approx(last["gold1"] - 100 * np.mean(
        np.load(tmp_path / "baselines.npz")["untrained"][:, 0] == [i // 2 for i in range(24)]), abs=1e-4)


def test_stopped_and_resumed_is_uninterrupted(sentences, people_data, tmp_path):
    r = recipe(sentences, held=["dev.json"])
    r["encoder"]["dropout"] = 0.2
    whole = task(r, people_data, tmp_path / "whole")
    fit(whole, r, tmp_path / "whole")
    for until in (3, 5, None):
        parts = task(r, people_data, tmp_path / "parts")
        fit(parts, r, tmp_path / "parts", until=until)
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    for a, b in zip(whole.encoder.model.parameters(), parts.encoder.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("symmetric", [False, True])
def test_cached_in_parts_has_the_gradient_of_the_whole_batch(sentences, people_data, tmp_path, symmetric):
    got = []
    for cached, micro in ((False, 0), (True, 3), (False, 3)):
        t = task(recipe(sentences, {"cached": cached, "symmetric": symmetric, "hard": 2}, micro=micro), people_data, tmp_path)
        got.append(gradients(t, t.batch(0)))
    for loss, grads in got[1:]:
        assert loss == pytest.approx(got[0][0], abs=1e-5)
        for n, g in got[0][1].items():
            torch.testing.assert_close(grads[n], g, atol=2e-5, rtol=1e-3)


def test_cached_keeps_vectors_only(sentences, people_data, tmp_path):
    """What is saved for backward while the batch is encoded, with and without."""
    saved = {}
    for cached in (False, True):
        t = task(recipe(sentences, {"cached": cached}, micro=2), people_data, tmp_path)
        count = [0]

        def pack(x, count=count):
            count[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            t.encoder.encode([p.whole for p in t.pairs.passages], "passage", 2, cached)
        saved[cached] = count[0]
    assert saved[True] < 0.05 * saved[False]


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranks_have_the_gradient_of_one(sentences, people_data, tmp_path, monkeypatch, symmetric):
    r = recipe(sentences, {"symmetric": symmetric})
    alone = task(r, people_data, tmp_path)
    loss, expected = gradients(alone, alone.batch(3))
    local, shared = threading.local(), {"barrier": threading.Barrier(2), "held": [None] * 2}

    class Rank(ranks.World):
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def all(self, x):
            shared["held"][self.rank] = x.clone()
            shared["barrier"].wait()
            out = list(shared["held"])
            shared["barrier"].wait()
            return out

        def sum_(self, x):
            return x.copy_(sum(self.all(x)))

    monkeypatch.setattr(ranks, "world", lambda: getattr(local, "world", ranks.World()))
    tasks, got = [task(r, people_data, tmp_path) for _ in range(2)], [None, None]

    def one(i):
        local.world = Rank(i)
        torch.autograd.set_multithreading_enabled(False)
        got[i] = gradients(tasks[i], [tasks[i].batch(3)[i]])

    workers = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [x[0] for x in got] == pytest.approx([loss, loss], abs=1e-5)
    for n, g in expected.items():
        torch.testing.assert_close((got[0][1][n] + got[1][1][n]) / 2, g, atol=2e-5, rtol=1e-3)


def test_batches_depend_on_seed_and_step_alone_and_mask_false_negatives(sentences, people_data, tmp_path):
    t = task(recipe(sentences, {"hard": 2}, batch=16), people_data, tmp_path)
    again = task(recipe(sentences, {"hard": 2}, batch=16), people_data, tmp_path)
    seen = []
    for step in (7, 0, 1, 2, 3, 4):
        part, = t.batch(step)
        other, = again.batch(step)
        assert part.queries == other.queries and part.passages == other.passages and torch.equal(part.mask_BN, other.mask_BN)
        assert len(part.passages) == 16 * 3 and part.positive_B.tolist() == list(range(16))
        for i, q in enumerate(part.queries):
            name = q.split()[1]
            assert name in part.passages[i]
            assert [name in p for p in part.passages] == part.mask_BN[i].tolist()
            hard = part.passages[16 + 2 * i:18 + 2 * i]
            assert all(name not in p for p in hard) and len(set(hard)) == 2
        seen += part.queries if step < 5 else []
    assert len(set(seen)) == 80  # an epoch: every query once


def test_hard_negatives_of_the_data_come_first(sentences, tmp_path):
    rows = [{"query": f"who {c}", "positive": f"cat {c}", "negative": [f"dog {c}"]} for c in "abcdef"]
    rows.append({"query": "who z", "positive": "cat z"})
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)))
    t = task(recipe(sentences, batch=7), tmp_path, tmp_path / "run")
    part, = t.batch(0)
    for q, hard in zip(part.queries, part.passages[7:]):
        assert hard == f"dog {q[-1]}" if q != "who z" else hard != "cat z"


@pytest.mark.parametrize("separate", [False, True])
def test_what_is_written_is_read_by_sentence_transformers_and_here(sentences, people_data, tmp_path, separate):
    from sentence_transformers import SentenceTransformer

    r = recipe(sentences, steps=3)
    r["encoder"]["separate"] = separate
    t = task(r, people_data, tmp_path)
    fit(t, r, tmp_path)
    out = tmp_path / "model"
    queries, passages = ["who abcd", "where efgh"], ["abcd sat the cat 1 here", "efgh sat the dog 2 here"]
    ours = t.encoder.many(queries, "query"), t.encoder.many(passages, "passage")
    theirs = SentenceTransformer(str(out), device="cpu")
    np.testing.assert_allclose(theirs.encode_query(queries), ours[0], atol=1e-6)
    np.testing.assert_allclose(theirs.encode_document(passages), ours[1], atol=1e-6)
    here = encoder(str(out))
    np.testing.assert_allclose(here.encode(queries, "query"), ours[0], atol=1e-6)
    np.testing.assert_allclose(here.encode(passages), ours[1], atol=1e-6)
    if separate:
        assert not np.allclose(theirs.encode_query(passages), theirs.encode_document(passages), atol=1e-3)
    store = Datastore.build(tmp_path / "kb", [Document(str(i), p) for i, p in enumerate(passages)])
    hits = Dense(store, encoder=str(out)).search(queries, k=2)
    s_QN = ours[0] @ ours[1].T
    np.testing.assert_allclose(np.take_along_axis(s_QN, hits.ids, 1), hits.scores, atol=2e-3)  # training equals inference
    assert "Trained by `ralm train`: 3 steps" in (out / "README.md").read_text()
    assert {p.suffix for p in out.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md", ".txt"}


def test_random_weights_and_shapes(sentences):
    trained = Trainable(Encoder(str(sentences)), CPU)
    random = Trainable(Encoder(str(sentences), random=True, layers=1), CPU)
    assert trained.dim == random.dim == 32
    count = [sum(p.numel() for p in t.model.parameters()) for t in (trained, random)]
    assert count[1] < count[0]
    assert not np.allclose(trained.many(["cat"], "query"), random.many(["cat"], "query"), atol=0.05)
    live = trained.encode(["the cat"], "passage").detach().numpy()
    np.testing.assert_allclose(trained.many(["the cat"], "passage"), live, atol=1e-6)
    own = encoder(str(sentences)).model
    assert own is not trained.model and all(a is not b for a, b in zip(own.parameters(), trained.model.parameters()))


def test_first_layers_of_a_trained_model(sentences):
    whole, first = Trainable(Encoder(str(sentences)), CPU), Trainable(Encoder(str(sentences), layers=1), CPU)
    theirs, mine = dict(whole.model.named_parameters()), dict(first.model.named_parameters())
    assert len(mine) < len(theirs) and all(torch.equal(p, theirs[n]) for n, p in mine.items())


def test_two_encoders_are_written_and_read_as_they_are(sentences, tmp_path):
    two = Trainable(Encoder(str(sentences), separate=True), CPU)
    with torch.no_grad():
        for n, p in two.model.named_parameters():
            if ".query." in n:
                p.add_(0.05 * torch.randn_like(p))
    two.save(tmp_path / "two", {}, "")
    for wish in (Encoder(str(tmp_path / "two"), separate=True, tokens=9), Encoder(str(tmp_path / "two"))):
        again = Trainable(wish, CPU)
        assert [n for n, _ in again.model.named_parameters()] == [n for n, _ in two.model.named_parameters()]
        for role in ("query", "passage"):
            np.testing.assert_array_equal(again.many(["the cat"], role), two.many(["the cat"], role))


@pytest.mark.parametrize(("table", "change", "says"), [
    ("encoder", {"layers": 3}, "random = true"), ("encoder", {"model": "static"}, "no transformer"),
    ("encoder", {"modle": "x"}, "Did you mean 'model'"), ("loss", {"hard": "one"}, "expected int"),
    ("train", {"batch": 99}, "80 pairs")])
def test_recipes_that_cannot_be(sentences, people_data, tmp_path, table, change, says):
    r = recipe(sentences)
    r[table] |= change
    with pytest.raises(UsageError, match=says):
        DualEncoder(r, people_data, tmp_path)
