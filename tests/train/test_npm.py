"""NPM: what is masked, the objective, training is inference, ranks, kills, and that every phrase is a quotation."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
zstandard = pytest.importorskip("zstandard")

from ralm.errors import StoreError, UsageError  # noqa: E402
from ralm.lm.gpt import Decoder, GPTConfig, save  # noqa: E402
from ralm.lm.phrases import Phrases  # noqa: E402
from ralm.train import recipes  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.npm import Mask, masked  # noqa: E402
from ralm.train.tokenizer import train_bpe  # noqa: E402

_spec = importlib.util.spec_from_file_location("simulated", Path(__file__).with_name("simulated.py"))
simulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)

NAMES = ("Maria Holt", "Robert Hooke", "Albert Kölliker", "Ada Byron")
PLACES = ("the granite reef", "the white tower", "the old harbour", "the high mountain")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences in which a name and a place go together, and a tokenizer for them."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    texts = []
    for n in range(24):
        i = n % 4
        texts.append(f"Title: T{n}\n\nIn {1800 + n} {NAMES[i]} came to {PLACES[i]} and saw {rng.integers(99)} of them . " * 2 +
                     f"{PLACES[i]} was seen by {NAMES[i]} .")
    (root / "a.jsonl.zst").write_bytes(zstandard.compress("\n".join(json.dumps({"file": "x", "text": t}) for t in texts).encode()))
    (root / "held.txt.zst").write_bytes(zstandard.compress("\n".join(t.split("\n")[-1] for t in texts[:8]).encode()))
    config = GPTConfig(vocab=300, width=16, layers=1, heads=2, mlp=24, window=32)
    save(root / "tiny", Decoder(config), train_bpe(texts, 300), config)
    return root


def recipe(data, mask=None, **train):
    return {"kind": "npm", "data": {"files": ["a.jsonl.zst"], "segment": 20, "held_out": "held.txt.zst"},
            "model": {"tokenizer": f"gpt:{data / 'tiny'}", "width": 32, "layers": 2, "heads": 2}, "mask": mask or {},
            "train": {"steps": 6, "batch": 8, "lr": 3e-3, "schedule": "constant"} | train}


def make(r, data, folder):
    task = recipes.make(r, data, folder)
    with torch.no_grad():
        for p in task.npm.model.parameters():
            if p.ndim > 1:
                p *= 4  # BERT's own weights are so small that nothing matters
    return task


def test_spans_are_whole_words_that_others_have_too(data, tmp_path):
    task = make(recipe(data, {"ratio": 0.4}), data, tmp_path)
    lengths = []
    for step in range(40):
        part, = task.batch(step)
        flat = part.rows_BT.reshape(-1)
        for b, spans in enumerate(part.spans):
            row, gone = part.rows_BT[b], 0
            for s, after in zip(spans, [*spans[1:], None]):
                tokens, n = row[s.start:s.stop], s.stop - s.start
                assert 0 not in tokens and (after is None or after.start > s.stop)  # never across documents, never beside another
                assert task.begins[tokens[0]] and (s.stop == 20 or task.begins[row[s.stop]])
                assert s.first and all(f // 20 != b and np.array_equal(flat[f:f + n], tokens) for f in s.first)
                assert [f + n - 1 for f in s.first] == list(s.last) and all(f // 20 == e // 20 for f, e in zip(s.first, s.last))
                everywhere = [i for i in range(len(flat) - n + 1) if np.array_equal(flat[i:i + n], tokens) and i // 20 != b
                              and i // 20 == (i + n - 1) // 20 and (i % 20 + n == 20 or task.begins[flat[i + n]])]
                assert everywhere == list(s.first)
                gone += n
                lengths.append(n)
            assert gone <= 8
    assert 1 < np.mean(lengths) < 4 and max(lengths) <= 10


def test_nothing_shared_is_nothing_masked():
    tokens = np.arange(40).reshape(4, 10) + 1
    assert masked(tokens, np.ones(50, bool), 0, Mask(), np.random.default_rng(0)) == [[], [], [], []]


def test_it_is_the_equation(data, tmp_path):
    task = make(recipe(data), data, tmp_path)
    part, = task.batch(1)
    keys = task.npm.states(part.rows_BT.tolist()).flatten(0, 1).detach()
    scores, _, _ = task.compared(part, keys)
    wanted, n = [], 0
    for b, spans in enumerate(part.spans):
        for s in spans:
            e = scores[:, n].detach().double().exp().numpy()
            others = np.arange(len(keys)) // 20 != b
            wanted.append(sum(-math.log(e[i][list(right)].sum() / e[i][others].sum()) for i, right in enumerate((s.first, s.last))))
            n += 1
    loss, told = task.loss(part)
    assert float(loss.detach()) == pytest.approx(np.mean(wanted), abs=1e-4) and told["spans"] == n > 3


def test_the_loss_is_what_filling_gives_the_phrase(data, tmp_path):
    """Law 6: with the other sequences as the stored texts, the right places have probability exp(-loss)."""
    task = make(recipe(data), data, tmp_path)
    task.npm.model.eval()
    texts = {f"{n} {p}": f"{n} came to {p}" for n in NAMES for p in PLACES}
    sizes = [len(task.bpe.encode(t)) for t in texts.values()]
    length = max((s for s in sizes if s <= 20), key=sizes.count)
    texts = {name: t for (name, t), size in zip(texts.items(), sizes) if size == length}
    assert len(texts) > 2
    task.how = Mask(ratio=0.01)  # one span each
    part, = task._parts(np.array([task.bpe.encode(t) for t in texts.values()]), np.random.default_rng(1), 1)
    b = next(i for i, s in enumerate(part.spans) if s)
    texts.pop(list(texts)[b])
    memory = task.npm.remember(texts)
    assert len(memory.vectors_ND) == len(texts) * length
    scores, _, seen = task.compared(part, task.npm.states(part.rows_BT.tolist()).flatten(0, 1))
    n = sum(map(len, part.spans[:b]))
    span = part.spans[b][0]
    row = part.rows_BT[b].tolist()
    with torch.no_grad():
        q = task.npm.states([row[:span.start] + [task.npm.mask_start, task.npm.mask_end] + row[span.stop:]])[0]
    for i in range(2):
        p = torch.softmax(memory.vectors_ND @ q[span.start + i] / math.sqrt(32), 0)
        want = torch.softmax(scores[i, n].masked_fill(~seen[n], -math.inf), 0)[seen[n]]
        torch.testing.assert_close(p, want.detach(), atol=1e-5, rtol=1e-3)
    found = task.npm.found(q[span.start], q[span.start + 1], memory, k=10_000, tried=10_000)
    phrase = task.bpe.decode(row[span.start:span.stop]).strip()
    mine, = [f for f in found if f.phrase == phrase]
    assert texts[mine.document][mine.start:mine.end] == phrase and mine.places >= len(span.first)


def test_gradients_are_differences_and_ranks_agree(data, tmp_path, monkeypatch):
    r = recipe(data)
    task = make(r, data, tmp_path)
    loss, expected = simulated.gradients(task, task.batch(2))
    name = "embeddings.word_embeddings.weight"
    p, g, ends = dict(task.npm.model.named_parameters())[name], expected[name], []
    for sign in (1, -1):
        with torch.no_grad():
            p += sign * 0.01 * g / g.norm()
            ends.append(float(task.loss(task.batch(2)[0])[0]))
            p -= sign * 0.01 * g / g.norm()
    assert (ends[0] - ends[1]) / 0.02 == pytest.approx(float(g.norm()), rel=0.05)
    losses, grads = simulated.on_ranks(2, monkeypatch, lambda: make(r, data, tmp_path), step=2)
    assert sum(losses) / 2 == pytest.approx(loss, abs=1e-4)
    for n, g in expected.items():
        torch.testing.assert_close(grads[n], g, atol=1e-4, rtol=1e-2)


def test_it_learns_and_quotes(data, tmp_path):
    r = recipe(data, steps=150, warmup=0.1)
    task = make(r, data, tmp_path)
    said = fit(task, r, tmp_path)
    rows = [x for x in simulated.lines(tmp_path) if "loss" in x]
    assert np.mean([x["loss"] for x in rows[-10:]]) < 0.5 * np.mean([x["loss"] for x in rows[:5]])
    last = said["evaluations"][-1]
    assert last["right"] > 2 * last["chance"] and last["spans"] > 5
    npm = Phrases.load(tmp_path / "model")
    texts = {f"d{i}": f"In {1830 + i} {n} came to {p} and saw {i} of them ." for i, (n, p) in enumerate(zip(NAMES, PLACES))}
    found = npm.fill("Maria Holt came to [MASK] and", npm.remember(texts), k=8)
    assert found and all(texts[f.document][f.start:f.end] == f.phrase for f in found)
    assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
    with pytest.raises(UsageError, match="exactly one"):
        npm.fill("no gap", npm.remember(texts))
    with pytest.raises(StoreError):
        Phrases.load(tmp_path)


def test_killed_and_resumed_is_uninterrupted(data, tmp_path):
    r = recipe(data, steps=6, save_steps=2, evaluate_steps=3)
    fit(recipes.make(r, data, tmp_path / "whole"), r, tmp_path / "whole")
    simulated.killed_and_resumed(r, data, tmp_path / "killed", (3,))
    assert simulated.lines(tmp_path / "whole") == simulated.lines(tmp_path / "killed")


@pytest.mark.parametrize(("table", "change", "says"), [
    ("mask", {"ratio": 0}, "between 0 and 1"), ("mask", {"batches": "x"}, "bm25 or scattered"),
    ("train", {"batch": 1}, "at least 2"), ("mask", {"rate": 1.0}, "unknown setting"), ("train", {"batch": 4000}, "use fewer")])
def test_recipes_that_cannot_be(data, tmp_path, table, change, says):
    r = recipe(data)
    r[table] |= change
    with pytest.raises(UsageError, match=says):
        recipes.make(r, data, tmp_path).batch(0)
