"""What is masked: names, dates and numbers by rule, within one sentence, the same for the same seed."""

import numpy as np
import pytest

from ralm.errors import MissingDependency, UsageError
from ralm.train.salient import Masker, salient

TEXT = ("The Duke of Normandy, William I, became king on 25 December 1066. It was cold. He and the others of his men who were with "
        "him then went away again. In 1070 about 12.5 million people lived near the River Thames.")


@pytest.mark.parametrize(("sentence", "spans"), [
    ("It was built in 1887 near Paris.", ["1887 date", "Paris name"]),
    ("The Duke of Normandy, William I, became king on 25 December 1066.", ["Duke of Normandy name", "William I name",
                                                                          "25 December 1066 date"]),
    ("However, Tesla moved to New York City in June 1884 with 4 cents.", ["Tesla name", "New York City name", "June 1884 date"]),
    ("In the 19th century 30% of them lived in U.S. cities.", ["19th century date", "30% number", "U.S. name"]),
    ("ABC and NBC were rivals in the 1950s.", ["ABC name", "NBC name", "1950s date"]),
    ("Luther's theses cost $1,200, or 12.5 million people.", ["$1,200 number", "12.5 million people number"]),
    ("Kenya exports tea.", []),  # a capital at the beginning says nothing
    ("On Monday, May 12, 1887, Jan van Riebeeck sailed 120 km.", ["Monday date", "May 12, 1887 date", "Jan van Riebeeck name",
                                                                 "120 km number"]),
    ("Tesla's coil and Röntgen's rays.", ["Röntgen name"]),
    ("what he was and when they did it", []), ("", [])])
def test_tagger(sentence, spans):
    assert [f"{sentence[a:b]} {kind}" for a, b, kind in salient(sentence)] == spans


def test_spans_lie_within_long_sentences_and_never_overlap():
    found = Masker("salient", words=6).candidates(TEXT)
    assert [TEXT[c.start:c.end][:12] for c in found] == ["The Duke of ", "In 1070 abou"]
    for c in found:
        assert all(c.start <= a < b <= c.end for a, b in c.spans)
        assert all(b <= a for (_, b), (a, _) in zip(c.spans, c.spans[1:]))


@pytest.mark.parametrize("kind", ["salient", "spans", "uniform"])
def test_draws_depend_on_the_seed_alone(kind):
    def drawn(seed):
        rng = np.random.default_rng(seed)
        return [Masker(kind).draw(TEXT, rng) for _ in range(40)]

    assert drawn(1) == drawn(1) and drawn(1) != drawn(2)
    for c, spans in drawn(3):
        assert spans and all(c.start <= a < b <= c.end for a, b in spans)
        words = [len(TEXT[a:b].split()) for a, b in spans]
        if kind == "salient":
            assert len(spans) == 1 and spans[0] in c.spans
        elif kind == "spans":
            assert len(spans) == 1 and words[0] <= 10
        else:
            assert words == [1] * len(spans) and len(spans) == max(1, round(0.15 * len(c.spans)))
    assert Masker(kind).draw("Too short.", np.random.default_rng(0)) is None


def test_unknown_names_and_an_absent_tagger():
    with pytest.raises(UsageError, match="Did you mean 'salient'"):
        Masker("saliant")
    with pytest.raises(UsageError, match="unknown tagger"):
        Masker(tagger="bert")
    with pytest.raises(UsageError, match="unknown tagger"):
        salient("a", "bert")


def test_spacy_where_it_is_there():
    try:
        found = salient("Nikola Tesla moved to New York in June 1884.", "spacy")
    except MissingDependency as e:
        assert "ralm[spacy]" in str(e)
        return
    except UsageError as e:
        assert "spacy download" in str(e)
        return
    assert "New York" in ["Nikola Tesla moved to New York in June 1884."[a:b] for a, b, _ in found]
