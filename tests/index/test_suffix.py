"""∞-gram search against counting by hand over lists of tokens, and its promises: laws 7 and 8, filters, unions, kills, damage."""

import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.index import manifest, suffix, suffix_kernels, suffix_parts
from ralm.index.suffix import SuffixIndex, compact
from ralm.index.suffix_parts import pack, tokenizer_fingerprint, unpack, vocabulary
from ralm.types import Document
from ralm.what.datastore import Datastore

CHILD = Path(__file__).with_name("suffix_child.py")
RNG = np.random.default_rng(11)
TEXTS = [" ".join(f"w{w}" for w in RNG.zipf(1.5, RNG.integers(0, 40)) % 12) for _ in range(60)]


def words(size: int = 12, extra: int = 0):
    """A tokenizer whose tokens are the words w0 .. w(size - 1); `extra` ids that no text has make its vocabulary larger."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from ralm.lm.gpt import BPE

    vocabulary = {f"w{i}": i for i in range(size)} | {f"x{i}": size + i for i in range(extra)}
    inner = Tokenizer(models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return BPE(inner)


WORDS = words()


def make(path, texts, first=0, **options):
    documents = [Document(f"d{i}", t, metadata={"number": i, "even": i % 2 == 0}) for i, t in enumerate(texts, first)]
    return Datastore.build(path, documents, split="none", **options)


def brute(documents, ids, least=1, most=None):
    """Per position t (one more than tokens): length, {successor: count} of the longest suffix of ids[:t] seen in the documents."""
    out = []
    for t in range(len(ids) + 1):
        for n in range(t if most is None else min(t, most), -1, -1):
            context = ids[t - n:t]
            found = Counter(d[i + n] for d in documents for i in range(len(d) - n) if d[i:i + n] == context)
            if found.total() >= least:
                break
        else:
            n, found = -1, Counter()
        out.append((n, found))
    return out


def agree(found, truth, ids):
    pointers, tokens, counts = found.rows()
    for t, (n, followers) in enumerate(truth):
        assert (found.length[t], found.count[t]) == (n, followers.total()), t
        assert found.target[t] == (followers[ids[t]] if t < len(ids) else 0)
        assert found.sparse[t] == (len(followers) == 1)
        assert dict(zip(*(a.tolist() for a in found.followers(t)))) == followers
        assert tokens[pointers[t]:pointers[t + 1]].tolist() == sorted(followers)
        assert counts[pointers[t]:pointers[t + 1]].tolist() == [followers[x] for x in sorted(followers)]
    assert len(found) == len(truth)


def lists(store, **kw):
    where, exclude = kw.get("where"), kw.get("exclude", ())
    return [WORDS.encode(d.text) for d in store.documents(where) if d.id not in exclude]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """60 documents of 12 words, some empty, in several parts; three removed."""
    store = make(tmp_path_factory.mktemp("suffix") / "kb", TEXTS[:40])
    SuffixIndex(store, WORDS)
    store.add([Document(f"d{i}", t, metadata={"number": i, "even": i % 2 == 0}) for i, t in enumerate(TEXTS[40:], 40)])
    store.remove(["d3", "d17", "d50"])
    return store


@pytest.fixture
def copy(corpus, tmp_path):
    shutil.copytree(corpus.path, tmp_path / "kb")
    return Datastore.open(tmp_path / "kb")


# ---- exact ----------------------------------------------------------------------------------------------------------


@given(documents=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=9),
       ids=st.lists(st.integers(0, 4), max_size=14), gone=st.sets(st.integers(0, 8)), least=st.integers(1, 3),
       most=st.sampled_from([0, 1, 3, 99]), parts=st.integers(1, 3), extra=st.sampled_from([0, 300, 70_000]))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_matches_are_those_of_counting_by_hand(tmp_path_factory, documents, ids, gone, least, most, parts, extra):
    """Any documents, in one part or more, with any of them filtered out, at one to three bytes a token."""
    folder, width = tmp_path_factory.mktemp("k"), {0: 1, 300: 2, 70_000: 3}[extra]
    allowed = np.array([rev not in gone for rev in range(len(documents))])
    held = [(rev, pack(np.array([*d, 4 + extra]), width)) for rev, d in enumerate(documents) if d]
    masked = []
    for some in filter(None, (held[a:b] for a, b in pairwise(np.linspace(0, len(held), parts + 1).astype(int)))):
        path, data = manifest.new_part(folder), [d for _, d in some]
        text = suffix_parts._write(path, data, np.array([rev for rev, _ in some]), np.array([len(d) for d in data]), 0)
        suffix_parts._write_suffixes(path, text.reshape(-1), width, 4 + extra, len(some))
        part = manifest.seal(path, 0, len(documents), len(text))
        piece = suffix.Piece(folder, part, {"vocab": 4 + extra, "width": width})
        mask = piece.mask(allowed)
        if mask is not None:
            masked.append(suffix.Masked(piece, *mask, None))
    left = [d for rev, d in enumerate(documents) if allowed[rev]]
    found = suffix.search(masked, suffix.clean(ids, 4 + extra), 0, len(ids) + 1, least, most)
    agree(found, brute(left, ids, least, most), ids)


@pytest.mark.parametrize("where, exclude", [(None, ()), ("number < 20", ()), ("even = true", ("d2", "d44")), ("number > 1000", ())])
def test_a_store_is_counted_as_it_is_read(corpus, where, exclude):
    index, ids = SuffixIndex(corpus, WORDS), WORDS.encode(TEXTS[5])[:12] + WORDS.encode(TEXTS[41])[3:20]
    documents = lists(corpus, where=where, exclude=exclude)
    agree(index.match(ids, stop=len(ids) + 1, where=where, exclude=exclude), brute(documents, ids), ids)
    for n in (0, 1, 2, 5):
        pattern = ids[4:4 + n]
        by_hand = sum(d[i:i + n] == pattern for d in documents for i in range(len(d) - n + (n > 0)))
        assert index.count(pattern, where=where, exclude=exclude) == by_hand
    for start, stop in ((0, 0), (3, 9), (len(ids), len(ids) + 1)):
        part = index.match(ids, start, stop, where=where, exclude=exclude)
        whole = index.match(ids, stop=len(ids) + 1, where=where, exclude=exclude)
        assert part.length.tolist() == whole.length[start:stop].tolist() and part.count.tolist() == whole.count[start:stop].tolist()


def test_shorter_suffixes_are_counted_where_the_longest_is_longer(corpus):
    index, ids = SuffixIndex(corpus, WORDS), WORDS.encode(TEXTS[5])[:12] + WORDS.encode(TEXTS[41])[3:20]
    found = index.match(ids, stop=len(ids) + 1, levels=3, where="number < 30")
    assert len(found.shorter) == 3 and index.match(ids).shorter == ()
    for n, shorter in enumerate(found.shorter, 1):
        capped = index.match(ids, stop=len(ids) + 1, most=n, where="number < 30")
        longer = found.length > n
        assert longer.any() and not longer.all()
        for t in range(len(ids) + 1):
            mine, true = ([*(a[t] for a in (x.length, x.count, x.target, x.sparse)), *map(list, x.followers(t))]
                          for x in (shorter, capped))
            assert mine == (true if longer[t] else [-1, 0, 0, False, [], []])


def test_places_are_where_the_context_stands(corpus):
    index, ids = SuffixIndex(corpus, WORDS), WORDS.encode(TEXTS[1])[:6]
    found = index.match(ids, stop=len(ids) + 1)
    for t in range(len(ids) + 1):
        places = found.occurrences(t, limit=100)
        assert len(places) == min(100, found.count[t]) == len({(p.document, p.start) for p in places})
        for p in places:
            tokens = WORDS.encode(corpus.document(p.document).text)
            assert tokens[p.start:p.start + p.length] == ids[t - p.length:t] and tokens[p.start + p.length] == p.token
            assert p.store == corpus.path and corpus.state([p.rev])[p.rev].id == p.document
    token = ids[2]
    some = found.occurrences(2, limit=3, token=token)
    assert len(some) == min(3, found.target[2]) and {p.token for p in some} == {token}
    assert found.occurrences(2, token=WORDS.encode("w11")[0] + 1) == [] and found.occurrences(0, limit=0) == []


def test_a_long_copy_is_followed_to_its_end(tmp_path):
    """Every position of a stored document of 3,000 tokens is matched with its whole past; so is what follows an error in it."""
    rng = np.random.default_rng(3)
    text = rng.integers(0, 12, 3000)
    store = make(tmp_path / "kb", [" ".join(f"w{w}" for w in text), "w1 w2"])
    found = SuffixIndex(store, WORDS).match(text.tolist())
    assert (found.length[12:] == np.arange(3000)[12:]).all() and (found.sparse[12:]).all() and (found.target[12:] == 1).all()
    other = text.tolist()
    other[1500] = (other[1500] + 1) % 12
    found = SuffixIndex(store, WORDS).match(other)
    assert found.length[1500] == 1500 and found.target[1500] == 0 and found.length[1501] < 8
    assert (found.length[1520:] == np.arange(3000)[1520:] - 1501).all()
    assert SuffixIndex(store, WORDS).match(text.tolist(), most=7).length.tolist() == [min(t, 7) for t in range(3000)]


def test_an_empty_store_and_an_emptied_one(tmp_path):
    store = Datastore.create(tmp_path / "kb", split="none")
    index = SuffixIndex(store, WORDS)
    for _ in range(2):
        found = index.match([1, 2], stop=3)
        assert found.length.tolist() == [-1] * 3 and found.count.tolist() == [0] * 3 and not found.sparse.any()
        assert found.followers(0)[0].tolist() == [] and found.occurrences(1) == [] and found.rows()[0].tolist() == [0] * 4
        assert index.count([1]) == index.count([]) == 0
        store.add([Document("a", "w1 w2"), Document("b", "")])
        assert index.match([1], stop=2).length.tolist() == [0, 1] and index.count([1, 2]) == 1
        store.remove(["a", "b"])


def test_wrong_requests_are_refused(corpus):
    index = SuffixIndex(corpus, WORDS)
    for start, stop in ((0, 5), (-1, 2), (2, 1)):
        with pytest.raises(UsageError, match="positions"):
            index.match([1, 2, 3], start, stop)
    with pytest.raises(UsageError, match="least=0"):
        index.match([1], least=0)
    with pytest.raises(UsageError, match="most"):
        index.match([1], most=1.5)
    with pytest.raises(UsageError, match="name"):
        SuffixIndex(corpus, WORDS, name="../x")
    with pytest.raises(UsageError, match="unknown column"):
        index.match([1], where="colour = 3")


# ---- growing (law 8) and forgetting (law 7) -------------------------------------------------------------------------


def same(a, b, ids):
    """Two indexes give the same answers to everything."""
    x, y = (i.match(ids, stop=len(ids) + 1) for i in (a, b))
    for name in ("length", "count", "target", "sparse"):
        assert getattr(x, name).tolist() == getattr(y, name).tolist(), name
    assert all(p.tolist() == q.tolist() for p, q in zip(x.rows(), y.rows()))
    assert a.count(ids[:2]) == b.count(ids[:2])


QUERY = [t for i in (1, 12, 33, 58) for t in WORDS.encode(TEXTS[i])]


def test_appending_in_pieces_equals_one_build_and_reads_only_new_documents(tmp_path, monkeypatch):
    whole, parts = make(tmp_path / "whole", TEXTS), make(tmp_path / "parts", TEXTS[:7])
    tokenizer, counted = words(), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: counted.append(text) or encode(text))
    index = SuffixIndex(parts, tokenizer)
    assert len(counted) == 7
    for a, b in pairwise([*range(7, 24), 30, 40, 41, 60]):
        parts.add([Document(f"d{i}", TEXTS[i], metadata={"number": i, "even": i % 2 == 0}) for i in range(a, b)])
        assert index.count([]) == sum(len(t.split()) for t in TEXTS[:b])
    assert counted == TEXTS
    same(index, SuffixIndex(whole, WORDS), QUERY)
    made = manifest.load(parts.path / "index" / "suffix").parts
    assert 1 <= len(made) <= 6 and made[-1].stop == 60  # neighbours merge
    assert len(list((parts.path / "index" / "suffix").iterdir())) == 1 + sum(p.rows > 0 for p in made)


def test_a_removed_document_was_never_there(copy, tmp_path):
    copy.remove(["d1", "d12"])
    copy.add([Document("d33", "w1 w2 w3 w1 w2 w3")])  # a changed document
    left = [d for d in copy.documents()]
    other = Datastore.build(tmp_path / "other", left, split="none")
    same(SuffixIndex(copy, WORDS), SuffixIndex(other, WORDS), QUERY)
    old = Datastore.open(copy.path, version=next(v.version for v in copy.history() if v.total == 40))
    before = [WORDS.encode(t) for t in TEXTS[:40]]
    agree(SuffixIndex(old, WORDS).match(QUERY, stop=len(QUERY) + 1), brute(before, QUERY), QUERY)
    copy.compact(purge=True)
    compact(copy)
    same(SuffixIndex(copy, WORDS), SuffixIndex(other, WORDS), QUERY)
    folder = copy.path / "index" / "suffix"
    held = [np.load(folder / p.name / "tokens.npy") for p in manifest.load(folder).parts if p.rows]
    tokens = np.concatenate([unpack(h) for h in held])
    assert (tokens != 12).sum() == sum(len(WORDS.encode(d.text)) for d in left)  # nothing else is on the disk
    copy.remove([d.id for d in left])
    copy.compact(purge=True)
    compact(copy)
    assert SuffixIndex(copy, WORDS).tokens == 0
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("step", [1, 29, 33, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 3, 4, 6, 9, 14, 20, 25, 32))])
def test_a_killed_build_is_resumed(tmp_path, step):
    """Killed while it writes the tokens of a part, while it seals or commits one, while it sorts them."""
    store, whole = make(tmp_path / "kb", TEXTS[:40]), make(tmp_path / "whole", TEXTS[:40])
    WORDS.inner.save(str(tmp_path / "tokenizer.json"))
    child = [sys.executable, str(CHILD), str(store.path), str(tmp_path / "tokenizer.json"), str(step)]
    killed = subprocess.run(child, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = store.path / "index" / "suffix"
    done = manifest.load(folder)
    tokenizer, counted = words(), []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: counted.append(text) or encode(text)
    same(SuffixIndex(store, tokenizer), SuffixIndex(whole, WORDS), QUERY)
    assert counted == TEXTS[done.stop if done else 0:40]  # what was committed was not tokenised again
    assert {p.name for p in folder.iterdir()} == {"manifest.json", *(p.name for p in manifest.load(folder).parts if p.rows)}


def test_large_parts_are_not_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(suffix_parts, "LARGEST", 200)
    monkeypatch.setattr(suffix_parts, "TOKENS", 50)
    store, whole = make(tmp_path / "kb", TEXTS), make(tmp_path / "whole", TEXTS)
    index = SuffixIndex(store, WORDS)
    made = [p.rows for p in manifest.load(store.path / "index" / "suffix").parts]
    assert len(made) > 3 and max(made) <= 200
    monkeypatch.undo()
    same(index, SuffixIndex(whole, WORDS), QUERY)
    for least in (2, 5):
        ids = QUERY[:60]
        agree(index.match(ids, stop=61, least=least), brute(lists(store), ids, least), ids)


# ---- unions, mismatches, damage -------------------------------------------------------------------------------------


def test_a_union_is_counted_as_one(tmp_path):
    a, b = make(tmp_path / "a", TEXTS[:25]), make(tmp_path / "b", TEXTS[25:], first=25)
    c = Datastore.build(tmp_path / "c", [Document("z", "w1 w2 w9", metadata={"colour": "red"})], split="none")
    whole = make(tmp_path / "whole", TEXTS)
    same(SuffixIndex(Datastore.union(a, b), WORDS), SuffixIndex(whole, WORDS), QUERY)
    three = SuffixIndex(Datastore.union(a, b, c), WORDS)
    assert three.count([1, 2, 9], where="colour = 'red'") == 1  # a column that only one of them has
    assert three.match([1, 2], stop=3, where="colour = 'red'").occurrences(2)[0].store == c.path
    with pytest.raises(UsageError, match="weight"):
        three.count([1], where="weight > 3")
    a.remove([d.id for d in a.documents()])
    assert SuffixIndex(Datastore.union(a, c), WORDS).count([]) == 3


def test_another_tokenizer_is_refused_or_kept_beside(copy):
    index = SuffixIndex(copy, WORDS)
    with pytest.raises(FingerprintError, match=r"made with the tokenizer of BPE .* that of other has .*name="):
        SuffixIndex(copy, words(13), called="other")
    beside = SuffixIndex(copy, words(13), name="more")
    assert beside.count([]) == index.count([])
    assert sorted(p.name for p in (copy.path / "index").iterdir()) == ["suffix", "suffix-more"]
    other = Datastore.build(copy.path.parent / "other", [Document("a", "w1")], split="none")
    shutil.copytree(copy.path / "index", other.path / "index")
    with pytest.raises(FingerprintError, match="datastore"):
        SuffixIndex(other, WORDS)


def test_a_fingerprint_is_of_how_text_is_cut():
    from transformers import PreTrainedTokenizerFast

    from ralm.lm.hf import HFTokenizer

    first = tokenizer_fingerprint(WORDS)
    fast = PreTrainedTokenizerFast(tokenizer_object=words().inner)
    assert tokenizer_fingerprint(HFTokenizer(fast)) == tokenizer_fingerprint(fast) == first == tokenizer_fingerprint(words())
    fast(["w1 w2"], max_length=1, truncation=True)  # leaves its mark on the tokenizer
    assert tokenizer_fingerprint(fast) == first and vocabulary(fast) == 12
    assert len({first, tokenizer_fingerprint(words(13)), tokenizer_fingerprint(words(12, 1))}) == 3
    with pytest.raises(UsageError, match="shows no vocabulary"):
        tokenizer_fingerprint(object())


@pytest.mark.parametrize("name", ["tokens.npy", "sa.npy", "heads.npy", "documents.npy"])
def test_damage_is_found(copy, name):
    SuffixIndex(copy, WORDS)
    folder = copy.path / "index" / "suffix"
    file = max(folder.glob(f"*/{name}"), key=lambda p: p.stat().st_size)
    right = file.read_bytes()
    file.write_bytes(right[:-3])
    with pytest.raises(StoreError, match=f"{name} has .* bytes"):
        SuffixIndex(copy, WORDS)
    wrong = bytearray(right)
    wrong[-len(right) // 3] ^= 0xFF
    file.write_bytes(wrong)
    assert [w for w in manifest.verify(folder, manifest.load(folder)) if name in w]
    with pytest.raises(StoreError, match=f"{name} is not what was written"):
        SuffixIndex(copy, WORDS)
    now = manifest.load(folder)
    old = next(p for p in now.parts if p.name == file.parent.name)
    for content in (right[:128] + bytes(255 - b for b in right[128:]), b"no array" + right[8:]):  # written wrong, sealed as it is
        file.write_bytes(content)
        part = manifest.seal(file.parent, old.first, old.stop, old.rows)
        manifest.commit(folder, replace(now, parts=tuple(part if p == old else p for p in now.parts)))
        with pytest.raises(StoreError, match="damaged"):
            SuffixIndex(copy, WORDS)


def test_it_takes_seven_bytes_a_token(tmp_path, monkeypatch):
    """Two bytes and four for tokens below 65,536, three and four for larger vocabularies; documents of a few hundred tokens."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 400, 400)) for _ in range(200)]
    for extra, most in ((0, 6.2), (70_000, 7.2)):
        tokenizer = words(400, extra)
        store = make(tmp_path / f"kb{extra}", texts)
        index = SuffixIndex(store, tokenizer)
        (part,) = manifest.load(store.path / "index" / "suffix").parts
        heads = 4 * (vocabulary(tokenizer) + 1)  # not by token: by vocabulary
        used = sum(f["bytes"] for f in part.files.values()) - heads
        assert index.tokens == 80_000 and 6 <= used / index.tokens < most
        assert index.count(tokenizer.encode("w7")) == sum(t.split().count("w7") for t in texts)


