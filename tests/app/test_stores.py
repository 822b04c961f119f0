"""build, add, remove, compact, history, show, index: end to end over real files, with the JSON that was promised."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

TOTALS = {"documents", "chunks", "version", "seconds"}


def test_build_says_what_it_made(ralm, folder, tmp_path):
    data = ralm("build", tmp_path / "kb", folder, "--json").json
    assert data.keys() >= TOTALS
    assert (data["documents"], data["added"], data["updated"], data["unchanged"]) == (5, 5, 0, 0)
    assert data["chunks"] == data["added_chunks"] == 5
    assert data["indexes"] == ["bm25"] and data["split"] == "words:100"
    (skipped,) = data["skipped"]
    assert skipped["file"].endswith("rows.jsonl") and "line 3" in skipped["reason"]


def test_talk_goes_to_stderr_and_can_be_silenced(ralm, folder, tmp_path):
    ran = ralm("build", tmp_path / "kb", folder)
    assert "skipped" in ran.err and "rows.jsonl" in ran.err
    assert ran.out.startswith("5 added; 5 documents, 5 chunks at version ")
    assert ralm("build", tmp_path / "kb", folder, "--quiet").err == ""


def test_building_again_adds_nothing(ralm, kb, folder):
    data = ralm("build", kb, folder, "--json").json
    assert (data["added"], data["unchanged"], data["documents"]) == (0, 5, 5)


def test_another_split_is_refused_and_both_are_named(ralm, kb, folder):
    ran = ralm("build", kb, folder, "--split", "markdown", "-q")
    assert ran.code == 2
    assert "words:100" in ran.err and "markdown" in ran.err


def test_strict_stops_at_the_first_bad_file(ralm, folder, tmp_path):
    ran = ralm("build", tmp_path / "kb", folder, "--strict", "-q")
    assert ran.code == 1 and "rows.jsonl" in ran.err


def test_add_updates_and_every_index_follows(ralm, kb, tmp_path):
    new = tmp_path / "more.jsonl"
    new.write_text('{"id": "everest", "text": "Everest, says a survey with lasers, has 8,849 metres."}\n'
                   '{"id": "k2", "text": "K2 is the second highest mountain, at 8,611 metres."}\n')
    data = ralm("add", kb, new, "--json").json
    assert (data["added"], data["updated"], data["unchanged"], data["documents"]) == (1, 1, 0, 6)
    found = [h["document"] for h in ralm("search", kb, "mountain metres lasers", "--json").json["hits"]]
    assert {"k2", "everest"} <= set(found) and len(found) == len(set(found))


def test_remove_is_effective_at_once_and_the_past_stays(ralm, kb):
    before = ralm("show", kb, "--json").json["version"]
    data = ralm("remove", kb, "--id", "everest", "--id", "trench", "--json").json
    assert (data["documents"], data["chunks"], data["removed"], data["removed_chunks"]) == (3, 3, 2, 2)
    assert ralm("search", kb, "highest", "mountain", "--json").json["hits"] == []
    then = ralm("search", kb, "highest", "mountain", "--at", before, "--json").json
    assert [h["document"] for h in then["hits"]] == ["everest"] and then["version"] == before


def test_remove_by_filter(ralm, kb):
    data = ralm("remove", kb, "--where", "year < 2000", "--json").json
    assert (data["removed"], data["documents"]) == (1, 4)
    assert ralm("remove", kb, "--where", "year < 2000", "--json").json["removed"] == 0


def test_purged_text_is_nowhere_on_disk(ralm, kb):
    ralm("remove", kb, "--id", "trench")
    assert _holds(kb, b"Challenger Deep")
    data = ralm("compact", kb, "--purge", "--json").json
    assert data.keys() >= TOTALS and data["documents"] == 4
    assert not _holds(kb, b"Challenger Deep")
    assert ralm("show", kb, "--at", "3", "-q").code == 1
    assert [h["document"] for h in ralm("search", kb, "natural satellite", "--json").json["hits"]] == ["moon.md"]


def _holds(folder, text: bytes) -> bool:
    return any(text in p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_history_names_every_version(ralm, kb):
    ralm("remove", kb, "--id", "trench")
    data = ralm("history", kb, "--json").json
    assert [v["version"] for v in data["versions"]] == list(range(1, data["version"] + 1))
    assert data["versions"][-1]["action"] == "remove"
    assert "remove" in ralm("history", kb).out


def test_show_describes_store_and_document(ralm, shared):
    data = ralm("show", shared, "--json").json
    assert data.keys() >= TOTALS
    assert data["fields"]["year"] == "int64" and data["split"] == "words:100" and data["bytes"] > 0
    assert [(i["name"], i["rows"]) for i in data["indexes"]] == [("bm25", 5)]
    one = ralm("show", shared, "--id", "everest", "--json").json
    assert one["text"].startswith("Mount Everest is") and one["metadata"]["year"] == 2020
    assert "8,849" in ralm("show", shared, "--id", "everest").out


def test_index_builds_catches_up_and_rebuilds(ralm, kb):
    data = ralm("index", kb, "--index", "bm25", "--json").json
    assert [i["name"] for i in data["indexes"]] == ["bm25"]
    changed = ralm("index", kb, "--index", "bm25:stemmer=none", "-q")
    assert changed.code == 1 and "--rebuild" in changed.err
    again = ralm("index", kb, "--index", "bm25:stemmer=none", "--rebuild", "--json").json
    assert again["indexes"][0]["settings"]["stemmer"] is None
    assert ralm("index", kb, "--json").json["indexes"][0]["rows"] == 5


def test_a_second_writer_is_told_who_holds_the_store(ralm, kb, folder):
    from ralm.what.datastore import Datastore

    with Datastore.open(kb).lock():
        ran = ralm("remove", kb, "--id", "trench", "-q")
        assert ran.code == 1 and str(os.getpid()) in ran.err


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_build_goes_on_from_what_is_kept(ralm, tmp_path, sent, code):
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(20_000):
            file.write(json.dumps({"id": f"d{i}", "text": f"document number {i} " + "about this and that " * 20}) + "\n")
    kb = tmp_path / "kb"
    start = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may start tests deaf to it
             "import sys; from ralm.app.cli import main; sys.exit(main())")
    process = subprocess.Popen([sys.executable, "-c", start, "build", str(kb), str(rows)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None and len(list(kb.glob("documents.lance/_versions/*"))) < 3:
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (out, err)
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "ralm: stopped; what was done is kept, the same command goes on from there"
    kept = ralm("show", kb, "--json").json["documents"]
    assert 0 < kept < 20_000
    data = ralm("build", kb, rows, "--json", "-q").json
    assert (data["documents"], data["unchanged"], data["added"]) == (20_000, kept, 20_000 - kept)


def test_a_folder_that_cannot_be_written_is_one_line(ralm, folder, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    ran = ralm("build", tmp_path / "closed" / "kb", folder, "-q")
    assert ran.code == 1 and ran.err.count("\n") == 1


def test_documents_that_give_way_to_others_of_their_id_are_counted_and_named(ralm, kb, tmp_path):
    """Two folders with a file of the same name: the second takes the place of the first, which must not go unnoticed."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "moon.md").write_text("# Another moon\n\nTitan is the largest moon of Saturn.\n")
    ran = ralm("add", kb, tmp_path / "b", "--json")
    assert (ran.json["added"], ran.json["updated"], ran.json["replaced"]) == (0, 1, 1)
    (said,) = [line for line in ran.err.splitlines() if "gave way" in line]
    assert "docs0/moon.md" in said and "b/moon.md" in said
    (tmp_path / "b" / "moon.md").write_text("Titan is the largest moon of Saturn, larger than Mercury.")
    edited = ralm("add", kb, tmp_path / "b", "--json")  # the same file with other content is an update, nothing more
    assert (edited.json["updated"], edited.json["replaced"]) == (1, 0) and "gave way" not in edited.err


