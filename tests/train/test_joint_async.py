"""REALM: the marginal is its brute force, the retriever learns to find what helps, the index keeps time, whatever happens."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from ralm.errors import FingerprintError, RalmError, UsageError  # noqa: E402
from ralm.index import manifest  # noqa: E402
from ralm.index.encode import encoder  # noqa: E402
from ralm.lm.realm import Realm  # noqa: E402
from ralm.train import recipes, toy  # noqa: E402
from ralm.train.joint_async import Fresh, vectors  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.refresh import Index, _numbers  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("toy"), toy.World(letters=5, homes=10), warm=120, pairs=15)


def recipe(world, index=None, **tables):
    out = {"kind": "realm", "data": {"texts": ["texts.jsonl"], "held_out": [], "corpus": ["facts.json"], "split": "none"},
           "encoder": {"model": str(world / "retriever")},
           "reader": {"model": str(world / "reader"), "text": 16, "passage": 16, "embeddings": True, "lr": 1e-5},
           "masking": {"words": 3}, "index": {"k": 4, "refresh": 6, "lag": 2, "background": False} | (index or {}),
           "loss": {"temperature": 0.05},
           "train": {"steps": 16, "batch": 4, "lr": 3e-3, "schedule": "constant", "save_steps": 5, "clip": 1.0}}
    return {k: {**v, **tables.get(k, {})} if isinstance(v, dict) else v for k, v in out.items()}


def made(r, world, folder):
    return recipes.make(r, world, folder)


def run(r, world, folder, **options):
    task = made(r, world, folder)
    return task, fit(task, r, folder, **options)


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def same(task, other, a, b):
    assert lines(a) == lines(b)
    for one, two in ((task.encoder.model, other.encoder.model), (task.reader, other.reader)):
        assert all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters()))


# ---- the objective


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_loss_is_the_marginal_by_hand(world, tmp_path, per):
    task = made(recipe(world, loss={"per": per}, masking={"kind": "spans"}), world, tmp_path)
    task.prepare(0)
    part = task.batch(0)[0]
    loss, figures = task.loss(part)
    total, utility, masks = 0.0, 0.0, 0
    for e, some in zip(part, task.read(part).candidates):
        passages = ["", *(c.text for c in some)]
        q = task.encoder.many([e.row.query], "query")[0]
        scores = [float(q @ task.encoder.many([p], "passage")[0]) / 0.05 for p in passages]
        weights = np.exp(scores) / np.sum(np.exp(scores))
        with torch.no_grad():
            p_KM = np.array([[float(task.reader.distribution(e.row, [p])[0, m, t].exp()) for m, t in enumerate(e.row.targets)]
                             for p in passages])
        total += -math.log(weights @ p_KM.prod(1)) if per == "sequence" else -np.log(weights @ p_KM).sum()
        utility += float((np.log(weights @ p_KM) - np.log(p_KM[0])).sum())
        masks += len(e.row.places)
    assert float(loss.detach()) == pytest.approx(total / len(part), rel=1e-4)
    assert figures["retrieval_utility"] == pytest.approx(utility / masks, abs=1e-4)


def test_gradient_of_the_scores_and_of_the_weights(world, tmp_path):
    """d L / d score = p(z|x) - p(z|x, y), and a step of the encoder's weights changes the loss as its gradient says."""
    task = made(recipe(world), world, tmp_path)
    task.prepare(0)
    part = task.batch(0)[0]
    loss, _ = task.loss(part)
    named = [p for g in task.groups() if g.name.startswith("retriever") for p in g.parameters.values()]
    grads = torch.autograd.grad(loss, named, allow_unused=True)
    moved = [(p, g) for p, g in zip(named, grads) if g is not None]
    size = sum(float(g.square().sum()) for _, g in moved)
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, g in moved:
                p.add_(g, alpha=sign * 1e-4 / math.sqrt(size))
        losses.append(float(task.loss(part)[0].detach()))
    assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(math.sqrt(size), rel=0.05)
    read = task.read(part)
    joint = read.log_w_BK.detach() + (read.logp_BKM * read.mask_BM[:, None]).sum(-1).detach()
    s_BK = read.log_w_BK.detach().clone().requires_grad_()
    from ralm.how.mixing import log_weights
    from ralm.train.objectives import marginal

    marginal(read.logp_BKM.detach(), log_weights(s_BK), read.mask_BM).backward()
    torch.testing.assert_close(s_BK.grad * len(part), log_weights(s_BK).exp().detach() - torch.softmax(joint, 1))


