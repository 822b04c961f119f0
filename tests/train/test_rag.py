"""RAG end to end: the loss is -score, closed forms, gradients to both halves and to no passage, foreign indexes, kills."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
pytest.importorskip("tokenizers")

from ralm.errors import FingerprintError, RalmError, UsageError  # noqa: E402
from ralm.index.dense import Dense  # noqa: E402
from ralm.lm import load  # noqa: E402
from ralm.lm.gpt import Decoder, GPTConfig, save  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.train import recipes  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.tokenizer import train_bpe  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402

_spec = importlib.util.spec_from_file_location("simulated", Path(__file__).with_name("simulated.py"))
simulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, people_data):
    """A tiny decoder whose distribution depends on everything it reads."""
    folder = tmp_path_factory.mktemp("decoder")
    texts = [p["context"] for a in json.loads((people_data / "train.json").read_text())["data"] for p in a["paragraphs"]]
    config = GPTConfig(vocab=300, width=16, layers=2, heads=2, mlp=24, window=96)
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.4) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    save(folder, model, train_bpe(texts, 300), config)
    return folder


def recipe(sentences, decoder, rag=None, generator=None, data=None, **train):
    return {"kind": "rag", "data": {"pairs": ["train.json"], "held_out": ["dev.json"], "questions": 6} | (data or {}),
            "encoder": {"model": str(sentences)}, "generator": {"model": f"gpt:{decoder}", "lr": 1e-2} | (generator or {}),
            "rag": {"k": 3, "tokens": 24, "temperature": 0.1} | (rag or {}),
            "train": {"steps": 6, "batch": 4, "micro": 2, "lr": 3e-3, "schedule": "constant"} | train}


def make(r, data, folder):
    return recipes.make(r, data, folder)


@pytest.mark.parametrize(("kind", "weights"), [("sequence", "posterior"), ("token", "prior")])
def test_the_loss_is_minus_the_score(sentences, decoder, people_data, tmp_path, kind, weights):
    """Law 6, after some steps of training, with the exported encoder over an index of its own."""
    r = recipe(sentences, decoder, {"marginal": kind})
    task = make(r, people_data, tmp_path)
    fit(task, r, tmp_path)
    task.lm.model.requires_grad_(False)
    out = tmp_path / "model"
    found = Dense(task.store, encoder=str(out / "encoder"), name="after")
    ralm = RALM(task.lm, found, how=f"ensemble:weights={weights},k=3,tokens=24,temperature=0.1")
    matters = []
    for example in task.train[:4]:
        loss, told = task.loss([example])
        prompt = task.lm.tokenizer.decode(example.prompt)
        scored = ralm.score(example.answer, prompt=prompt, query=example.query)
        assert float(loss.detach()) == pytest.approx(scored.nats, abs=2e-3)
        assert scored.evidence[0].query == example.query and len(scored.evidence[0].ids) == 3
        alone = RALM(task.lm).score(example.answer, prompt=prompt).nats
        matters.append(abs(alone - scored.nats))
        one_by_one = [RALM(task.lm, found, how="ensemble:k=3,tokens=24,temperature=0.1").score(
            example.answer, prompt=prompt, query=example.query).logp.sum()]
        assert told["retrieval_utility"] == pytest.approx((one_by_one[0] + alone) / len(example.answer), abs=2e-3)
    assert max(matters) > 0.05
    again = RALM(load(f"gpt:{out / 'generator'}"), found, how=ralm.how).score(example.answer, prompt=prompt, query=example.query)
    assert again.nats == pytest.approx(scored.nats, abs=0.05)  # weights are written as float16


def test_it_is_the_equation(sentences, decoder, people_data, tmp_path):
    """Sums over passages one by one, in float64."""
    for kind in ("sequence", "token"):
        task = make(recipe(sentences, decoder, {"marginal": kind}), people_data, tmp_path)
        part = task.batch(3)[0]
        q = task.encoder.many([e.query for e in part], "query").astype(float)
        want = []
        for e, q_D in zip(part, q):
            ids = task.index.nearest(q_D[None].astype(np.float32), 3).ids[0]
            texts = [task.store.chunks([int(i)])[0] for i in ids]
            d = task.encoder.many([f"{c.title}\n{c.text}" for c in texts], "passage")
            w = np.exp(d @ q_D / 0.1)
            p = []
            for c in texts:
                z = task.lm.tokenizer.encode(f"{c.title}\n{c.text}\n")
                row = [0, *z, *e.prompt, *e.answer]
                assert len(z) <= 24, "a passage that is cut, or this oracle must cut it"
                with torch.no_grad():
                    logp = torch.log_softmax(task.lm.forward(torch.tensor([row])).logits[0].double(), -1).numpy()
                p.append([np.exp(logp[len(row) - len(e.answer) - 1 + t, y]) for t, y in enumerate(e.answer)])
            w, p = w / w.sum(), np.array(p)
            want.append(-np.log((w * p.prod(1)).sum()) if kind == "sequence" else -np.log(w @ p).sum())
        assert float(task.loss(part)[0].detach()) == pytest.approx(np.mean(want), abs=2e-3)  # stored vectors are float16


def test_the_gradient_is_the_difference(sentences, decoder, people_data, tmp_path):
    """Finite differences through the whole of it, in directions of both halves; passages get none, of the encoder's too."""
    task = make(recipe(sentences, decoder, {"temperature": 0.5}), people_data, tmp_path)
    part = task.batch(0)[0]
    proposed = task._propose([e.query for e in part], task.encoder.encode([e.query for e in part], "query"))
    task._propose = lambda queries, query_BD: proposed  # which passages are read is a step function of the weights
    _, grads = simulated.gradients(task, [part])
    named = {n: p for g in task.groups() for n, p in g.parameters.items()}
    assert not any("document" in n for n in named)
    for name in ("generator.embed.weight", next(n for n in named if "query" in n and "attention" in n and named[n].ndim == 2)):
        p, g = named[name], grads[name]
        direction, ends = g / g.norm(), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * 0.01 * direction
                ends.append(float(task.loss(part)[0]))
                p -= sign * 0.01 * direction
        assert (ends[0] - ends[1]) / 0.02 == pytest.approx(float(g.norm()), rel=0.05)