def test_bitmaps_rank_and_select():
    rng = np.random.default_rng(2)
    for n in (1, 63, 64, 65, 1000):
        positions = rng.random(n) < 0.3
        sa = rng.permutation(n).astype(np.uint32)
        out, ranks = np.zeros(n // 64 + 1, np.uint64), np.zeros(n // 64 + 1, np.uint32)
        suffix_kernels.allow(sa, np.packbits(positions, bitorder="little"), out, ranks)
        allowed = positions[sa]
        assert [suffix_kernels.rank(out, ranks, i) for i in range(n + 1)] == np.concatenate([[0], np.cumsum(allowed)]).tolist()
        lo, hi = n // 5, n - n // 7
        where = lo + np.flatnonzero(allowed[lo:hi])
        assert [suffix_kernels.select(out, ranks, lo, hi, i) for i in range(len(where) + 1)] == [*where.tolist(), hi]


def test_other_indexes_grow_and_are_compacted_beside_it(copy):
    """`ralm add` extends what is there; this one needs its tokenizer, and follows when it is opened next."""
    from ralm.index import compact as compact_all
    from ralm.index import retriever, update

    index = SuffixIndex(copy, WORDS)
    retriever("bm25", copy)
    before = index.count([])
    copy.add([Document("late", "w1 w2 w3")])
    copy.remove(["d1"])
    update(copy)
    copy.compact(purge=True)
    compact_all(copy)
    assert sum(len(np.load(f)) for f in (copy.path / "index" / "suffix").glob("*/sa.npy")) == before - len(TEXTS[1].split())
    assert index.count([]) == before + 3 - len(TEXTS[1].split()) == SuffixIndex(copy, WORDS).tokens