def test_reader_is_bert_with_its_head(world, tmp_path):
    """The same losses as transformers' own forward of the row with its labels."""
    task = made(recipe(world), world, tmp_path)
    example, fact = task.batch(0)[0][0], task.corpus.texts()[0]
    with torch.no_grad():
        logp_BKM, mask_BM = task.reader.logp([example.row, example.row], [["", fact], [fact, None]])
        t = task.reader.tokenizer
        ids = [t.cls_token_id, *example.row.ids, t.sep_token_id, *task.reader.pieces([fact])[0], t.sep_token_id]
        labels, types = torch.full((1, len(ids)), -100), torch.ones(1, len(ids), dtype=torch.long)
        types[:, :len(example.row.ids) + 2] = 0
        for place, target in zip(example.row.places, example.row.targets):
            labels[0, place + 1] = target
        theirs = task.reader.model(input_ids=torch.tensor([ids]), token_type_ids=types, labels=labels).loss
    assert mask_BM.all() and float(-logp_BKM[0, 1].mean()) == pytest.approx(float(theirs), abs=1e-5)
    torch.testing.assert_close(logp_BKM[0, 1], logp_BKM[1, 0])
    assert (logp_BKM[1, 1] == 0).all() and (logp_BKM[0, 0] < 0).all()


# ---- what it is for


def test_retriever_learns_to_find_what_only_the_passage_says(world, tmp_path):
    r = recipe(world, index={"refresh": 10, "lag": 0, "k": 6, "probe": 0}, data={"corpus": [], "held_out": ["facts.json"]},
               train={"steps": 50, "batch": 12, "save_steps": 50})
    task, said = run(r, world, tmp_path)
    rows = [x for x in lines(tmp_path) if "loss" in x]

    def mean(some, key):
        return np.mean([x[key] for x in some])

    assert mean(rows[-10:], "loss") < 0.3 * mean(rows[:5], "loss") and mean(rows[-10:], "found") > 0.95
    assert mean(rows[-10:], "retrieval_utility") > 2 > mean(rows[:3], "retrieval_utility") and mean(rows[-10:], "null") < 0.1
    last = said["evaluations"][-1]
    assert last["gold1-before"] > 30 and last["gold5"] > 80  # people no text tells of
    assert {x["index_age"] for x in rows} == set(range(10))
    written = encoder(str(tmp_path / "model" / "retriever"))
    np.testing.assert_allclose(written.encode(["tagi"], "query"), task.encoder.many(["tagi"], "query"), atol=1e-5)
    assert json.loads((tmp_path / "model" / "realm.json").read_text())["k"] == 6


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_what_is_written_scores_what_training_minimised(world, tmp_path, per):
    """-loss = score of the exported model, where the index is that of its weights; and it fills masks from what it reads."""
    task, _ = run(recipe(world, loss={"per": per}, masking={"kind": "spans"}), world, tmp_path, until=1)
    task.export(tmp_path / "model", {"recipe": {}, "evaluations": [], "kind": "realm", "steps": 1, "seconds": 0, "finished": False})
    realm = Realm(tmp_path / "model", task.corpus.store)
    task.refresher = Fresh(task.corpus.ids, vectors(task))
    for e in task.batch(1)[0]:
        with torch.no_grad():
            loss, _ = task.loss([e])
        at = e.sentence.lower().index(e.row.answer.lower())
        end = at + len(e.row.answer)
        assert realm.score(e.sentence, [(at, end)]) == pytest.approx(-float(loss), abs=2e-3)
    said = realm.fill(task.batch(0)[0][0].row.query)
    assert said.passages[0] is None and len(said.passages) == 5 and sum(said.weights) == pytest.approx(1)
    assert all(w in realm.reader.tokenizer.get_vocab() for w in said.words) and said.logp < 0
    with pytest.raises(UsageError, match="hold no word piece"):
        realm.score("we know", [(40, 42)])