def test_parts_and_ranks_have_the_gradient_of_one_batch(sentences, decoder, people_data, tmp_path, monkeypatch):
    whole = make(recipe(sentences, decoder, micro=4), people_data, tmp_path)
    loss, expected = simulated.gradients(whole, whole.batch(1))
    parts = make(recipe(sentences, decoder), people_data, tmp_path)
    got = [simulated.gradients(parts, parts.batch(1))]
    losses, grads = simulated.on_ranks(2, monkeypatch, lambda: make(recipe(sentences, decoder), people_data, tmp_path), step=1)
    got.append((sum(losses) / 2, grads))
    for other, grads in got:
        assert other == pytest.approx(loss, abs=1e-4)
        for n, g in expected.items():
            torch.testing.assert_close(grads[n], g, atol=1e-4, rtol=1e-2)


def test_it_learns_and_the_passages_stay(sentences, decoder, people_data, tmp_path):
    r = recipe(sentences, decoder, steps=60, batch=8, micro=8, warmup=0.1)
    task = make(r, people_data, tmp_path)
    held = {n: p.clone() for n, p in task.encoder.model.named_parameters() if "document" in n}
    said = fit(task, r, tmp_path)
    rows = [x for x in simulated.lines(tmp_path) if "loss" in x]
    assert np.mean([x["loss"] for x in rows[-5:]]) < 0.6 * np.mean([x["loss"] for x in rows[:5]])
    assert all(torch.equal(p, held[n]) for n, p in task.encoder.model.named_parameters() if n in held) and held
    wanted = {"retrieval_utility", "hit", "gold", "overlap", "index_age", "gradient_query encoder", "gradient_generator"}
    assert wanted <= rows[0].keys()
    assert all(x["overlap"] == 1 and x["index_age"] == 0 for x in rows)
    last = said["evaluations"][-1]
    assert last["nats"] < last["before_nats"] and {"gold1", "gold3", "nats_alone", "before_gold1"} <= last.keys()


def test_the_retriever_learns_what_helps(sentences, decoder, people_data, tmp_path):
    """The generator held still: what is left to learn is which passage to weigh."""
    r = recipe(sentences, decoder, {"temperature": 0.5, "k": 8}, {"train": False}, steps=40, batch=8, micro=8, lr=1e-2)
    r["data"] |= {"held_out": []}
    task = make(r, people_data, tmp_path)
    some = task.train[:8]
    task.batch = lambda step: [some]
    before = {n: p.clone() for n, p in task.lm.model.named_parameters()}
    fit(task, r, tmp_path)
    rows = [x["loss"] for x in simulated.lines(tmp_path) if "loss" in x]
    assert rows[-1] < rows[0] - 0.1
    assert all(torch.equal(p, before[n]) for n, p in task.lm.model.named_parameters())


