"""Full disks, folders that cannot be written or read, clocks that go back, files that change while they are read, datastores
that are moved: a clear line or the right result, and a datastore that is sound in every byte afterwards."""

import gzip
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from ralm.app import cli
from ralm.app.doctor import examine
from ralm.errors import RalmError, StoreError
from ralm.index import built, retriever
from ralm.index.sparse import BM25
from ralm.types import Document
from ralm.what.datastore import Datastore
from ralm.what.read import read

N = 600
NOBODY = 65534
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system, or becomes another user")


def text(i: int) -> str:
    r = random.Random(i)
    return " ".join(f"w{r.randrange(300)}" for _ in range(40))


def documents(first: int, stop: int) -> list[Document]:
    return [Document(f"d{i}", text(i), metadata={"number": i}) for i in range(first, stop)]


@pytest.fixture
def run(capsys):
    """A command in this process: (exit code, what it said)."""
    def command(*argv) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([*map(str, argv), "--quiet"])
        return code, capsys.readouterr().err
    return command


@pytest.fixture(scope="module")
def base(tmp_path_factory, table) -> Path:
    store = Datastore.build(tmp_path_factory.mktemp("base") / "kb", documents(0, N), split="none")
    retriever("bm25", store), retriever(f"dense:{table}", store)
    return store.path


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("more") / "more.jsonl"
    file.write_text("".join(json.dumps({"id": f"d{i}", "text": text(i), "number": i}) + "\n" for i in range(N, 2 * N)))
    return file


def numbers(path: Path) -> list[int]:
    """The documents of a datastore that is sound, by number."""
    problems: list[str] = []
    examine(path, problems)
    assert not problems, problems
    return sorted(d.metadata["number"] for d in Datastore.open(path).documents())


def one_line(said: str) -> bool:
    """An error as a user should see it."""
    return said.count("\n") == 1 and "Traceback" not in said and "unexpected" not in said and "panicked" not in said