def test_an_id_twice_in_one_add_is_told(ralm, tmp_path):
    (tmp_path / "twice.csv").write_text("id,text\na,The first says one thing.\na,The second says another.\nb,Alone.\nb,Alone.\n")
    ran = ralm("build", tmp_path / "kb", tmp_path / "twice.csv", "--json")
    assert (ran.json["documents"], ran.json["added"], ran.json["replaced"]) == (2, 2, 1)
    assert "'a' is twice in" in ran.err


def test_a_file_keeps_its_own_name_whatever_points_to_it(ralm, tmp_path):
    docs = tmp_path / "docs"
    (docs / "releases").mkdir(parents=True)
    (docs / "releases" / "notes.txt").write_text("The notes say that the bridge is open.")
    (docs / "a_link.txt").symlink_to("releases/notes.txt")
    (docs / "current").symlink_to("releases")
    ralm("build", tmp_path / "kb", docs, "-q")
    assert ralm("show", tmp_path / "kb", "--ids", "--json").json["ids"] == ["releases/notes.txt"]


def test_ids_show_what_remove_would_take(ralm, kb):
    data = ralm("show", kb, "--ids", "--where", "year < 2000", "--json").json
    assert (data["ids"], data["documents"]) == (["trench"], 1) and data.keys() >= {"version", "seconds"}
    assert sorted(ralm("show", kb, "--ids").out.split()) == ["deep/tower.txt", "everest", "moon.md", "rivers.html", "trench"]
    missing = ralm("show", kb, "--id", "nope")
    assert missing.code == 1 and f"ralm show {kb} --ids" in missing.err
    assert ralm("show", kb, "--where", "year < 2000").code == 2


def test_a_store_that_is_a_file_is_told(ralm, folder, tmp_path):
    (tmp_path / "kb").write_text("not a folder")
    ran = ralm("build", tmp_path / "kb", folder, "-q")
    assert ran.code == 1 and "is a file" in ran.err