@pytest.mark.parametrize("refresh", [1, 3])
def test_killed_and_resumed_is_uninterrupted(sentences, decoder, people_data, tmp_path, refresh):
    r = recipe(sentences, decoder, {"refresh": refresh}, steps=7, save_steps=2, lr=3e-2)
    fit(make(r, people_data, tmp_path / "whole"), r, tmp_path / "whole")
    simulated.killed_and_resumed(r, people_data, tmp_path / "killed", (5,))
    rows = simulated.lines(tmp_path / "whole")
    assert rows == simulated.lines(tmp_path / "killed")
    assert [x["index_age"] for x in rows if "loss" in x] == [n % refresh for n in range(7)]
    stale = [x["overlap"] for x in rows if "loss" in x and x["index_age"]]
    assert all(x["overlap"] == 1 for x in rows if "loss" in x and not x["index_age"])
    assert not stale or min(stale) < 1  # what is proposed is not what the live encoder would propose


def test_a_foreign_or_stale_index_is_refused(sentences, decoder, people_data, tmp_path):
    from ralm.train.encoder import Encoder, Trainable

    documents = [Document(f"d{i}", f"person {i} sat here") for i in range(9)]
    other = Trainable(Encoder(str(sentences), random=True), torch.device("cpu"))
    other.save(tmp_path / "other", {}, "")
    store = Datastore.build(tmp_path / "kb", documents)
    Dense(store, encoder=str(tmp_path / "other"))
    r = recipe(sentences, decoder, data={"store": str(tmp_path / "kb")})
    with pytest.raises(FingerprintError):
        make(r, people_data, tmp_path / "run")
    # an index of the named encoder, which the recipe then changes
    Dense(Datastore.build(tmp_path / "own", documents), encoder=str(sentences))
    good = recipe(sentences, decoder, data={"store": str(tmp_path / "own")})
    told = make(good, people_data, tmp_path / "run").loss(make(good, people_data, tmp_path / "run").batch(0)[0])[1]
    assert "hit" not in told and told["overlap"] == 1  # whose passages are whose is not known there
    good["encoder"]["random"], good["train"]["seed"] = True, 5
    with pytest.raises(FingerprintError, match="passage encoder"):
        make(good, people_data, tmp_path / "run")


def test_a_retriever_without_gradient_is_an_error(sentences, decoder, people_data, tmp_path):
    """One passage has weight 1 whatever its score."""
    r = recipe(sentences, decoder, {"k": 1}, idle=3)
    with pytest.raises(RalmError, match="'query encoder' has got no gradient for 3 steps"):
        fit(make(r, people_data, tmp_path), r, tmp_path)


@pytest.mark.parametrize(("table", "change", "says"), [
    ("rag", {"marginal": "tokens"}, "sequence or token"), ("rag", {"k": 0}, "at least 1"), ("rag", {"k": 500}, "use fewer"),
    ("generator", {"model": "bundled:reader"}, "cannot be trained"), ("rag", {"tokens": 90}, "use fewer"),
    ("train", {"micro": 3}, "multiple"), ("rag", {"temperatur": 1.0}, "Did you mean 'temperature'")])
def test_recipes_that_cannot_be(sentences, decoder, people_data, tmp_path, table, change, says):
    r = recipe(sentences, decoder)
    r[table] |= change
    with pytest.raises((UsageError, RalmError), match=says):
        make(r, people_data, tmp_path).batch(0)


def test_a_generator_of_transformers(sentences, people_data, tmp_path, tiny):
    """The same law with a Llama, which is trained, written and read again."""
    tiny.make("llama").save_pretrained(tmp_path / "llama")
    tiny.tokenizer().save_pretrained(tmp_path / "llama")
    r = recipe(sentences, tmp_path, {"tokens": 20}, {"model": f"hf:{tmp_path / 'llama'}"}, {"held_out": []}, steps=3)
    r["generator"] |= {"prompt": "{question} ", "lr": 1e-3}
    task = make(r, people_data, tmp_path / "run")
    fit(task, r, tmp_path / "run")
    out = tmp_path / "run" / "model"
    found = Dense(task.store, encoder=str(out / "encoder"), name="after")
    ralm = RALM(load(f"hf:{out / 'generator'}"), found, how="ensemble:weights=posterior,k=3,tokens=20,temperature=0.1")
    example = task.train[0]
    scored = ralm.score(example.answer, prompt=task.lm.tokenizer.decode(example.prompt), query=example.query)
    assert float(task.loss([example])[0].detach()) == pytest.approx(scored.nats, abs=5e-3)
