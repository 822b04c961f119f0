"""The nouns: hits without padding, and scores with their units."""

import math

import numpy as np
import pytest

import ralm
from ralm.types import Hits, LanguageModel, Retriever, Scored


def scored(logp, bytes=8, words=2):
    return Scored(np.asarray(logp, np.float64), np.arange(len(logp)), bytes, words, [], {}, 0.0)


def test_rows_of_hits_lose_their_padding():
    hits = Hits(np.array([[4, 2, -1], [-1, -1, -1]]), np.array([[2.0, 1.0, -np.inf], [-np.inf] * 3], np.float32))
    assert hits.row(0).ids.tolist() == [[4, 2]] and hits.row(0).scores.tolist() == [[2.0, 1.0]]
    assert hits.row(1).ids.shape == (1, 0)
    empty = Hits.empty(2, 3)
    assert empty.ids.shape == (2, 3) and (empty.ids == -1).all() and np.isneginf(empty.scores).all()


def test_perplexities_by_hand():
    s = scored([math.log(0.5), math.log(0.125)])  # 1 + 3 bits
    assert s.nats == pytest.approx(4 * math.log(2)) and s.ppl() == pytest.approx(4.0)  # 2 ** (4 bits / 2 tokens)
    assert s.bits_per_byte() == pytest.approx(0.5)  # 4 bits over 8 bytes
    assert s.word_ppl() == pytest.approx(4.0) and s.nats_per_token() == pytest.approx(2 * math.log(2))


def test_bits_per_byte_depends_on_bytes_not_on_tokens():
    """The same text in 2 or in 4 tokens of the same total: perplexity moves, bits per byte does not."""
    few, many = scored([-4.0, -4.0]), scored([-2.0] * 4)
    assert few.ppl() != pytest.approx(many.ppl()) and few.bits_per_byte() == pytest.approx(many.bits_per_byte())
    assert few.bits_per_byte() != pytest.approx(math.log2(few.ppl()) / 8)


def test_nothing_scored_is_not_a_perplexity():
    s = scored([], bytes=0, words=0)
    assert math.isnan(s.ppl()) and math.isnan(s.word_ppl()) and math.isnan(s.bits_per_byte()) and s.nats_per_token() == 0


def test_contracts_are_checked_by_shape(lm, bm25):
    assert isinstance(lm, LanguageModel) and isinstance(bm25, Retriever) and not isinstance(bm25, LanguageModel)


def test_public_names_load_and_unknown_ones_do_not():
    assert ralm.RALM.__module__ == "ralm.model" and ralm.EveryN(4).n == 4 and set(ralm.__all__) <= set(dir(ralm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ralm.nothing
