"""TRIME: training is inference, the memory has gradients in one forward, in parts and over ranks; it learns, resumes, is read."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
zstandard = pytest.importorskip("zstandard")

from ralm.errors import UsageError  # noqa: E402
from ralm.lm import load  # noqa: E402
from ralm.lm.gpt import GPT, Decoder, GPTConfig, save  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.train import recipes  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.memory import memory_nll  # noqa: E402
from ralm.train.tokenizer import train_bpe  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

_spec = importlib.util.spec_from_file_location("simulated", Path(__file__).with_name("simulated.py"))
simulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)

L = 12
PLACES = "reef tower granite harbour snow mountain river candle lamp cell".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Articles about places: what was said of one comes back in other articles. And a tokenizer for them, as a checkpoint."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    texts = []
    for n in range(40):
        a, b = PLACES[n % 10], PLACES[(n * 7 + 3) % 10]
        texts.append(f"Title: P{n}\n\nThe {a} stands on the {b} and the {a} is number {hash_of(a)} . " +
                     " ".join(rng.choice(PLACES, 8)) + f" . The {b} is number {hash_of(b)} .")
    (root / "a.jsonl.zst").write_bytes(zstandard.compress("\n".join(json.dumps({"file": "x", "text": t}) for t in texts).encode()))
    (root / "held.txt.zst").write_bytes(zstandard.compress(texts[3].encode() * 3))
    bpe = train_bpe(texts, 280)
    save(root / "tiny", loud(GPTConfig(vocab=280, width=16, layers=2, heads=2, mlp=24, window=32)), bpe,
         GPTConfig(vocab=280, width=16, layers=2, heads=2, mlp=24, window=32))
    return root


def hash_of(word):
    return 100 + sum(map(ord, word)) % 800


def loud(config, seed=0):
    """A decoder whose output depends on everything it reads."""
    torch.manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model


def recipe(data, memory=None, start=True, **train):
    folder = f"gpt:{data / 'tiny'}"
    model = {"start": folder} if start else {"tokenizer": folder, "width": 16, "layers": 2, "heads": 2, "mlp": 24, "window": 32}
    return {"kind": "trime", "data": {"files": ["a.jsonl.zst"], "segment": L, "held_out": "held.txt.zst"},
            "model": model | {"adam_lr": 0.01}, "memory": {"segments": 4, "drop": 0.5} | (memory or {}),
            "train": {"steps": 6, "batch": 8, "lr": 0.02, "schedule": "constant"} | train}


def make(r, data, folder):
    return recipes.make(r, data, folder)


def whole_texts(task, count):
    """Numbers of segments whose text is cut into the same tokens again."""
    out = []
    for n, row in enumerate(task.segments.tokens_NL.tolist()):
        if 0 not in row and task.bpe.encode(task.bpe.decode(row)) == row:
            out.append(n)
    assert len(out) >= count
    return out[:count]


@pytest.mark.parametrize(("kind", "drop"), [("external", 0.0), ("external", 1.0), ("local", 0.0)])
def test_the_loss_is_minus_the_score_over_a_store_of_the_memory(data, tmp_path, kind, drop):
    """Law 6: the segments are the documents; each is scored with its own document excluded."""
    task = make(recipe(data, {"kind": kind, "drop": drop}, batch=4), data, tmp_path)
    numbers = whole_texts(task, 4)
    task._group = lambda n: np.array(numbers)
    part, = task.batch(0)
    with torch.no_grad():
        loss, told = task.loss(part)
    task.model.requires_grad_(False)
    lm = GPT(task.model, task.bpe)
    rows = task.segments.rows(numbers)
    store = Datastore.build(tmp_path / "kb", [Document(f"{n}", task.bpe.decode(r[1:].tolist())) for n, r in zip(numbers, rows)])
    tokens = TokenStore.build(store, lm, metric="ip", window=L)
    assert len(tokens) == 4 * L
    how = f"trime:k={4 * L},local={str(drop == 0).lower()}" if kind == "external" else "trime:k=0"
    ralm = RALM(lm, how=how, tokens=tokens)
    scored = np.concatenate([ralm.score(r[1:].tolist(), window=L, exclude=[f"{n}"]).logp for n, r in zip(numbers, rows)])
    assert float(loss) == pytest.approx(-scored.mean(), abs=2e-3)  # the store's keys are float16
    # the same with keys as the store holds them: to the last digits of float32
    hidden, key = task.states(part.rows_BT)
    kept, mask = key.half().float(), part.seen.mask(slice(0, 4 * L), 4 * L)
    own = torch.arange(4 * L)[:, None] // L == torch.arange(4 * L) // L
    scores = torch.where(own, key @ key.T, key @ kept.T) / 4
    nll = memory_nll(scores, part.values_M == part.rows_BT[:, 1:].reshape(-1, 1), mask, hidden @ task.model.embed.weight.T,
                     part.rows_BT[:, 1:].flatten())
    np.testing.assert_allclose(-scored, nll.numpy(), atol=2e-5)
    assert abs(told["own"] - float(loss)) > 0.01  # the memory matters


def test_long_memory_is_the_local_one_of_a_longer_window(data, tmp_path):
    """Keys are those of segments read one by one; of one segment, long is local."""
    both = {"kind": "long", "segments": 1}, {"kind": "local", "segments": 1, "batches": "consecutive"}
    a, b = (make(recipe(data, m, batch=2), data, tmp_path) for m in both)
    assert float(a.loss(a.batch(0)[0])[0].detach()) == pytest.approx(float(b.loss(b.batch(0)[0])[0].detach()), abs=1e-6)
    task = make(recipe(data, {"kind": "long"}), data, tmp_path)
    for part in task.batch(5):
        text = task.segments.tokens_NL.reshape(-1)
        assert any(np.array_equal(text[i:i + 4 * L], part.values_M) for i in range(0, len(text), L))  # they follow each other


@pytest.mark.parametrize("kind", ["external", "long", "local", "none"])
def test_parts_and_ranks_have_the_gradient_of_one_forward(data, tmp_path, kind, monkeypatch):
    r = recipe(data, {"kind": kind})
    task = make(r, data, tmp_path)
    loss, expected = simulated.gradients(task, task.batch(2))
    got = [simulated.gradients(t, t.batch(2)) for t in [make(recipe(data, {"kind": kind}, micro=1), data, tmp_path)]]
    for size in (2, 4):
        losses, grads = simulated.on_ranks(size, monkeypatch, lambda: make(r, data, tmp_path), step=2)
        got.append((sum(losses) / size, grads))
    for other, grads in got:
        assert other == pytest.approx(loss, abs=1e-5)
        for n, g in expected.items():
            torch.testing.assert_close(grads[n], g, atol=2e-5, rtol=1e-3)
    assert sum(float(g.abs().sum()) for g in expected.values()) > 0.1


def test_parts_keep_states_only(data, tmp_path):
    """What one forward saves for the backward pass of a group, and what parts save."""
    saved = {}
    for micro in (0, 1):
        task = make(recipe(data, batch=4, micro=micro), data, tmp_path)
        count = [0]

        def pack(x, count=count):
            count[0] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            task.states(task.batch(0)[0].rows_BT)
        saved[micro] = count[0]
    assert saved[1] < 0.05 * saved[0]


def test_keys_without_gradient_are_another_gradient(data, tmp_path):
    got = []
    for gradient in (True, False):
        task = make(recipe(data, {"gradient": gradient}), data, tmp_path)
        got.append(simulated.gradients(task, task.batch(0)))
    a, b = (grads["embed.weight"] for _, grads in got)
    assert got[0][0] == pytest.approx(got[1][0]) and not torch.allclose(a, b, atol=1e-4)


def test_it_overfits_by_its_memory(data, tmp_path):
    """From random weights, on two groups: the loss falls, and below what the same network says without its memory."""
    r = recipe(data, {"drop": 0.5}, start=False, steps=120, batch=4)
    r["data"]["documents"] = 2
    said = fit(make(r, data, tmp_path), r, tmp_path)
    rows = [x for x in simulated.lines(tmp_path) if "loss" in x]
    assert rows[-1]["loss"] < 0.25 * rows[0]["loss"] and rows[-1]["loss"] < rows[-1]["own"]
    assert rows[-1]["share"] > 0.1 and said["counts"] == {"tokens": 120 * 4 * L}
    assert {"bits_per_byte_alone", "bits_per_byte_local"} <= said["evaluations"][-1].keys()


def test_killed_and_resumed_is_uninterrupted(data, tmp_path):
    r = recipe(data, micro=2, evaluate_steps=3, save_steps=2, steps=7)
    r["memory"]["warm"] = 2
    fit(make(r, data, tmp_path / "whole"), r, tmp_path / "whole")
    simulated.killed_and_resumed(r, data, tmp_path / "killed", (1, 5))
    assert simulated.lines(tmp_path / "whole") == simulated.lines(tmp_path / "killed")
    first = [x for x in simulated.lines(tmp_path / "whole") if "loss" in x]
    assert [x["share"] > 0 for x in first] == [False] * 2 + [True] * 5  # warm: without memory
    a, b = (load(f"gpt:{tmp_path / name / 'model'}") for name in ("whole", "killed"))
    for (n, x), y in zip(a.model.named_parameters(), b.model.parameters()):
        assert torch.equal(x, y), n


def test_what_is_written_is_read_here(data, tmp_path):
    r = recipe(data, steps=2)
    task = make(r, data, tmp_path)
    fit(task, r, tmp_path)
    lm = load(f"gpt:{tmp_path / 'model'}")
    ids = lm.tokenizer.encode("The tower stands on the reef")
    ours = RALM(GPT(task.model, task.bpe), how="trime:k=0").score(ids).logp
    np.testing.assert_allclose(RALM(lm, how="trime:k=0").score(ids).logp, ours, atol=0.02)
    assert lm.config.trained["kind"] == "trime"
    assert "external memory of 4 segments" in (tmp_path / "model" / "README.md").read_text()


def test_batches_depend_on_seed_and_step_alone(data, tmp_path):
    a, b = (make(recipe(data), data, tmp_path) for _ in range(2))
    for step in (9, 0, 3):
        for x, y in zip(a.batch(step), b.batch(step)):
            assert torch.equal(x.rows_BT, y.rows_BT) and torch.equal(x.seen.own_N, y.seen.own_N)
    numbers = [n for g in range(len(a.segments) // 4) for n in a._group(g).tolist()]
    assert len(set(numbers)) == len(numbers)  # an epoch: every segment once


@pytest.mark.parametrize(("table", "change", "says"), [
    ("memory", {"kind": "extern"}, "Did you mean 'external'"), ("memory", {"batches": "bm"}, "unknown"),
    ("memory", {"kind": "long", "batches": "scattered"}, "consecutive"), ("memory", {"segments": 3}, "multiple"),
    ("memory", {"drop": 2}, "probability"), ("memory", {"segments": 800}, "multiple"), ("data", {"segment": 64}, "window of 32"),
    ("model", {"start": "bundled:reader"}, "no decoder"), ("memory", {"dorp": 0.1}, "Did you mean 'drop'")])
def test_recipes_that_cannot_be(data, tmp_path, table, change, says):
    r = recipe(data)
    r[table] |= change
    with pytest.raises(UsageError, match=says):
        make(r, data, tmp_path)
