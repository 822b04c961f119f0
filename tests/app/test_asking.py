"""search, ask and generate: what is printed can be checked against the stored document, character by character."""

import os

import pytest


def test_hits_have_every_field_and_exact_offsets(ralm, shared):
    data = ralm("search", shared, "highest mountain", "-k", "3", "--json").json
    (hit,) = data["hits"]
    assert hit.keys() == {"rank", "chunk", "document", "title", "source", "start", "end", "score", "text"}
    assert (hit["rank"], hit["document"], hit["title"]) == (1, "everest", "Mount Everest")
    stored = ralm("show", shared, "--id", hit["document"], "--json").json["text"]
    assert stored[hit["start"]:hit["end"]] == hit["text"]
    assert data["query"] == "highest mountain" and data["seconds"] >= 0


def test_words_without_quotes_are_one_query(ralm, shared):
    assert ralm("search", shared, "highest", "mountain", "--json").json["query"] == "highest mountain"


def test_k_beyond_the_store_gives_what_there_is(ralm, shared):
    hits = ralm("search", shared, "the tower moon river mountain", "-k", "1000", "--json").json["hits"]
    assert 1 <= len(hits) <= 5
    assert [h["rank"] for h in hits] == list(range(1, len(hits) + 1))
    assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)


@pytest.mark.parametrize("spec", ["bm25", "tfidf", "bm25:form=bm25+,k1=1.2,b=0.5", "auto"])
def test_retrievers_by_spec(ralm, shared, spec):
    hits = ralm("search", shared, "natural satellite", "--retriever", spec, "--json").json["hits"]
    assert hits[0]["document"] == "moon.md"


def test_filters_act_inside_the_search(ralm, shared):
    hits = ralm("search", shared, "metres", "-k", "1", "--where", "year < 2010", "--json").json["hits"]
    assert [h["document"] for h in hits] == ["trench"]


def test_nothing_found_is_said(ralm, shared):
    assert ralm("search", shared, "zyzzyva", "--json").json["hits"] == []
    assert ralm("search", shared, "zyzzyva").out == "nothing found\n"


def test_text_output_shows_document_and_characters(ralm, shared):
    ran = ralm("search", shared, "highest mountain")
    assert "Mount Everest" in ran.out and "everest" in ran.out and "0–71" in ran.out
    assert "\x1b" not in ran.out


def test_a_file_of_queries(ralm, shared, tmp_path):
    queries, run = tmp_path / "q.tsv", tmp_path / "out.trec"
    queries.write_text("a\tnatural satellite\nb\toceanic trench\n")
    data = ralm("search", shared, "--queries", queries, "--json").json
    assert [(q["id"], q["hits"][0]["document"]) for q in data["queries"]] == [("a", "moon.md"), ("b", "trench")]
    done = ralm("search", shared, "--queries", queries, "--run", run, "-k", "2", "--json").json
    rows = [line.split() for line in run.read_text().splitlines()]
    assert done["queries"] == 2 and done["lines"] == len(rows) and done["run"] == str(run)
    assert [r[:4] for r in rows if r[3] == "1"] == [["a", "Q0", "moon.md", "1"], ["b", "Q0", "trench", "1"]]


# ---- ask ------------------------------------------------------------------------------------------------------------


CITATION = {"document", "start", "end", "quote", "score", "title", "source", "chunk"}


def test_the_reader_answers_with_quotes_that_resolve(ralm, shared, reader):
    data = ralm("ask", shared, "Who was the first person to walk on the Moon?", "--lm", reader, "--json").json
    assert {"answer", "abstained", "citations", "evidence", "seconds"} <= data.keys()
    assert data["answer"] == "Neil Armstrong" and data["abstained"] is False
    stored = ralm("show", shared, "--id", "moon.md", "--json").json["text"]
    for c in data["citations"] + data["evidence"]:
        assert c.keys() == CITATION
        assert stored[c["start"]:c["end"]] == c["quote"]
    assert data["answer"] in data["citations"][0]["quote"]


def test_the_reader_declines_what_the_store_does_not_hold(ralm, shared, reader):
    ran = ralm("ask", shared, "What is the population of the Amazon basin?", "--lm", reader)
    assert ran.code == 0 and ran.out.startswith("no answer")
    assert ralm("ask", shared, "zyzzyva?", "--lm", reader, "--json").json["abstained"] is True


def test_a_reader_needs_no_how(ralm, shared, reader):
    ran = ralm("ask", shared, "who?", "--lm", reader, "--how", "prepend", "-q")
    assert ran.code == 2 and "--how" in ran.err


def test_a_language_model_answers_from_evidence(ralm, shared, tiny):
    data = ralm("ask", shared, "What is the highest mountain?", "--lm", tiny, "--max-tokens", "4", "-k", "2", "--json").json
    assert data["lm"] == tiny
    assert [e["document"] for e in data["evidence"]] == ["everest"]


# ---- generate -------------------------------------------------------------------------------------------------------


def test_generate_streams_text_and_tells_its_sources(ralm, shared, tiny):
    ran = ralm("generate", shared, "The highest mountain", "--lm", tiny, "--max-tokens", "6")
    assert ran.code == 0 and ran.out.endswith("\n") and len(ran.out) > 1
    assert "everest" in ran.err and "6 tokens" in ran.err
    data = ralm("generate", shared, "The highest mountain", "--lm", tiny, "--max-tokens", "6", "--json").json
    assert data["text"] == ran.out[:-1]
    assert {"text", "tokens", "reason", "logp", "evidence", "citations", "seconds"} <= data.keys()
    assert data["tokens"] == 6 and data["reason"] == "length" and data["logp"] < 0
    assert data["evidence"][0]["passages"][0]["document"] == "everest"


def test_the_seed_decides(ralm, shared, tiny):
    def drawn(seed):
        return ralm("generate", shared, "The moon", "--lm", tiny, "--max-tokens", "8", "--temperature", "1", "--seed", seed,
                    "--how", "none", "--json").json["text"]
    assert drawn(1) == drawn(1)
    assert len({drawn(s) for s in range(4)}) > 1


@pytest.mark.parametrize("how", ["ensemble:k=2", "ensemble:k=2,weights=posterior", "prepend:k=2,tokens=100"])
def test_every_fusion_and_schedule_by_spec(ralm, shared, tiny, how):
    for when in ("every:4", "adaptive:theta=0.9"):
        data = ralm("generate", shared, "The highest mountain", "--lm", tiny, "--how", how, "--when", when, "--max-tokens", "5",
                    "--json").json
        assert data["tokens"] == 5 and len(data["evidence"]) >= 2


@pytest.mark.parametrize("command", [["generate"], ["score"]])
def test_what_a_reader_cannot_do_is_refused(ralm, shared, folder, reader, command):
    ran = ralm(*command, shared, folder / "moon.md", "--lm", reader, "-q")
    assert ran.code == 2 and "spans" in ran.err and ran.err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout on this system")
def test_a_run_on_stdout_is_nothing_but_the_run(program, shared, tmp_path):
    (tmp_path / "q.tsv").write_text("a\tnatural satellite\n")
    ran = program("search", shared, "--queries", tmp_path / "q.tsv", "--run", "/dev/stdout")
    assert ran.stdout.splitlines()[0].startswith("a Q0 moon.md 1 ") and "lines for" in ran.stderr
    assert all(len(line.split()) == 6 for line in ran.stdout.splitlines())
