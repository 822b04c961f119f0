"""Every command that writes, killed with SIGKILL at random moments of its run: what was committed is there, nothing else is
seen, the same command run again completes, and the indexes give what they give on a datastore made at once."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ralm.app.doctor import examine
from ralm.errors import StoreError
from ralm.index import built, retriever
from ralm.what.datastore import Datastore

BATCH = 50
HELD = 500  # documents of the base, numbers 0 to HELD
MORE = 400  # documents added, numbers HELD to HELD + MORE; and every tenth of the base with another text
QUERIES = ["w1 w2 w3", "w7 w7 w150", "w41", "w9 w200 w77 w6 w118", "w250 w251"]


def text(i: int, edition: int = 0) -> str:
    r = random.Random(i * 7 + edition)
    return f"secret{i}x{edition}z " + " ".join(f"w{int(300 * r.random() ** 2)}" for _ in range(30))


def rows(path: Path, numbers, edition: int = 0) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": text(i, edition), "number": i}) + "\n" for i in numbers))
    return path


class Zygote:
    """The process that forks commands."""

    def __init__(self, folder: Path):
        self.said = folder / "said"
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("kill_child.py"))], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *argv, seconds: float | None = None) -> tuple[int, int]:
        """(wait status, documents it said it had committed) of a command that is killed after so many seconds."""
        self.said.write_bytes(b"")
        job = {"argv": [str(a) for a in argv], "batch": BATCH, "said": str(self.said)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it had ended
                pass
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), f"{argv} ended with {status}"
        return status, int(self.said.read_bytes() or 0)

    def length(self, *argv) -> float:
        """Seconds of an undisturbed run."""
        began = time.perf_counter()
        assert self.run(*argv)[0] == 0
        return time.perf_counter() - began


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    z = Zygote(tmp_path_factory.mktemp("zygote"))
    yield z
    z.process.stdin.close()
    assert z.process.wait(60) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    rows(folder / "held.jsonl", range(HELD))
    (folder / "more").mkdir()
    rows(folder / "more" / "a.jsonl", range(HELD, HELD + MORE))
    rows(folder / "more" / "b.jsonl", range(0, HELD, 10), 1)
    return folder


@pytest.fixture(scope="module")
def base(zygote, files, table, tmp_path_factory) -> Path:
    """HELD documents and both indexes."""
    path = tmp_path_factory.mktemp("base") / "kb"
    zygote.length("build", path, files / "held.jsonl", "--index", f"bm25,dense:{table}", "--split", "words:20")
    return path


def after(command: str) -> dict[str, str]:
    """What the datastore holds when the command has been done: id -> text."""
    out = {f"d{i}": text(i) for i in range(HELD)}
    if command == "add":
        out |= {f"d{i}": text(i) for i in range(HELD, HELD + MORE)} | {f"d{i}": text(i, 1) for i in range(0, HELD, 10)}
    if command in ("remove", "compact", "purge"):
        out = {f"d{i}": text(i) for i in range(HELD // 2, HELD)}
    return out


def answers(store: Datastore) -> list:
    """What every index answers, by documents and places, since ids of chunks tell how often a writer was killed."""
    out = []
    for name in built(store):
        hits = retriever(name, store).search(QUERIES, 30)
        for ids, scores in zip(hits.ids, hits.scores):
            found = store.chunks(ids[ids >= 0].tolist())
            out.append([(c.document, c.start, c.end, float(s)) for c, s in zip(found, scores)])
    assert out and all(out)
    return sorted(map(_ties, out))


def _ties(row: list) -> list:
    """Equal scores in the order of ids of chunks, which updates and kills change: the last score's hits may be cut anywhere."""
    last = row[-1][3]
    return sorted((s, d, a, b) for d, a, b, s in row if s > last)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, table) -> dict[str, list]:
    """What a datastore made at once answers, by command."""
    from ralm.types import Document

    out = {}
    for command in ("build", "add", "remove"):
        path = tmp_path_factory.mktemp("fresh") / command
        store = Datastore.build(path, [Document(i, t) for i, t in after(command).items()], split="words:20")
        retriever("bm25", store), retriever(f"dense:{table}", store)
        out[command] = answers(store)
    return out | {"bm25": out["build"], "dense": out["build"], "compact": out["remove"], "purge": out["remove"]}