@contextmanager
def mounted(folder: Path, *options: str):
    folder.mkdir()
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ---- a full disk -----------------------------------------------------------------------------------------------------


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes of the file system."""
    file, free = folder / "filler", shutil.disk_usage(folder).free
    file.write_bytes(b"x" * max(0, free - left))
    return file


FULL = {"add": lambda kb, more, table: ["add", kb, more],
        "remove": lambda kb, more, table: ["remove", kb, "--where", "number < 300"],
        "compact": lambda kb, more, table: ["compact", kb], "purge": lambda kb, more, table: ["compact", kb, "--purge"],
        "bm25": lambda kb, more, table: ["index", kb, "--index", "bm25", "--rebuild"],
        "dense": lambda kb, more, table: ["index", kb, "--index", f"dense:{table}", "--rebuild"]}


def full(command: str, left: int, base: Path, more: Path, table: str, run, folder: Path) -> bool:
    """One command with `left` bytes of disk; whether it met the end of it."""
    with mounted(folder, "-t", "tmpfs", "-o", "size=24m", "none") as small:
        kb = Path(shutil.copytree(base, small / "kb"))
        if command in ("compact", "purge"):
            Datastore.open(kb).remove(where="number < 300")
        before = numbers(kb)
        end = {"add": list(range(2 * N)), "remove": list(range(300, N))}.get(command, before)
        if command in ("bm25", "dense"):  # else a rebuild first gives back what the old one took
            shutil.rmtree(kb / "index" / command)
        filler, argv = fill(small, left), FULL[command](kb, more, table)
        code, said = run(*argv)
        assert code == 0 or (code == 1 and one_line(said) and ("space" in said or "cannot" in said)), said
        filler.unlink()
        now = numbers(kb)
        assert now in (before, end)
        if command != "remove" or now == before:
            code_again, said_again = run(*argv)
            assert code_again == 0, said_again
        assert numbers(kb) == end
        store = Datastore.open(kb)
        for spec in ("bm25", f"dense:{table}"):
            hits = retriever(spec, store).search([text(end[-1])], 1)
            assert store.document_ids(hits.ids[0].tolist()) == [f"d{end[-1]}"]
    return code == 1


@root
@pytest.mark.parametrize("command", FULL)
def test_a_full_disk(command, base, more, table, run, tmp_path):
    assert full(command, 0, base, more, table, run, tmp_path / "small")


@pytest.mark.slow
@root
@pytest.mark.parametrize("command", FULL)
def test_a_disk_that_fills_up_at_any_byte(command, base, more, table, run, tmp_path):
    lefts = [2**k for k in range(12, 21)] + [3 * 2**k for k in range(12, 19)]
    met = [full(command, left, base, more, table, run, tmp_path / str(left)) for left in lefts]
    assert any(met)


@root
def test_an_array_that_does_not_fit_is_an_error(tmp_path):
    """In a process of its own: written through a mapping, it would be the end of the process."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "none") as small:
        write = ("import sys, pathlib, numpy as np; from ralm.index import manifest\n"
                 "manifest.room(pathlib.Path(sys.argv[1]), np.float32, (10**6,))[:] = 1")
        done = subprocess.run([sys.executable, "-c", write, str(small / "a.npy")], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "No space left on device" in done.stderr, (done.returncode, done.stderr)


def test_files_that_may_not_grow(base, more, tmp_path):
    """A limit on the size of a file, which needs no root: the write fails in the middle of it."""
    kb = shutil.copytree(base, tmp_path / "kb")
    limited = [sys.executable, "-c", "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "from ralm.app import cli\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\nsys.exit(cli.main(sys.argv[1:]))"]
    done = subprocess.run([*limited, "add", kb, more, "-q"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and one_line(done.stderr) and "File too large" in done.stderr, done.stderr
    assert numbers(kb) == list(range(N)) and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000
    assert cli.main(["add", str(kb), str(more), "-q"]) == 0 and numbers(kb) == list(range(2 * N))


# ---- what may not be written or read ---------------------------------------------------------------------------------


@root
def test_a_read_only_file_system(base, more, table, run, tmp_path):
    kb = shutil.copytree(base, tmp_path / "kb")
    with mounted(tmp_path / "ro", "--bind", str(kb)) as ro:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(ro)], check=True)
        store = Datastore.open(ro)
        for spec in built(store):
            assert store.document_ids(retriever(spec, store).search([text(7)], 1).ids[0].tolist()) == ["d7"]
        assert numbers(ro) == list(range(N)) and run("doctor", ro)[0] == 0
        for argv in FULL.values():
            code, said = run(*argv(ro, more, table))
            assert code == 1 and one_line(said) and "Read-only file system" in said, said
        code, said = run("build", ro / "new", more)
        assert code == 1 and one_line(said) and "Read-only file system" in said, said
    assert numbers(kb) == list(range(N))


@contextmanager
def nobody():
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@root
def test_permission_denied(base, more, table, run):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        kb = shutil.copytree(base, folder / "kb")
        for p in kb.rglob("*"):
            p.chmod(0o755 if p.is_dir() else 0o644)
        kb.chmod(0o755)
        files = folder / "files"
        files.mkdir()
        for part, mode in (("a", 0o644), ("closed", 0o000)):
            (files / f"{part}.txt").write_text("text of " + part)
            (files / f"{part}.txt").chmod(mode)
        (files / "deep").mkdir(mode=0o700)
        with nobody():
            assert numbers(kb) == list(range(N))
            for argv in FULL.values():
                code, said = run(*argv(kb, files, table))
                assert code == 1 and one_line(said) and "Permission denied" in said, said
            skipped: list = []
            assert [d.id for d in read(files, skipped=skipped)] == ["a.txt"]
            assert {Path(p).name: r for p, r in skipped} == {"closed.txt": "cannot be read (Permission denied)",
                                                             "deep": "cannot be listed (Permission denied)"}
        for part in ("store.json", "texts.lance", "index/bm25"):  # what may not even be read
            mode = (kb / part).stat().st_mode
            (kb / part).chmod(0)
            with nobody():
                code, said = run("search", kb, "w1", "--retriever", "bm25")
            (kb / part).chmod(mode)
            assert code == 1 and one_line(said) and part.partition("/")[0] in said, said
        assert numbers(kb) == list(range(N))


# ---- the clock -------------------------------------------------------------------------------------------------------


SHIFT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int r = real(id, t);
  const char *s = getenv("SHIFT");
  if (id == CLOCK_REALTIME && s) t->tv_sec += atol(s);
  return r;
}
time_t time(time_t *p) { struct timespec t; clock_gettime(CLOCK_REALTIME, &t); if (p) *p = t.tv_sec; return t.tv_sec; }
int gettimeofday(struct timeval *v, void *z) {
  struct timespec t; clock_gettime(CLOCK_REALTIME, &t); v->tv_sec = t.tv_sec; v->tv_usec = t.tv_nsec / 1000; return 0;
}
"""

CLOCK = """
import json, os, sys, time
from ralm.app import cli
real = time.time()
for line in sys.stdin:
    shift, argv = json.loads(line)
    os.environ["SHIFT"] = str(shift)
    assert abs(time.time() - real - shift) < 3000
    assert cli.main(argv) == 0
    sys.stdout.flush()
"""


def test_a_clock_that_goes_back(base, more, tmp_path):
    """Programs whose clocks are days apart, in either direction, write one after the other."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the clock of a program is moved by a small library put before the system's")
    (tmp_path / "shift.c").write_text(SHIFT)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "shift.so", tmp_path / "shift.c", "-ldl"], check=True)
    kb = shutil.copytree(base, tmp_path / "kb")

    child = subprocess.Popen([sys.executable, "-c", CLOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"LD_PRELOAD": str(tmp_path / "shift.so")})

    def at(shift: int, *argv) -> dict:
        child.stdin.write(json.dumps([shift, [*map(str, argv), "--json", "--quiet"]]) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())

    day = 86_400
    at(2 * day, "remove", kb, "--where", "number < 100")
    assert numbers(kb) == list(range(100, N))
    at(-3 * day, "add", kb, more)
    assert numbers(kb) == list(range(100, 2 * N))
    reader = Datastore.open(kb)
    at(-3 * day, "compact", kb)
    assert len(list(reader.documents())) == 2 * N - 100  # nothing was taken from under it
    told = at(0, "history", kb)["versions"]
    assert [v["version"] for v in told] == list(range(1, Datastore.open(kb).version + 1))
    assert len(Datastore.open(kb, version=2)) == N and numbers(kb) == list(range(100, 2 * N))
    at(-day, "compact", kb, "--purge")
    assert numbers(kb) == list(range(100, 2 * N))
    assert not [f for f in kb.rglob("*") if f.is_file() and f'"{7}"'.encode() in f.read_bytes()]
    assert at(0, "search", kb, text(N + 5), "-k", "1", "--retriever", "bm25")["hits"][0]["document"] == f"d{N + 5}"
    child.stdin.close()
    assert child.wait(60) == 0