def test_frozen_retriever_stays_and_the_reader_learns(world, tmp_path):
    r = recipe(world, loss={"retriever": False})
    task, _ = run(r, world, tmp_path)
    before = made(r, world, tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(task.encoder.model.parameters(), before.encoder.model.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(task.reader.parameters(), before.reader.parameters()))
    assert all(x["index_age"] == 0 and "overlap" not in x for x in lines(tmp_path) if "loss" in x)


def test_a_retriever_that_gets_no_gradient_is_an_error(world, tmp_path, monkeypatch):
    r = recipe(world, train={"idle": 3})
    task = made(r, world, tmp_path)
    weights = task.weights
    monkeypatch.setattr(task, "weights", lambda q, c: weights(q, c).detach() + 0 * q.sum())
    with pytest.raises(RalmError, match="'retriever' has got no gradient for 3 steps"):
        fit(task, r, tmp_path)


def test_passage_of_the_text_and_its_copies_are_no_candidates(world, tmp_path):
    """Texts that are the corpus themselves: their own passage, and one that quotes it, are never read."""
    rows = [json.loads(x)["text"] for x in (world / "texts.jsonl").open()]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"id": str(n), "text": x}) + "\n" for n, x in enumerate(
        [*rows[:8], *(f"he said : {x}" for x in rows[:8])])))
    r = recipe(world, data={"texts": [], "corpus": ["all.jsonl"]}, index={"k": 3})
    task = made(r, tmp_path, tmp_path / "run")
    task.prepare(0)
    part = task.batch(0)[0] + task.batch(1)[0]
    hits = task.refresher.propose(task.encoder.many([e.row.query for e in part], "query"), 16)
    assert all(e.chunk in row for e, row in zip(part, hits.ids.tolist()))  # they are proposed
    for e, some in zip(part, task.read(part).candidates):
        assert len(some) == 3 and all(c.id != e.chunk and e.sentence not in c.text and "[MASK]" not in c.text for c in some)
    few = task.corpus.candidates(part[:1], task.refresher.propose(task.encoder.many(["a"], "query"), 2), 3)
    assert len(few[0]) <= 2


def test_threads_and_parts_change_nothing_and_bfloat16_runs(world, tmp_path):
    r = recipe(world, train={"micro": 2, "steps": 5})
    one, _ = run(r, world, tmp_path / "one")
    two, _ = run({**r, "train": r["train"] | {"threads": 2}}, world, tmp_path / "two")
    same(one, two, tmp_path / "one", tmp_path / "two")
    run(recipe(world, train={"steps": 5}), world, tmp_path / "whole")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "whole")):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-3)
    run(recipe(world, train={"steps": 3, "dtype": "bfloat16"}), world, tmp_path / "half")
    for a, b in zip(lines(tmp_path / "half"), lines(tmp_path / "whole")):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)


# ---- the index keeps time


def test_which_index_when():
    index = Index(refresh=6, lag=2)
    assert [index.active(t) for t in range(16)] == [0] * 8 + [6] * 6 + [12] * 2
    assert [index.pending(t) for t in range(16)] == [-1] * 6 + [6, 6] + [-1] * 4 + [12, 12] + [-1] * 2
    assert max(t - index.active(t) for t in range(500)) == 6 + 2 - 1
    assert {Index(refresh=0).active(t) for t in range(9)} == {0} and {Index(refresh=0).pending(t) for t in range(9)} == {-1}
    assert all(Index(refresh=1, lag=0).active(t) == t for t in range(9))
    with pytest.raises(UsageError, match="lag below refresh"):
        Index(refresh=5, lag=5).check()


def test_index_of_every_step_is_exact_training(world, tmp_path):
    """T = 1: proposals are those of the weights at hand."""
    run(recipe(world, index={"refresh": 1, "lag": 0}), world, tmp_path, until=3)
    rows = [x for x in lines(tmp_path) if "loss" in x]
    assert {x["index_age"] for x in rows} == {0} and all(x["overlap"] == 1 for x in rows)
    run(recipe(world, index={"refresh": 0}, train={"lr": 0.03}), world, tmp_path / "never")
    rows = [x for x in lines(tmp_path / "never") if "loss" in x]
    assert [x["index_age"] for x in rows] == list(range(16)) and np.mean([x["overlap"] for x in rows[8:]]) < 0.9


@pytest.mark.slow
def test_background_is_on_the_spot(world, tmp_path):
    spot, _ = run(recipe(world), world, tmp_path / "spot")
    behind, _ = run(recipe(world, index={"background": True}), world, tmp_path / "behind")
    assert behind.refresher.worker is None  # ended with the run
    same(spot, behind, tmp_path / "spot", tmp_path / "behind")
    said = [json.loads(x) for x in (tmp_path / "behind" / "refresh.jsonl").open()]
    assert [x["step"] for x in said] == [0, 6, 12] and all(x["waited"] >= 0 for x in said)


CHILD = """
import json, sys
from pathlib import Path
from ralm.train import recipes
from ralm.train.loop import fit
r, world, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
fit(recipes.make(r, world, folder), r, folder)
"""