def held(path: Path) -> dict[str, str]:
    """What a reader finds now; sound in every byte, every chunk and every index."""
    problems: list[str] = []
    examine(path, problems)
    assert not problems, problems
    return {d.id: d.text for d in Datastore.open(path).documents()}


def argv(command: str, path: Path, files: Path, table: str) -> list:
    return {"build": ["build", path, files / "held.jsonl", "--index", f"bm25,dense:{table}", "--split", "words:20"],
            "add": ["add", path, files / "more"], "remove": ["remove", path, "--where", f"number < {HELD // 2}"],
            "bm25": ["index", path, "--index", "bm25", "--rebuild"],
            "dense": ["index", path, "--index", f"dense:{table}", "--rebuild"],
            "compact": ["compact", path], "purge": ["compact", path, "--purge"]}[command]


def prepared(command: str, base: Path, path: Path) -> None:
    """The datastore as it is before the command."""
    if command == "build":
        return
    shutil.copytree(base, path)
    if command in ("compact", "purge"):
        store = Datastore.open(path)
        store.remove(where=f"number < {HELD // 2}")


def promised(command: str, path: Path, committed: int, versions: int) -> None:
    """After a kill: every committed document, none that was not, and every earlier version unless it was being purged."""
    if not (path / "store.json").exists():
        assert command == "build" and not committed
        return
    now, before, end = held(path), after("bm25") if command not in ("compact", "purge") else after(command), after(command)
    if command == "build":
        assert len(now) >= committed and len(now) % BATCH == 0 and now == dict(list(end.items())[:len(now)])
    elif command == "add":
        new = [i for i in end if i not in before] + [i for i in before if end[i] != before[i]]  # in the order of the files
        done = [i for i in new if now.get(i) == end[i]]
        assert len(done) >= committed and done == new[:len(done)] and (len(done) % BATCH == 0 or done == new)
        assert now == before | {i: end[i] for i in done}
    else:
        assert now in (before, end)
    for version in range(1, versions + 1):
        try:
            old = Datastore.open(path, version=version)
        except StoreError:
            assert command == "purge"
        else:
            assert len(list(old.documents())) == len(old)


def kill(command: str, zygote, base: Path, files: Path, table: str, fresh: dict, folder: Path, seconds: float) -> bool:
    """One kill and what must hold after it; whether the command was caught running."""
    path = folder / "kb"
    prepared(command, base, path)
    versions = Datastore.open(path).version if path.exists() else 0
    status, committed = zygote.run(*argv(command, path, files, table), seconds=seconds)
    promised(command, path, committed, versions)
    if command == "remove" and held(path) == after("remove"):
        command = "compact"  # the kill came after the commit: there is nothing left to remove
    assert zygote.run(*argv(command, path, files, table))[0] == 0
    command = "remove" if command == "compact" else command
    assert held(path) == after(command)
    store = Datastore.open(path)
    if command == "add":
        zygote.run("compact", path)
        store.refresh()
    for name in ("bm25", f"dense:{table}"):  # a kill in `build` or `index --rebuild` may leave one of them to be made
        retriever(name, store)
    assert answers(store) == fresh[command]
    if command == "purge":
        assert not [f for f in path.rglob("*") if f.is_file() and b"secret3x0z" in f.read_bytes()]
    return status == signal.SIGKILL


COMMANDS = ["build", "add", "remove", "bm25", "dense", "compact", "purge"]


def kills(command, count, zygote, base, files, table, fresh, folder) -> int:
    (folder / "timed").mkdir()
    prepared(command, base, folder / "timed" / "kb")
    length = zygote.length(*argv(command, folder / "timed" / "kb", files, table))
    caught = 0
    for i in range(3 * count):  # where others use the machine too, a moment may come after the end: another one is drawn
        here = folder / str(i)
        here.mkdir()
        moment = random.uniform(i % count, i % count + 1) / count * length
        caught += kill(command, zygote, base, files, table, fresh, here, moment)
        shutil.rmtree(here)
        if caught >= count and i + 1 >= count:
            break
    return caught


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_twice(command, zygote, base, files, table, fresh, tmp_path):
    assert kills(command, 2, zygote, base, files, table, fresh, tmp_path) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_twenty_moments(command, zygote, base, files, table, fresh, tmp_path):
    assert kills(command, 20, zygote, base, files, table, fresh, tmp_path) == 20
