"""Provenance by token: every neighbour resolves to characters of its stored document, whatever the tokenizer cuts."""

import time

import numpy as np
import pytest

pytest.importorskip("torch")
from ralm.lm.pieces import spans
from ralm.model import RALM
from ralm.types import Document
from ralm.what.datastore import Datastore
from ralm.what.token_store import TokenStore

MANY = "naïve 北京 was 🦩🦩 here — “Kölliker” ﬁrst… \u00a0e\u0301 ends in \ufffd and 🧑‍🚀."


@pytest.fixture(scope="module")
def system(tmp_path_factory, lm):
    docs = [Document("plain", "A reef of granite. The reef is hard."), Document("many", MANY + " " + MANY),
            Document("other", "The passage stands before the text. 北京 is naïve.")]
    kb = Datastore.build(tmp_path_factory.mktemp("p") / "kb", docs)
    return RALM(lm, how="knn:k=16,lam=0.5,temperature=2", tokens=TokenStore.build(kb, lm))


def pieces_of(tokenizer, text):
    ids, starts, ends = spans(tokenizer, text)
    assert ids == tokenizer.encode(text)
    return ids, starts, ends


class Slow:
    """A tokenizer that gives no offsets."""

    def __init__(self, inner):
        self.encode, self.decode = inner.encode, inner.decode


@pytest.mark.parametrize("text", ["", "a", " two  spaces\n\n", MANY, MANY * 7, "\ufffd\ufffd a", "é" * 40])
@pytest.mark.parametrize("offsets", [True, False])
def test_spans_tile_the_text(lm, text, offsets):
    tokenizer = lm.tokenizer if offsets else Slow(lm.tokenizer)
    if not offsets:
        text = text.replace("\ufffd", "?")  # which looks like a part of a character; only offsets can tell
    ids, starts, ends = pieces_of(tokenizer, text)
    before = np.concatenate([[0], ends])
    assert (np.diff(before) >= 0).all() and (starts <= before[:-1]).all() and (len(ids) == 0 or ends[-1] == len(text))
    if text:
        assert (ends > starts).all()  # every token stands at some character, if only a part of it
    for i, (a, b) in enumerate(zip(starts.tolist(), ends.tolist())):
        piece = tokenizer.decode([ids[i]])
        if "\ufffd" not in piece:
            assert text[a:b] == piece
        else:
            assert b - a >= 1 and text[a:b].encode()  # a part of a character is told as the character


def test_every_neighbour_resolves(system):
    stored = {d.id: d.text for d in system.store.documents()}
    text = "The 北京 reef is naïve 🦩 — granite."
    made = system.explain(text, neighbours=16)
    assert "".join(made.tokens) == text
    seen = 0
    for near in made.neighbours:
        for n in near:
            whole = stored[n.document]
            assert whole[n.start:n.start + len(n.target)] == n.target != ""
            assert whole[:n.start].endswith(n.left) and (n.left or n.start == 0)
            seen += 1
    assert seen == 16 * len(made.tokens)
    many = {n.target for near in made.neighbours for n in near if n.document == "many"}
    assert "🦩" in many or "北" in many


def test_the_numbers_are_those_of_the_system(system):
    text = "The reef is hard."
    made = system.explain(text)
    assert np.allclose(made.logp, system.score(text).logp)
    p = 0.5 * np.exp(made.logp_lm) + 0.5 * made.p_knn
    assert np.allclose(p, np.exp(made.logp), rtol=1e-4)
    supplied = (0.5 * made.p_knn / np.exp(made.logp)).sum()
    assert sum(made.documents.values()) == pytest.approx(supplied, rel=1e-4)
    assert list(made.documents.values()) == sorted(made.documents.values(), reverse=True)


def test_a_long_text_over_long_documents_takes_seconds(tmp_path, lm):
    """Five hundred tokens whose neighbours stand deep inside documents of a hundred thousand characters."""
    rng = np.random.default_rng(0)
    words = MANY.split()
    docs = [Document(f"d{i}", " ".join(rng.choice(words, 6_000))) for i in range(2)]
    kb = Datastore.build(tmp_path / "kb", docs)
    ralm = RALM(lm, how="knn:k=64", tokens=TokenStore.build(kb, lm, window=64, stride=64))
    ids = lm.tokenizer.encode(docs[0].text)[:500]
    text = lm.tokenizer.decode(ids)
    began = time.process_time()
    ralm.score(text)
    scoring = time.process_time() - began
    began = time.process_time()
    made = ralm.explain(text)
    spent = time.process_time() - began
    assert sum(map(len, made.neighbours)) >= 8 * 450
    assert spent < 4 * scoring + 2.0, (spent, scoring)
