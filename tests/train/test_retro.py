"""Training RETRO: rows and what they may read, a run that learns, is killed and goes on, what it leaves."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
zstandard = pytest.importorskip("zstandard")

from ralm.errors import UsageError  # noqa: E402
from ralm.lm import load, retro_files  # noqa: E402
from ralm.lm.gpt import GPT, Decoder, GPTConfig  # noqa: E402
from ralm.lm.gpt import save as save_gpt  # noqa: E402
from ralm.lm.retro import Neighbours, Retro, RetroConfig  # noqa: E402
from ralm.train import recipes  # noqa: E402
from ralm.train.loop import fit  # noqa: E402
from ralm.train.retro_data import KINDS, Rows  # noqa: E402
from ralm.train.tokenizer import train_bpe  # noqa: E402

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "lm" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

WORDS = "harbour signal keeper lantern storm letter captain island morning engine garden violin winter bridge museum".split()


def story(seed: int, n: int = 260) -> str:
    g = np.random.default_rng(seed)
    return " ".join(f"{WORDS[g.integers(len(WORDS))]} {g.integers(100)}" for _ in range(n // 2))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data: six stories, which a recipe also spaces as WikiText does; and a decoder whose tokenizer was trained on them."""
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(json.dumps({"file": f"{i}.txt", "text": f"Title: Tale {i}\n{story(i)}"}) + "\n" for i in range(6))
    (folder / "tales.zst").write_bytes(zstandard.compress(lines.encode()))
    bpe, shape = train_bpe([story(i) for i in range(6)], 400), GPTConfig(vocab=400, width=16, layers=2, heads=2, mlp=24, window=64)
    torch.manual_seed(0)
    save_gpt(folder / "gpt", Decoder(shape), bpe, shape)
    return folder


def recipe(store, root, **changes):
    """A decoder from random weights, small enough to be trained in a test."""
    r = {"kind": "retro",
         "model": {"tokenizer": f"gpt:{root / 'gpt'}",
                   "decoder": {"width": 16, "layers": 2, "heads": 2, "mlp": 24, "window": 64},
                   "retro": {"m": 16, "layers": [2], "width": 16, "depth": 1, "heads": 2, "mlp": 24, "cross_heads": 2,
                             "cross_size": 8, "gate": "none"}},
         "rates": {"new": 0.01, "new_rest": 0.01, "base": 0.01, "base_rest": 0.01},
         "data": {"store": str(store), "held": 3, "examples": 4, "kinds": {"document": 1.0, "row": 1.0, "copy": 1.0},
                  "source": [{"name": "plain", "file": "tales.zst", "share": 2},
                             {"name": "wiki", "file": "tales.zst", "spaced": True}]},
         "train": {"steps": 6, "batch": 4, "micro": 2, "device": "cpu", "warmup": 0.1, "save_steps": 2, "evaluate_steps": 3}}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        r[table] = r[table] | {name: value}
    return r


def run(root, folder, r, **options):
    task = recipes.make(r, root, folder)
    return task, fit(task, r, folder, **options)


def lines(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "state.safetensors")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *run(root, folder, recipe(folder / "store", root))


# ---- rows ---------------------------------------------------------------------------------------------------------------


def documents():
    return [(f"{s}/{i}", np.arange(1, 151) + 1000 * i + 10_000 * (s == "b")) for i in range(5) for s in "ab"]


