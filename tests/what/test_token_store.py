"""The token store: rows are a document's tokens with the states that predict them, whatever was added, removed, merged, killed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ralm.errors import CapabilityError, FingerprintError, StoreError, UsageError  # noqa: E402
from ralm.index import manifest, nearest  # noqa: E402
from ralm.testing import documents  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what import token_build  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.token_store import TokenStore  # noqa: E402

TEXTS = ["The lighthouse of Brennick was built in 1873. " * 3, "A granite reef is hard to build on.", "",
         "Snow melts in spring; the river carries stones to the sea. " * 2, "The cell was named by Robert Hooke, naïve 😀."]


@pytest.fixture
def kb(tmp_path):
    return Datastore.build(tmp_path / "kb", documents(TEXTS))


def keys(tokens):
    """float32 [N, D]: every stored key."""
    return np.concatenate([leaf.rows.keys.take(np.arange(len(leaf.rows))) for leaf in tokens.leaves])


@pytest.mark.parametrize("key", ["ffn_in", "hidden"])
def test_rows_are_tokens_with_the_states_that_predict_them(kb, lm, key):
    """Against the model run row by row: key t is the state after [BOS, tokens before t] of its window, its value token t."""
    tokens = TokenStore.build(kb, lm, key=key, window=20, stride=8)
    want_keys, want_values = [], []
    for d in kb.documents():
        ids = lm.tokenizer.encode(d.text)
        for t in range(len(ids)):
            context = 0 if t < 20 else 20 + (t - 20) // 8 * 8 + 8 - 20
            with torch.inference_mode():
                want_keys.append(lm.keys(torch.tensor([[lm.bos, *ids[context:t]]]), key)[0, -1].numpy())
            want_values.append(ids[t])
    assert len(tokens) == len(want_values) > 150
    rows = tokens.leaves[0].rows
    assert rows.values(np.arange(len(tokens))).tolist() == want_values
    assert np.allclose(keys(tokens), np.stack(want_keys), atol=2e-3, rtol=2e-3)  # float16
    places = tokens.places(np.arange(len(tokens)))
    assert [p.document for p in places] == [d.id for d in kb.documents() for _ in lm.tokenizer.encode(d.text)]
    assert [p.position for p in places][:3] == [0, 1, 2]


def test_search_is_brute_force_and_keeps_out_what_it_must(kb, lm):
    tokens = TokenStore.build(kb, lm)
    x, q = keys(tokens), np.random.default_rng(0).normal(size=(5, tokens.settings["width"])).astype(np.float32)
    d = ((q[:, None].astype(np.float64) - x[None]) ** 2).sum(-1)
    found = tokens.search(q, 9)
    assert np.array_equal(found.rows, np.argsort(d, 1, kind="stable")[:, :9])
    assert np.allclose(found.distances, np.sort(d, 1)[:, :9], rtol=1e-5)
    assert np.array_equal(found.values, tokens.leaves[0].rows.values(found.rows))
    first, stop = tokens.span("d0")
    assert (first, stop) == (0, len(lm.tokenizer.encode(TEXTS[0]))) and tokens.span("nobody") == (0, 0)
    spared = tokens.search(q, 9, spans=np.array([[first, stop]] * 2 + [[0, 0]] * 3))
    assert (spared.rows[:2] >= stop).all() and np.array_equal(spared.rows[2:], found.rows[2:])
    assert (tokens.search(q, 9, exclude=["d0"]).rows >= stop).all()
    everything = tokens.search(q, len(tokens) + 3)
    assert (everything.rows[:, -3:] == -1).all() and np.isinf(everything.distances[:, -3:]).all()
    with pytest.raises(UsageError, match="numbers"):
        tokens.search(q[:, :-1], 3)


def test_a_filter_and_a_version_act_inside_the_search(tmp_path, lm):
    kb = Datastore.build(tmp_path / "kb", [Document(f"d{i}", t, metadata={"year": 1990 + i}) for i, t in enumerate(TEXTS)])
    version = kb.version
    tokens = TokenStore.build(kb, lm)
    q = keys(tokens)[:4]
    kb.remove(["d0"])
    assert (tokens.search(q, 50).rows[:, 0] >= tokens.leaves[0].rows.first[1]).all()
    assert {p.document for p in tokens.places(tokens.search(q, 500, where="year = 1993").rows[0, :20])} == {"d3"}
    old = TokenStore(Datastore.open(tmp_path / "kb", version=version), lm)
    assert old.search(q, 1).rows[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("how", [dict(), dict(project="pca:12"), dict(dtype="int8"), dict(project="pca:12", dtype="int8"),
                                 dict(metric="ip")])
def test_append_in_halves_equals_one_build_bit_for_bit(tmp_path, lm, how):
    """Also when documents that are gone by now stood between the others: what removal promises."""
    whole = Datastore.build(tmp_path / "whole", documents(TEXTS))
    ours = TokenStore.build(whole, lm, **how)
    halves = Datastore.build(tmp_path / "halves", documents(TEXTS[:2]))
    if how.get("project") or how.get("dtype"):  # fitted on what is there at first: give both the same
        halves.add(documents(TEXTS)[2:])
        theirs = TokenStore.build(halves, lm, **how)
    else:
        theirs = TokenStore.build(halves, lm, **how)
        halves.add([Document("gone", "Granite, snow, cells: never to be read again. " * 9)])
        _ = theirs.leaves
        halves.add(documents(TEXTS)[2:])
        halves.remove(["gone"])
    q = np.random.default_rng(1).normal(size=(4, ours.settings["width"])).astype(np.float32)
    a, b = ours.search(q, 40), theirs.search(q, 40)
    assert np.array_equal(a.distances, b.distances) and np.array_equal(a.values, b.values)
    assert [p.document for p in ours.places(a.rows[0])] == [p.document for p in theirs.places(b.rows[0])]


def test_quantised_keys_find_nearly_the_same(kb, lm):
    exact, rough = TokenStore.build(kb, lm), TokenStore.build(kb, lm, "rough", project="pca:24", dtype="int8")
    q = keys(exact)[::7]
    a, b = exact.search(q, 10), rough.search(q, 10)
    assert np.mean([len(set(x) & set(y)) / 10 for x, y in zip(a.rows.tolist(), b.rows.tolist())]) > 0.8
    assert rough.leaves[0].rows.keys.maps[0].dtype == np.int8 and rough.leaves[0].rows.keys.dim == 24


def test_inverted_lists_find_what_is_near_and_never_what_is_gone(tmp_path, lm, monkeypatch):
    pytest.importorskip("faiss")
    from ralm.index import inverted

    words = [w for t in TEXTS for w in t.split()]
    rng = np.random.default_rng(0)
    kb = Datastore.build(tmp_path / "kb", documents([" ".join(rng.choice(words, 80)) for _ in range(30)]))
    for kind in ("ivf", "ivfpq"):
        monkeypatch.setattr(inverted, "LEAST", 100)
        tokens = TokenStore.build(kb, lm, kind, index=kind)
        assert tokens.leaves[0].near is not None and kind in repr(tokens) and tokens.recall > 0.5
        exact, q = TokenStore(kb, lm, kind, index="exact"), keys(tokens)[::50]
        a, b = exact.search(q, 20), tokens.search(q, 20)
        same = a.rows == b.rows
        assert np.array_equal(a.distances[same], b.distances[same]) and same.mean() > 0.5  # whatever is found has its true distance
    kb.remove([f"d{i}" for i in range(0, 30, 2)])
    for kind in ("ivf", "ivfpq"):
        tokens = TokenStore(kb, lm, kind)
        found = tokens.search(q, 20)
        assert {int(p.document[1:]) % 2 for p in tokens.places(found.rows[found.rows >= 0])} == {1}


def test_what_it_was_made_from_is_compared(kb, lm, tiny):
    from ralm.lm.hf import HF

    with pytest.raises(StoreError, match="ralm tokens"):
        TokenStore(kb, lm)
    TokenStore.build(kb, lm)
    other = HF(tiny.make("llama", seed=5), tiny.tokenizer(), window=64)
    with pytest.raises(FingerprintError, match="fingerprint"):
        TokenStore(kb, other)
    with pytest.raises(FingerprintError, match="key = 'ffn_in', 'hidden' is asked for"):
        TokenStore.build(kb, lm, key="hidden")
    with pytest.raises(FingerprintError, match="stride"):
        TokenStore.build(kb, lm, stride=3)
    assert len(TokenStore(kb)) == len(TokenStore(kb, lm))
    kb.add([Document("new", "Something new.")])
    with pytest.raises(StoreError, match="no model is given"):
        TokenStore(kb)
    with pytest.raises(StoreError, match="no model is given"):
        TokenStore(Datastore.open(kb.path))
    before = len(TokenStore(kb, lm))
    assert before == sum(len(lm.tokenizer.encode(d.text)) for d in kb.documents())


@pytest.mark.parametrize("wrong", [
    dict(key="last"), dict(window=65), dict(window=10, stride=11), dict(project="pca"), dict(project="pca:0"),
    dict(project="svd:3"), dict(dtype="float8"), dict(metric="cos"), dict(index="flat"), dict(stride=0)])
def test_wrong_settings_are_one_line_and_nothing_is_made(kb, lm, wrong):
    with pytest.raises(UsageError):
        TokenStore.build(kb, lm, **wrong)
    assert not list(Path(kb.path).glob("tokens/*/manifest.json"))


def test_a_model_without_states_is_refused(kb):
    class Server:
        name, gives = "remote:x", frozenset({"text"})

    with pytest.raises(CapabilityError, match="hidden states"):
        TokenStore.build(kb, Server())


def test_damage_is_told(kb, lm):
    tokens = TokenStore.build(kb, lm)
    folder = tokens.leaves[0].rows.folder
    file = next(folder.glob("*/keys.bin"))
    data = file.read_bytes()
    file.write_bytes(data[:-2])
    with pytest.raises(StoreError, match=r"keys\.bin"):
        TokenStore(Datastore.open(kb.path), lm)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert any("keys.bin" in line for line in manifest.verify(folder, manifest.load(folder)))


def test_purging_drops_the_rows_of_what_is_gone(kb, lm):
    tokens = TokenStore.build(kb, lm)
    x, size = keys(tokens), len(lm.tokenizer.encode(TEXTS[0]))
    kb.remove(["d0"])
    kb.compact(purge=True)
    token_build.compact(kb, "")
    again = TokenStore(Datastore.open(kb.path), lm)
    assert len(again) == len(x) - size and np.array_equal(keys(again), x[size:])
    assert [p.document for p in again.places([0])] == ["d1"]


def test_a_union_searches_each_part_with_its_own(tmp_path, lm):
    left, right = documents(TEXTS[:2]), documents(TEXTS[2:], prefix="e")
    a, b = Datastore.build(tmp_path / "a", left), Datastore.build(tmp_path / "b", right)
    one = TokenStore.build(Datastore.build(tmp_path / "one", left + right), lm)
    both = TokenStore.build(Datastore.union(a, b), lm)
    q = keys(one)[::11]
    x, y = one.search(q, 15), both.search(q, 15)
    assert np.array_equal(x.rows, y.rows) and np.array_equal(x.distances, y.distances) and np.array_equal(x.values, y.values)
    assert [p.document for p in one.places(x.rows[0])] == [p.document for p in both.places(y.rows[0])]
    assert (both.search(q, 5, exclude=["d0", "d1"]).rows >= len(both.leaves[0].rows)).all()


def test_a_large_vocabulary_is_not_wrapped():
    """urvashik/knnlm keeps token ids in 16 bits and loses those above: ours are as wide as they must be."""
    assert token_build.value_type(1 << 16) is np.uint16 and token_build.value_type((1 << 16) + 1) is np.int32


def test_the_estimate_is_near(kb, lm):
    told = token_build.estimate(kb, lm, "", token_build.Wish())
    tokens = TokenStore.build(kb, lm)
    on_disk = sum(f.stat().st_size for f in tokens.leaves[0].rows.folder.rglob("*.bin"))
    assert abs(told["rows"] - len(tokens)) <= 0.02 * len(tokens) and abs(told["bytes"] - on_disk) <= 0.05 * on_disk


def killed(tmp_path, steps):
    """Build with kills until it ends; what was committed before each kill is there after it."""
    child = Path(__file__).parent / "token_kill_child.py"
    kb = Datastore.build(tmp_path / "killed", documents([f"{t} number {i}" for i in range(4) for t in TEXTS]))
    committed, kills = 0, 0
    for step in steps:
        code = subprocess.run([sys.executable, str(child), str(kb.path), str(step)], check=False).returncode
        now = manifest.load(token_build.folder_of(kb, ""))
        stop = now.stop if now else 0
        assert stop >= committed, "a committed part was lost"
        committed = stop
        if code == 0:
            break
        assert code == -9
        kills += 1
    return kb, kills


def test_a_killed_build_goes_on_and_equals_an_uninterrupted_one(tmp_path):
    from ralm.lm import load

    kb, kills = killed(tmp_path, [3, 12])
    assert kills == 2
    base = load("bundled:base")
    ours = TokenStore.build(kb, base, index="exact")
    theirs = TokenStore.build(Datastore.build(tmp_path / "whole", kb.documents()), base, index="exact")
    assert np.array_equal(keys(ours), keys(theirs)) and len(ours) == len(theirs)
    rows = ours.leaves[0].rows
    assert {p.name for p in rows.folder.iterdir()} == {p.name for p in rows.now.parts} | {"manifest.json"}


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    from ralm.lm import load

    kb, kills = killed(tmp_path, [int(s) for s in np.random.default_rng(0).integers(1, 14, 60)])
    assert kills >= 20
    base = load("bundled:base")
    ours = TokenStore.build(kb, base, index="exact")
    theirs = TokenStore.build(Datastore.build(tmp_path / "whole", kb.documents()), base, index="exact")
    assert np.array_equal(keys(ours), keys(theirs))


def test_distances_are_those_of_nearest(kb, lm):
    tokens = TokenStore.build(kb, lm)
    q = np.random.default_rng(3).normal(size=(2, tokens.settings["width"])).astype(np.float32)
    rows, d = nearest.exact(tokens.leaves[0].rows.keys, q, 4)
    assert np.array_equal(tokens.search(q, 4).rows, rows) and np.array_equal(tokens.search(q, 4).distances, d)
