"""Help is quick and light; every wrong use is one line and the right exit code."""

import os
import resource
import subprocess
import sys

import pytest

from ralm.app import cli
from ralm.errors import CapabilityError, ReadError, UsageError

HEAVY = ("torch", "transformers", "numba", "pyarrow", "lance", "faiss", "tokenizers")
COMMANDS = [name.split() for name in cli.COMMANDS]


@pytest.mark.parametrize("command", [[], ["eval"], *COMMANDS], ids=" ".join)
def test_help_of_every_command_loads_nothing_heavy(command):
    script = (f"import sys; from ralm.app.cli import main; code = main({[*command, '--help']!r}); "
              f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(code)")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.returncode == 0
    assert ran.stderr.strip() == "[]"
    assert ran.stdout.startswith(f"Usage: {' '.join(['ralm', *command])}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.6  # loose, one run; test_help_is_quick is strict


def test_help_is_quick():
    """`ralm --help` in under 0.3 s: the best of several runs, in CPU time where others keep the cores busy."""
    best = 9.0
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ralm.app.cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < 0.3:
            return
    assert best < 0.3


def test_help_fits_one_screen(program):
    ran = program("--help")
    assert len(ran.stdout.splitlines()) <= 40
    assert all(name in ran.stdout for name in ("build", "ask", "score", "doctor", "demo"))


WRONG = [
    ("buidl kb x", "did you mean 'build'"),
    ("eval qaa", "did you mean 'qa'"),
    ("search {kb} moon --retreiver bm25", "did you mean --retriever"),
    ("search", "store is missing"),
    ("build", "store is missing"),
    ("build {new}", "at least one file or folder"),
    ("build {new} {folder}/nowhere", "nowhere"),
    ("build {new} {folder} --split wrods:100", "did you mean 'words'"),
    ("build {new} {folder} --split words:0", "0"),
    ("build {new} {folder} --index bm52", "did you mean 'bm25'"),
    ("build {new} {folder} --index bm25:frm=atire", "frm"),
    ("build {new} {folder} --index bm25:form=atyre", "atire"),
    ("build {new} {folder} --index ,", "empty part"),
    ("build {new} {kb}", "is a datastore"),
    ("search {kb} moon -k abc", "int"),
    ("search {kb} moon -k", "-k needs a value"),
    ("search {kb} moon -k 0", "at least 1"),
    ("search {kb} moon -k -3", "at least 1"),
    ("search {kb}", "query is empty"),
    ("search {kb} moon --retriever bm52", "bm25"),
    ("search {kb} moon --retriever bm25:k1=x", "k1"),
    ("search {kb} moon --retriever bm25:b=true", "b"),
    ("search {kb} moon --where year=", "year="),
    ("search {kb} moon --where colour=1", "colour"),
    ("search {kb} moon --run out.trec", "--queries"),
    ("search {kb} moon --queries q.tsv", "not both"),
    ("search {kb} --queries {folder}/moon.md --run {new}/out.trec", "no folder"),
    ("score {kb} {folder}/moon.md --save {new}/rows.jsonl", "no folder"),
    ("ask {kb}", "question is empty"),
    ("ask {kb} who --lm bundeld:reader", "bundled"),
    ("ask {kb} who --lm bundled:raeder", "reader"),
    ("ask {kb} who --lm hf", "hf:name"),
    ("ask {kb} who --lm remote:nowhere", "remote:http"),
    ("ask {kb} who --how prepnd", "prepend"),
    ("generate {kb} hello --how prepend:j=2", "j"),
    ("generate {kb} hello --when evry:4", "every"),
    ("generate {kb} hello --when every:0", "at least 1|>= 1"),
    ("generate {kb} hello --max-tokens 0", "at least 1"),
    ("score {kb}", "at least one file or folder"),
    ("score {kb} {folder}/moon.md --window 0", "at least 1"),
    ("remove {kb}", "--id"),
    ("remove {kb} --id nobody", "nobody"),
    ("index {kb} --rebuild", "--index"),
    ("eval retrieval {kb}", "--queries is missing"),
    ("eval qa", "--questions"),
    ("eval qa --predictions p.json", "--gold"),
    ("eval qa --questions q.jsonl", "datastore"),
]


@pytest.mark.parametrize("line, says", WRONG, ids=[line for line, _ in WRONG])
def test_wrong_use_is_one_line_and_exit_code_2(line, says, ralm, shared, folder, tmp_path):
    ran = ralm(*[word.format(kb=shared, folder=folder, new=tmp_path / "new") for word in line.split()], "-q")
    assert ran.code == 2, ran
    _one_line(ran.err)
    assert any(s in ran.err.lower() for s in says.split("|")), ran.err
    assert ran.out == ""
    assert not (tmp_path / "new").exists()


CANNOT = [
    ("show {new}", "does not exist"),
    ("search {new} moon", "ralm build"),
    ("add {new} {folder}", "does not exist"),
    ("show {folder}", "no datastore"),
    ("show {folder}/moon.md", "moon.md"),
    ("build {folder}/moon.md {folder}", "moon.md"),
    ("search {kb} moon --at 99", "99"),
    ("search {kb} moon --at 0", "version 0"),
    ("show {kb} --id nobody", "nobody"),
    ("search {kb} --queries {new}.tsv --run {new}.trec", "new.tsv"),
    ("build {new} {empty}", "no documents"),
    ("build /proc/nowhere {folder}", "/proc/nowhere"),
    ("build {new} {folder} --strict", "rows.jsonl"),
]


@pytest.mark.parametrize("line, says", CANNOT, ids=[line for line, _ in CANNOT])
def test_what_cannot_be_done_is_one_line_and_exit_code_1(line, says, ralm, shared, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    ran = ralm(*[w.format(kb=shared, folder=folder, new=tmp_path / "new", empty=tmp_path / "empty") for w in line.split()], "-q")
    assert ran.code == 1, ran
    _one_line(ran.err)
    assert says in ran.err, ran.err
    assert ran.out == ""


def _one_line(text: str) -> None:
    assert text.startswith("ralm: ")
    assert text.count("\n") == 1, text
    assert "Traceback" not in text and "unexpected" not in text


@pytest.mark.parametrize("error, code, says", [
    (UsageError("a"), 2, "a"), (CapabilityError("b"), 2, "b"), (ReadError("c"), 1, "c"),
    (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
    (OSError(28, "No space left on device"), 1, "No space left on device"),
    (MemoryError(), 1, "memory"), (ValueError("two\nlines"), 1, "unexpected ValueError: two lines; RALM_DEBUG=1"),
    (KeyboardInterrupt(), 130, "stopped"), (cli.Stopped(), 143, "stopped")])
def test_how_every_error_ends(error, code, says):
    text, got = cli.explain(error, ["build"])
    assert got == code
    assert says in text and "\n" not in text


def test_only_commands_that_can_go_on_say_so():
    assert cli.explain(KeyboardInterrupt(), ["ask", "kb", "who?"]) == ("stopped", 130)
    assert "the same command goes on" in cli.explain(KeyboardInterrupt(), ["score", "kb", "x", "--save", "rows.jsonl"])[0]


def test_an_unexpected_error_shows_its_traceback_on_request(ralm, monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *_: 1 / 0)
    ran = ralm("show", "kb")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "ZeroDivisionError" in ran.err and "RALM_DEBUG=1" in ran.err
    monkeypatch.setenv("RALM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["show", "kb"])


def test_a_reader_that_goes_away_is_no_error(shared):
    ran = subprocess.run(f"{sys.executable} -m ralm.app.cli show {shared} --id moon.md | true; echo ${{PIPESTATUS[0]}}",
                         shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout.strip() in ("0", "141")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_below_stdout_is_one_line(shared):
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-m", "ralm.app.cli", "show", shared, "--json"], stdout=full, stderr=subprocess.PIPE,
                             text=True)
    assert ran.returncode == 1
    assert ran.stderr == "ralm: No space left on device\n"


def test_version(ralm):
    import ralm as package

    assert ralm("--version").out.strip() == package.__version__


def test_demo_is_reached_lazily(ralm, monkeypatch):
    import types

    told = []
    monkeypatch.setitem(sys.modules, "ralm.app.demo", types.SimpleNamespace(demo=lambda: told.append(1)))
    assert ralm("demo").code == 0
    assert told == [1]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_streams_that_the_caller_closed(closed, shared):
    """stdin, stdout or stderr closed by a service manager or a shell: the command does its work and says nothing there."""
    ran = subprocess.run(f"{sys.executable} -m ralm.app.cli search {shared} moon {closed}", shell=True, executable="/bin/bash",
                         capture_output=True, text=True)
    assert (ran.returncode, "unexpected" in ran.stderr) == (0, False), ran
    assert bool(ran.stdout) == (not closed.startswith(">"))