def test_rows_are_dealt_by_share_and_no_row_twice_before_all_are():
    rows = Rows(documents(), {"a": 3.0, "b": 1.0}, 64, 16, 0, seed=1, held=0)
    assert rows.chunks == 3 and len(rows) == 2 * (5 * 151 // 64)
    for s in range(2):
        mine = rows.order[rows.order[:, 0] == s, 1].tolist()
        n = rows.train[s].rows(64)
        assert all(len(set(mine[a:a + n])) == len(mine[a:a + n]) for a in range(0, len(mine), n))
    assert 0.6 < (rows.order[:, 0] == 0).mean() < 0.9
    ids = rows.tokens(rows.order, rows.train)
    assert ids.shape == (len(rows), 65) and (ids[:, 0] == 0).all()
    for (s, r), row in zip(rows.order.tolist(), ids):
        held = [t for name, a, b in rows.train[s].spans(r, 64)
                for t in next(d for n, d in documents() if n == name)[a:b].tolist()]
        assert [t for t in row[1:].tolist() if t] == held
    again = Rows(documents(), {"a": 3.0, "b": 1.0}, 64, 16, 0, seed=1, held=0)
    assert (again.order == rows.order).all() and (again.kind == rows.kind).all()


def test_held_out_documents_are_in_no_row_that_is_trained_on():
    rows = Rows(documents(), {"a": 1.0, "b": 1.0}, 64, 16, 0, seed=1, held=2, limit=7)
    assert len(rows) == 7 and not set(rows.train[0].names) & set(rows.held[0].names)
    assert sorted(rows.train[0].names + rows.held[0].names) == [f"a/{i}" for i in range(5)]


def test_copies_are_the_row_around_its_chunks():
    rows, g = Rows(documents(), {"a": 1.0}, 64, 16, 0, seed=1, held=0), np.random.default_rng(0)
    row, moved = rows.tokens(rows.order[:1], rows.train)[0], set()
    for _ in range(60):
        tokens, mask = rows.copy(row, g)
        for u in range(rows.chunks):
            there = tokens[u][mask[u]].tolist()
            starts = [a for a in range(1, 66 - len(there)) if row[a:a + len(there)].tolist() == there]
            assert starts and mask[u].any()
            if mask[u][0]:
                moved.add(starts[0] - u * 16)
    assert min(moved) == -8 and max(moved) == 8


def test_neighbours_are_of_other_documents_or_do_not_touch_the_row(whole):
    _, task, _ = whole
    rows, store, m = task.rows, task.neighbours, task.rows.m
    assert {k: int((rows.kind == i).sum()) > 0 for i, k in enumerate(KINDS)} == dict.fromkeys(KINDS, True)
    own = 0
    for i, (s, r) in enumerate(rows.order.tolist()):
        spans = {name: (a, b) for name, a, b in rows.train[s].spans(r, rows.window)}
        found = rows.found[i].reshape(-1)
        assert (found >= 0).any()
        found = found[found >= 0]
        _, at = store.places(found)
        for name, t in zip(store.documents(found), at.tolist()):
            _, _, title = name.partition("/")
            if name in spans:
                assert rows.kind[i] != KINDS.index("document") and (t + 2 * m <= spans[name][0] or t >= spans[name][1])
                own += 1
            else:
                assert title not in {n.partition("/")[2] for n in spans}, "the same text in another typography"
    assert own > 0


def test_neighbours_that_say_the_same_are_left_out(root, whole, tmp_path):
    """Three words in a row, whatever stands between them; the next best moves up."""
    folder, *_ = whole
    r = recipe(folder / "store", root, data__leak=3, data__kinds={"document": 1.0, "row": 1.0})
    task = recipes.make(r, root, tmp_path)
    plain = recipes.make(r | {"data": r["data"] | {"leak": 0}}, root, tmp_path)
    assert (task.rows.order == plain.rows.order).all()

    def words(tokens):
        return [t for t in tokens.tolist() if any(c.isalnum() for c in task.bare.tokenizer.decode([t]))]

    left_out = 0
    ids = task.rows.tokens(task.rows.order, task.rows.train)
    for i, row in enumerate(ids):
        text = words(row)
        own = {tuple(text[a:a + 3]) for a in range(len(text) - 2)}
        for u in range(task.rows.chunks):
            kept = []
            for n in plain.rows.found[i, u].tolist():
                tokens, mask = task.neighbours.gather(np.array([n]))
                said = words(tokens[mask])
                if n >= 0 and not own & {tuple(said[a:a + 3]) for a in range(len(said) - 2)}:
                    kept.append(n)
            left_out += 2 - len(kept)
            assert task.rows.found[i, u].tolist() == (kept + [-1, -1])[:2]
    assert left_out > 0


# ---- runs ---------------------------------------------------------------------------------------------------------------


def test_a_killed_run_ends_as_an_uninterrupted_one(root, whole, tmp_path):
    folder, _, said = whole
    r = recipe(folder / "store", root)
    run(root, tmp_path / "a", r, until=1)
    run(root, tmp_path / "a", r, until=4)
    _, again = run(root, tmp_path / "a", r)
    a, b = weights(folder), weights(tmp_path / "a")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert lines(folder) == lines(tmp_path / "a") and said["evaluations"][-1]["off"] == again["evaluations"][-1]["off"]
    assert ">>>" in next(x for x in lines(folder) if "evaluation" in x)["evaluation"]["sample"]


def test_threads_change_nothing(root, whole, tmp_path):
    folder, *_ = whole
    run(root, tmp_path / "a", recipe(folder / "store", root, train__threads=2))
    a, b = weights(folder), weights(tmp_path / "a")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_it_leaves_is_loaded_and_says_how_it_was_made(whole):
    folder, task, _ = whole
    again = load(f"retro:{folder / 'model'}")
    ids, n = task.batch(0)[1]
    with torch.no_grad():
        ours, theirs = (x.forward(ids[:, :63], neighbours=n).logits for x in (task.lm, again))
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
    card = (folder / "model" / "README.md").read_text()
    assert "6 steps" in card and "snapshot" not in card and "| 6 |" in card
    assert retro_files.described(folder / "model")["trained"]["counts"]["tokens"] == 6 * 4 * 63


def test_it_overfits_what_only_its_neighbours_tell(root, whole, tmp_path):
    """Copies alone, one row: with them the text is known, without them it is not."""
    folder, *_ = whole
    r = recipe(folder / "store", root, data__kinds={"copy": 1.0}, data__drop=0.0, train__steps=60, train__batch=2,
               train__evaluate_steps=0, data__rows=4, train__warmup=0.05)
    _, said = run(root, tmp_path / "a", r)
    figures = said["evaluations"][-1]
    losses = [x["loss"] for x in lines(tmp_path / "a") if "loss" in x]
    assert losses[-1] < 0.7 * losses[0] and figures["gain_copy"] > 0.05, (losses[0], losses[-1], figures)


def test_the_decoder_alone_sees_the_same_rows(root, whole, tmp_path):
    folder, task, _ = whole
    r = recipe(folder / "store", root, data__neighbours=False)
    alone, _ = run(root, tmp_path / "a", r)
    assert all(torch.equal(a, b) and n is None for (a, _), (b, n) in zip(task.batch(5), alone.batch(5)))
    from ralm.lm.gpt import load as load_gpt

    assert not isinstance(alone.lm, Retro) and load_gpt(tmp_path / "a" / "model").window == 64


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder") / "llama"
    tiny.make("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return f"hf:{folder}"


def fit_recipe(store, root, spec, **changes):
    r = recipe(store, root, **changes)
    shape = r["model"]["retro"] | {"gate": "zero", "layers": [1, 2], "scaled": True, "beside": True}
    r["model"] = {"base": spec, "retro": shape, "checkpointing": r["model"].get("checkpointing", False)}
    return r


@pytest.mark.parametrize("trainable", ["new", "all"])
def test_fitting_a_model_of_transformers(root, fitted, tmp_path, trainable):
    """Step 0 is the decoder; new weights alone leave it what it was; files find it again by its spec."""
    r = fit_recipe(tmp_path / "store", root, fitted, rates__trainable=trainable, rates__after=2, train__steps=3,
                   train__evaluate_steps=0,
                   rates__matrices="muon")
    task = recipes.make(r, root, tmp_path / "a")
    before = {n: p.clone() for n, p in task.bare.model.named_parameters()}
    ids, n = next(p for p in task.batch(0) if p[1] is not None)
    with torch.no_grad():
        assert torch.equal(task.lm.forward(ids[:, :63], neighbours=n).logits, task.bare.forward(ids[:, :63]).logits)
    fit(task, r, tmp_path / "a", until=2)
    assert all(torch.equal(p, before[n]) for n, p in task.bare.model.named_parameters())  # not before `after`
    fit(task, r, tmp_path / "a")
    moved = [n for n, p in task.bare.model.named_parameters() if not torch.equal(p, before[n])]
    assert bool(moved) == (trainable == "all")
    assert load(f"retro:{tmp_path / 'a' / 'model'}").base.name == fitted
    assert (tmp_path / "a" / "model" / "base.safetensors").exists() == (trainable == "all")


def test_a_retro_is_trained_on(root, fitted, tmp_path):
    """Its files say which decoder it began with; step 0 is what it was."""
    r = fit_recipe(tmp_path / "store", root, fitted, train__steps=2, train__evaluate_steps=0)
    run(root, tmp_path / "a", r)
    r["model"] = {"base": f"retro:{tmp_path / 'a' / 'model'}"}
    task = recipes.make(r, root, tmp_path / "b")
    ids, n = next(p for p in task.batch(0) if p[1] is not None)
    with torch.no_grad():
        before = load(f"retro:{tmp_path / 'a' / 'model'}").forward(ids[:, :63], neighbours=n).logits
        assert torch.equal(task.lm.forward(ids[:, :63], neighbours=n).logits, before)
    fit(task, r, tmp_path / "b")
    a, b = (retro_files.described(tmp_path / x / "model")["base"] for x in "ab")
    assert a == b and a["spec"] == fitted
    with torch.no_grad():
        assert not torch.equal(load(f"retro:{tmp_path / 'b' / 'model'}").forward(ids[:, :63], neighbours=n).logits, before)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_checkpointing_changes_no_gradient(root, whole, fitted, tmp_path, kind):
    def grads(on):
        if kind == "gpt":
            r = recipe(whole[0] / "store", root, model__checkpointing=on, data__drop=0.0)
        else:
            r = fit_recipe(tmp_path / "store", root, fitted, model__checkpointing=on, data__drop=0.0)
        task = recipes.make(r, root, tmp_path / "a")
        task.groups()
        for cross in task.lm.adapter.cross.values():
            torch.nn.init.normal_(cross.attention.o.weight, generator=torch.Generator().manual_seed(0))
        loss, _ = task.loss(task.batch(0)[0])
        return torch.autograd.grad(loss, list(task.lm.model.parameters()), allow_unused=True)

    for a, b in zip(grads(False), grads(True)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_mistakes_are_told(root, whole, tmp_path):
    store = whole[0] / "store"
    for changes, says in (({"data__speed": 1}, "unknown setting in \\[data\\] 'speed'"),
                          ({"model__base": "bundled:base"}, "one of base"),
                          ({"data__window": 128}, "window = 128"),
                          ({"data__source": [{"name": "other"}]}, "no document of source 'other'"),
                          ({"rates__trainable": "some"}, "unknown \\[rates\\]")):
        with pytest.raises(UsageError, match=says):
            recipes.make(recipe(store, root, **changes), root, tmp_path).groups()


# ---- a start from which it learns -----------------------------------------------------------------------------------------


def test_new_weights_begin_by_looking_for_the_token_just_read():
    """The bundled decoder: queries are like the keys of the same token in a neighbour, and unlike those of others."""
    torch.manual_seed(0)
    lm = Retro(load("bundled:base"), RetroConfig(m=32, layers=(3,), width=256, gate="zero", beside=True, scaled=True))
    text = "The keeper of the lighthouse wrote down the weather, the ships that passed, and the names of those who came ashore. "
    ids = torch.tensor([lm.tokenizer.encode(text + story(1) + " " + story(2))])[:, :256]
    cross, encoder, seen = lm.adapter.cross["3"], lm.adapter.encoder, []

    def alike():
        """Means of the logits of attention, distances left out: to the same tokens, to any."""
        hook = lm.base.model.blocks[2].norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            lm.base.forward(ids)
            hook.remove()
            e = encoder.out(encoder.beside(lm._embed(ids[:, None])))[0, 0]
            logits = cross.queries(seen.pop())[0] @ cross.attention.k(e).T / 4 / 8
        same = ids[0][:, None] == ids[0]
        return float(logits[same].mean()), float(logits[~same].mean()), float(logits[~same].std())

    same, other, spread = alike()
    assert same < other + spread
    with torch.no_grad():
        base = lm.base.forward(ids).logits
        lm.begin(ids)
        assert torch.equal(lm.forward(ids, neighbours=Neighbours(ids.view(1, 8, 1, 32))).logits, base)  # still the decoder
    same, other, spread = alike()
    assert same > other + 2 * spread, (same, other, spread)
    assert float(cross.scale.detach()) > 1 and 0.5 < float(lm._embed(ids[:, None]).detach().std()) < 2


def test_neighbours_beside_do_not_reach_over_what_is_not_there():
    lm = Retro(GPT(Decoder(GPTConfig(vocab=60, width=16, layers=2, heads=2, mlp=24, window=64)), [0] * 60, "gpt:tiny"),
               RetroConfig(m=4, layers=(2,), width=12, depth=1, heads=2, mlp=16, cross_heads=3, cross_size=6, gate="none",
                           beside=True))
    ids, tokens = torch.randint(0, 60, (1, 9)), torch.randint(0, 60, (1, 2, 2, 6))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[..., 4:] = False
    with torch.no_grad():
        short = lm.forward(ids, neighbours=Neighbours(tokens[..., :4])).logits
        torch.testing.assert_close(lm.forward(ids, neighbours=Neighbours(tokens, mask)).logits, short, atol=2e-5, rtol=1e-4)
        one = lm.forward(ids[:, :-1], neighbours=Neighbours(tokens, mask))
        last = lm.forward(ids[:, -1:], past=one.past).logits
    torch.testing.assert_close(last[:, 0], short[:, -1], atol=2e-5, rtol=1e-4)
