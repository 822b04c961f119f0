"""ralm tokens: what it would take is said first, what was made after it; only what is new is run; removal holds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")
MADE = {"name", "rows", "dim", "bytes", "index", "nprobe", "recall", "added", "documents", "estimate", "settings", "lm", "version",
        "seconds"}


@pytest.fixture
def made(ralm, kb, tiny):
    """A datastore with a token store, to change."""
    ralm("tokens", kb, "--lm", tiny, "-q")
    return kb


def test_the_estimate_comes_first_and_what_was_made_is_said(ralm, kb, tiny):
    ran = ralm("tokens", kb, "--lm", tiny, "--json")
    data = ran.json
    assert data.keys() == MADE
    assert (data["name"], data["index"], data["nprobe"], data["recall"]) == ("default", "exact", None, 1.0)
    assert data["rows"] == data["added"] > 100 and data["dim"] == 32 and data["documents"] == 5
    assert abs(data["estimate"]["rows"] - data["rows"]) < 0.1 * data["rows"]
    assert data["estimate"].keys() == {"rows", "bytes", "seconds", "memory"}
    on_disk = sum(f.stat().st_size for f in (kb / "tokens" / "default").rglob("*") if f.is_file())
    assert data["bytes"] == on_disk
    assert "about" in ran.err and "tokens" in ran.err and "memory" in ran.err  # told on stderr, before the work
    text = ralm("tokens", kb, "--lm", tiny, "--name", "other", "--project", "pca:8", "--dtype", "int8", "--key", "hidden",
                "--window", "64", "--stride", "16", "--metric", "ip", "--index", "exact").out
    for word in ("other", "hidden", "pca:8", "int8", "64", "16", "ip", "exact", "8 numbers"):
        assert word in text, word


def test_a_second_run_adds_only_what_is_new(ralm, made, tiny, tmp_path):
    before = ralm("tokens", made, "--lm", tiny, "--json").json
    assert before["added"] == 0 and before["estimate"]["rows"] == 0
    (tmp_path / "new.txt").write_text("Mercury is the smallest planet, nearest to the Sun.")
    ralm("add", made, tmp_path / "new.txt", "-q")
    after = ralm("tokens", made, "--lm", tiny, "--json").json
    assert after["rows"] - before["rows"] == after["added"] and 0 < after["added"] < 100


def test_the_index_that_was_asked_for_stays(ralm, made, tiny):
    """By the next command too, which does not name it."""
    assert ralm("tokens", made, "--lm", tiny, "--index", "exact", "--json").json["settings"]["index"] == "exact"
    assert ralm("tokens", made, "--lm", tiny, "--json").json["settings"]["index"] == "exact"
    ran = ralm("tokens", made, "--lm", tiny, "--index", "ivf", "--json")
    assert (ran.json["settings"]["index"], ran.json["index"]) == ("ivf", "exact") and "searched exactly" in ran.err


WRONG = [
    ("tokens {kb}", "--lm is missing"),
    ("tokens {kb} --lm {lm} --key last", "ffn_in"),
    ("tokens {kb} --lm {lm} --index flat", "ivf"),
    ("tokens {kb} --lm {lm} --dtype float8", "float16"),
    ("tokens {kb} --lm {lm} --metric cos", "l2"),
    ("tokens {kb} --lm {lm} --project pca", "pca:D"),
    ("tokens {kb} --lm {lm} --project pca:33", "32"),
    ("tokens {kb} --lm {lm} --window 9999", "9999"),
    ("tokens {kb} --lm {lm} --window 0", "window"),
    ("tokens {kb} --lm {lm} --stride 0", "stride"),
    ("tokens {kb} --lm {lm} --window 8 --stride 9", "stride"),
    ("tokens {kb} --lm {lm} --name a/b", "a/b"),
    ("tokens {kb} --lm bundled:nothing", "bundled"),
    ("score {kb} {folder}/moon.md --lm {lm} --how knn:k=x", "k="),
    ("score {kb} {folder}/moon.md --lm {lm} --how knn:lam=2", "0..1"),
    ("score {kb} {folder}/moon.md --lm {lm} --how knn:temp=2", "temperature"),
    ("score {kb} {folder}/moon.md --lm {lm} --how knn --tokens a/b", "a/b"),
    ("ask {kb} who --lm {lm} --how knn", "passages"),
    ("explain {kb} hello --lm {lm} --how knn:k=-1", "k="),
    ("explain {kb} hello --lm {lm} --how none", "--how"),
    ("explain {kb} hello --lm {lm} --how knn --html {new}/x.html", "no folder"),
    ("explain {kb} hello --lm {lm} --how knn --file {folder}/moon.md", "not both"),
]


@pytest.mark.parametrize("line, says", WRONG, ids=[line for line, _ in WRONG])
def test_wrong_use_is_one_line_and_exit_code_2(line, says, ralm, shared, folder, tmp_path, tiny):
    ran = ralm(*[word.format(kb=shared, folder=folder, lm=tiny, new=tmp_path / "new") for word in line.split()], "-q")
    assert ran.code == 2, ran
    assert ran.err.startswith("ralm: ") and ran.err.count("\n") == 1 and says.lower() in ran.err.lower(), ran.err
    assert ran.out == "" and not (shared / "tokens").exists()


def test_a_server_gives_no_states(ralm, kb):
    ran = ralm("tokens", kb, "--lm", "remote:http://127.0.0.1:9#x", "-q")
    assert ran.code in (1, 2) and ran.err.count("\n") == 1 and not (kb / "tokens").exists()


def test_settings_that_differ_name_the_way_out(ralm, made, tiny):
    ran = ralm("tokens", made, "--lm", tiny, "--key", "hidden", "-q")
    assert ran.code == 1 and "--name" in ran.err and "ffn_in" in ran.err and ran.err.count("\n") == 1


def test_a_missing_token_store_is_told_with_the_command_that_makes_it(ralm, kb, folder, tiny):
    for command in ("score", "explain", "generate"):
        what = folder / "moon.md" if command == "score" else "hello"
        ran = ralm(command, kb, what, "--lm", tiny, "--how", "knn", "--tokens", "mine", "-q")
        assert ran.code == 1 and f"ralm tokens {kb} --lm {tiny} --name mine" in ran.err and ran.err.count("\n") == 1


def test_scoring_with_neighbours(ralm, made, folder, tiny):
    args = ["score", made, folder / "moon.md", "--lm", tiny, "--json"]
    alone, leaked = ralm(*args).json, ralm(*args, "--how", "knn:k=8,lam=0.5,temperature=1").json
    assert leaked["ppl"] < alone["ppl"] and leaked["retrievals"] == leaked["tokens"]
    fair = ralm(*args, "--how", "knn:k=8,lam=0.5,temperature=1", "--exclude-self").json
    assert fair["excluded_documents"] == 1 and fair["ppl"] > leaked["ppl"]
    said = str(fair["convention"])
    for fact in ("k=8", "lam=0.5", "temperature=1", "'default'", "exact", "recall"):
        assert fact in said, fact
    assert fair["convention"]["retriever"] is None
    text = ralm(*args[:-1], "--how", "knn:k=8,lam=0.5,temperature=1")
    assert "TokenStore('default'" in text.out and "recall" in text.out and "--exclude-self" in text.err


def test_a_copy_under_another_name_does_not_find_itself(ralm, made, folder, tiny, tmp_path):
    (tmp_path / "copy.txt").write_text((folder / "moon.md").read_text())
    data = ralm("score", made, tmp_path / "copy.txt", "--lm", tiny, "--how", "knn:k=8", "--exclude-self", "--json").json
    assert data["rows"][0]["excluded"] == ["moon.md"] and data["tokens_searched"] == data["tokens"]


def test_scoring_with_passages_and_neighbours(ralm, made, folder, tiny):
    data = ralm("score", made, folder / "moon.md", "--lm", tiny, "--how", "prepend:k=1+knn:k=4,lam=0.2,temperature=1",
                "--when", "every:16", "--window", "128", "--exclude-self", "--json").json
    assert data["convention"]["evidence_tokens"] == 64 and data["convention"]["retriever"]
    assert data["retrievals"] > data["tokens"] == data["tokens_searched"], data  # passages and neighbours


def test_a_kept_run_of_another_token_store_is_not_gone_on_with(ralm, made, folder, tiny, tmp_path):
    args = ["score", made, folder / "moon.md", "--lm", tiny, "--how", "knn:k=4", "--save", tmp_path / "rows.jsonl", "-q"]
    assert ralm(*args).code == 0
    ralm("tokens", made, "--lm", tiny, "--name", "small", "--project", "pca:4", "-q")
    ran = ralm(*args, "--tokens", "small")
    assert ran.code == 2 and "small" in ran.err


def test_generating_with_neighbours(ralm, made, tiny):
    data = ralm("generate", made, "The Moon is", "--lm", tiny, "--how", "knn:k=4,lam=0.9,temperature=1", "--max-tokens", "5",
                "--json").json
    assert data["tokens"] == 5 and data["retriever"] is None and data["token_store"] == "default"
    args = ["generate", made, "The Moon is", "--lm", tiny, "--how", "knn:k=4,lam=0.9,temperature=1", "--max-tokens", "5", "--json"]
    for guesses in ("3", "auto"):
        assert ralm(*args, "--speculate", guesses).json["text"] == data["text"]
    assert ralm(*args, "--speculate", "-1").code == ralm(*args, "--speculate", "some").code == 2


def test_removal_through_the_command_line_equals_never_having_held_it(ralm, made, folder, tiny, tmp_path):
    """With every kind of change between: documents removed after the token store was made, and one updated."""
    never = tmp_path / "never"
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps(d) + "\n" for d in (ralm("show", made, "--id", i, "--json").json for i in ("rivers.html", "everest"))))
    ralm("build", never, tmp_path / "rows.jsonl", "-q")
    ralm("tokens", never, "--lm", tiny, "-q")
    ralm("remove", made, "--id", "moon.md", "--id", "deep/tower.txt", "--id", "trench", "-q")
    score = [folder / "moon.md", "--lm", tiny, "--how", "knn:k=64,lam=0.5,temperature=3", "--json", "-q"]
    ours, theirs = ralm("score", made, *score).json, ralm("score", never, *score).json
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], abs=1e-6)
    ralm("compact", made, "--purge", "-q")
    assert ralm("score", made, *score).json["nats_per_token"] == pytest.approx(theirs["nats_per_token"], abs=1e-6)


def test_purging_drops_the_rows_of_what_was_removed(ralm, made, tiny):
    before = ralm("show", made, "--json").json["token_stores"]
    assert [t["name"] for t in before] == ["default"]
    ralm("remove", made, "--id", "moon.md", "-q")
    assert ralm("compact", made, "--purge", "--json").code == 0
    after = ralm("show", made, "--json").json["token_stores"]
    assert after[0]["rows"] < before[0]["rows"] and after[0]["bytes"] < before[0]["bytes"]
    assert ralm("doctor", made, "-q").code == 0


def test_show_and_doctor_list_token_stores(ralm, made):
    text = ralm("show", made).out
    assert "tokens" in text and "default" in text and "ffn_in" in text
    data = ralm("show", made, "--json").json
    assert [i["name"] for i in data["indexes"]] == ["bm25"]
    (held,) = [a for a in ralm("doctor", made, "--json").json["store"]["artifacts"] if a["kind"] == "tokens"]
    assert held["wrong"] == [] and held["rows"] == data["token_stores"][0]["rows"] and held["name"] == "tokens/default"


def test_doctor_finds_a_flipped_byte_and_the_way_out_works(ralm, made, folder, tiny):
    file = next((made / "tokens" / "default").glob("*/keys.bin"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    ran = ralm("doctor", made)
    assert ran.code == 1 and "keys.bin" in ran.out
    told = ralm("score", made, folder / "moon.md", "--lm", tiny, "--how", "knn", "-q")
    for text in (ran.out, told.err):
        assert f"ralm tokens {made}" in text and "--rebuild" in text and "ralm index" not in text, text
    assert ralm("tokens", made, "--lm", tiny, "--rebuild", "-q").code == 0
    assert ralm("doctor", made, "-q").code == 0


def test_doctor_knows_what_is_behind_and_what_is_gone(ralm, made, tmp_path, tiny):
    (tmp_path / "new.txt").write_text("Mercury is the smallest planet.")
    ralm("add", made, tmp_path / "new.txt", "-q")
    said = ralm("doctor", made, "--json").json
    assert said["ok"] and any("ralm tokens" in n for n in said["notes"])


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130)])
def test_a_stopped_build_goes_on(ralm, tmp_path, sent, code, tiny):
    kb, rows = tmp_path / "kb", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": f"d{i}", "text": f"document {i} " + "of this and that, " * 80}) + "\n"
                            for i in range(12)))
    ralm("build", kb, rows, "-q")
    start = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
             "from ralm.what import token_build; token_build.SECONDS, token_build.CHUNK = 0.0, 1 << 14\n"
             "import sys; from ralm.app.cli import main; sys.exit(main())")
    process = subprocess.Popen([sys.executable, "-c", start, "tokens", str(kb), "--lm", tiny], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 90
    file = kb / "tokens" / "default" / "manifest.json"
    while time.monotonic() < until and process.poll() is None and not (file.exists() and '"rows": 1' in file.read_text()):
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (out, err)
    assert out == "" and "Traceback" not in err and "the same command goes on from there" in err
    kept = ralm("show", kb, "--json").json["token_stores"][0]["rows"]
    data = ralm("tokens", kb, "--lm", tiny, "--json", "-q").json
    assert data["added"] == data["rows"] - kept and kept > 0 and data["added"] > 0


def test_a_datastore_without_text_has_a_token_store_without_tokens(ralm, folder, tmp_path, tiny):
    (tmp_path / "one.txt").write_text("Only this.")
    ralm("build", tmp_path / "kb", tmp_path / "one.txt", "-q")
    ralm("remove", tmp_path / "kb", "--id", "one.txt", "-q")
    ralm("compact", tmp_path / "kb", "--purge", "-q")
    ran = ralm("tokens", tmp_path / "kb", "--lm", tiny, "--json")
    assert (ran.json["rows"], ran.json["added"]) == (0, 0) and "no text" in ran.err
    args = ["score", tmp_path / "kb", folder / "moon.md", "--lm", tiny, "--json"]
    assert ralm(*args, "--how", "knn").json["nats_per_token"] == ralm(*args).json["nats_per_token"]
    data = ralm("explain", tmp_path / "kb", "Nothing is here.", "--lm", tiny, "--how", "knn", "--json").json
    assert data["documents"] == {} and all(t["p_knn"] is None and t["neighbours"] == [] for t in data["tokens"])