def workers():
    """Processes that make indexes, by number."""
    out = set()
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if b"ralm.train.behind" in (p / "cmdline").read_bytes():
                out.add(int(p.name))
        except OSError:
            pass
    return out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_and_resumed_is_uninterrupted_and_nothing_is_left(world, tmp_path):
    r = recipe(world, index={"background": True}, train={"save_steps": 3})
    whole, _ = run(recipe(world, train={"save_steps": 3}), world, tmp_path / "whole")
    before, seen, killed = workers(), set(), tmp_path / "killed"
    for wanted in (4, 8, 13):
        child = subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(r), str(world), str(killed)],
                                 cwd=Path(__file__).parents[2])
        until = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < until:
            seen |= workers() - before
            if (killed / "metrics.jsonl").is_file() and len([1 for _ in (killed / "metrics.jsonl").open()]) >= wanted:
                break
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    until = time.monotonic() + 10
    while seen & workers() and time.monotonic() < until:
        time.sleep(0.05)
    assert seen and not seen & workers()  # they noticed
    resumed, _ = run(recipe(world, index={"background": True}, train={"save_steps": 3}), world, killed)
    same(whole, resumed, tmp_path / "whole", killed)


def test_stopped_between_snapshot_and_use_goes_on(world, tmp_path):
    whole, _ = run(recipe(world), world, tmp_path / "whole")
    for until in (6, 7, 8, 13, None):
        task, _ = run(recipe(world), world, tmp_path / "parts", until=until)
    same(whole, task, tmp_path / "whole", tmp_path / "parts")
    store = task.corpus.store.path
    kept = {int(p.name) for p in (tmp_path / "parts" / "snapshots").iterdir()}
    assert kept <= {6, 12} and 12 in kept  # what no saved state needs is gone
    assert {int(p.name[-6:]) for p in (store / "index").iterdir()} == kept


def test_foreign_and_stale_indexes_are_refused(world, tmp_path):
    r = recipe(world)
    task, _ = run(r, world, tmp_path, until=7)
    snapshots, store = tmp_path / "snapshots", task.corpus.store.path
    assert {p.name for p in snapshots.iterdir()} == {"000000", "000006"}
    told = (snapshots / "000000" / "model.safetensors").read_bytes()
    other = bytearray(told)
    other[-3] ^= 1
    (snapshots / "000000" / "model.safetensors").write_bytes(bytes(other))
    with pytest.raises(FingerprintError, match="not the snapshot of step 0"):
        run(r, world, tmp_path)
    (snapshots / "000000" / "model.safetensors").write_bytes(told)
    folder = store / "index" / "dense-realm000000"
    now = manifest.load(folder)
    from dataclasses import replace

    manifest.commit(folder, replace(now, settings=now.settings | {"fingerprint": "0" * 32}))
    with pytest.raises(FingerprintError, match="made with weights 0000"):
        task.refresher._open(0)
    run(r, world, tmp_path, until=8)  # one of other weights is not used: it is made again
    assert manifest.load(store / "index" / "dense-realm000006").settings["fingerprint"] != "0" * 32
    task, _ = run(r, world, tmp_path / "b", until=3)
    task.refresher.marks[0, 0] = 6  # a state that stands on an index of another step
    with pytest.raises(FingerprintError, match="index of step 6, this recipe that of step 0"):
        task.refresher._begin(3)
    task.refresher.marks[0, 0] = 0
    task.refresher.marks[0, 3:5] = torch.tensor(_numbers("f" * 32))
    with pytest.raises(FingerprintError, match=r"the corpus .* is not the one"):
        task.refresher._begin(3)


def test_a_background_process_that_dies_ends_the_run(world, tmp_path):
    task = made(recipe(world, index={"background": True}), world, tmp_path)
    task.refresher._snapshot(0)
    os.kill(task.refresher.worker.process.pid, signal.SIGKILL)
    with pytest.raises(RalmError, match=r"has ended .* go on from the last save"):
        task.refresher._use(0)
    task.close()


def test_the_process_ends_with_the_pipe_before_it_has_begun():
    """A run that is killed while its process still imports leaves nothing behind."""
    process = subprocess.Popen([sys.executable, "-m", "ralm.train.behind"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               cwd=Path(__file__).parents[2])
    began = time.process_time()
    process.stdin.close()
    assert process.wait(60) == 0 and process.stdout.read() == b"" and time.process_time() - began < 5
    process.stdout.close()


def test_recipes_that_cannot_be(world, tmp_path):
    for table, change, says in (("loss", {"per": "word"}, r"\[loss\] per"), ("index", {"lag": 9}, "lag below refresh"),
                                ("reader", {"layers": 7}, "at least 7"), ("masking", {"kind": "nouns"}, "kind of masking"),
                                ("reader", {"text": 40}, "the reader takes 48"), ("masking", {"words": 40}, "hardly a sentence"),
                                ("train", {"micro": 3}, "not a multiple")):
        r = recipe(world, **{table: change})
        with pytest.raises(UsageError, match=says):
            task = made(r, world, tmp_path)
            task.batch(0)