# ---- files that change, datastores that move -------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["cut", "grow", "replace", "gone", "garbage"])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch, suffix, change):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"a.{suffix}"
    texts = [f"row {i} " + os.urandom(300).hex() for i in range(20_000)]
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1000)
    elif suffix == "csv":
        path.write_text("text\n" + "\n".join(texts))
    else:
        data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
        path.write_bytes(gzip.compress(data, 1) if suffix.endswith("gz") else data)
    skipped, notes = [], []
    monkeypatch.setattr("ralm.progress.note", notes.append)
    source = read(path, skipped=skipped)
    got = [next(source).text for _ in range(100)]
    size = path.stat().st_size
    if change == "cut":
        os.truncate(path, size // 2)
    elif change == "grow":
        with path.open("ab") as f:
            f.write(b"\0" * 1000)
    elif change == "replace":
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(path)
    elif change == "gone":
        path.unlink()
    else:
        with path.open("r+b") as f:
            f.seek(size // 2)
            f.write(os.urandom(size // 4))
    got += [d.text for d in source]
    places = {t: i for i, t in enumerate(texts)}
    order = [places[t] for t in got if t in places]
    assert order == sorted(set(order)) and order[:100] == list(range(100))  # each text at most once, in order
    if change != "gone":
        assert any("changed while it was read" in n for n in notes)
    if change in ("replace", "gone"):
        assert got == texts and not skipped  # the file that was opened is still there
    assert all("\n" not in reason for _, reason in skipped)


def test_a_datastore_that_is_copied_or_moved(base, table, tmp_path, monkeypatch):
    first = Path(shutil.copytree(base, tmp_path / "first"))
    answers = [retriever(s, Datastore.open(base)).search([text(7), "w1 w2"], 20) for s in ("bm25", "dense")]
    second = first.rename(tmp_path / "other name ü")
    monkeypatch.chdir(second.parent)
    for path in (second, Path(second.name), Path(".") / second.name):
        store = Datastore.open(path)
        for spec, want in zip(("bm25", "dense"), answers):
            hits = retriever(spec, store).search([text(7), "w1 w2"], 20)
            assert (hits.ids == want.ids).all() and (hits.scores == want.scores).all()
    copy = Datastore.open(shutil.copytree(second, tmp_path / "copy"))
    copy.add(documents(N, N + 5))
    copy.remove(["d0"])
    assert len(BM25(copy).search(["w1"], N).ids) and numbers(copy.path) == list(range(1, N + 5))
    assert numbers(second) == list(range(N))
    held = Datastore.open(second)
    second.rename(tmp_path / "gone")
    for ask in (held.refresh, lambda: list(held.documents()), lambda: held.add(documents(0, 1)), lambda: BM25(held)):
        with pytest.raises(RalmError) as e:
            ask()
        assert isinstance(e.value, StoreError) and "\n" not in str(e.value)
    assert numbers(tmp_path / "gone") == list(range(N))
