"""Reads generated inputs one by one and stores what they give: `python read_child.py FOLDER FIRST STOP`.

One line of JSON for every input that broke a promise: an exception that is not ours, more than SECONDS (for each 100,000
documents), an open for writing outside the store, a document that cannot be stored as it is. The last line says how many there
were, how many documents, and the peak of memory. It runs in a process of its own so that a crash of a parser, or the kernel's
limit on memory, is seen and takes nothing along."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import inputs

from ralm import progress
from ralm.errors import RalmError
from ralm.what.datastore import Datastore
from ralm.what.read import read

SECONDS = 10
MEGABYTES = 1500  # that one input may take: five times the largest text that is read
BATCH = 250  # inputs between two commits to the store
PASSWD = "root:x:0:0"  # of a file that no input may bring in
OURS: list[str] = []  # folders in which writing is allowed
WROTE: list[str] = []
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.rmdir", "os.truncate"}


def watch(event: str, args: tuple) -> None:
    """Every path that Python is asked to write to."""
    if not args or not isinstance(args[0], str | bytes):
        return
    if event in CHANGES or (event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        path = os.fsdecode(args[0])
    else:
        return
    if not os.path.abspath(path).startswith(tuple(OURS)) and path != os.devnull and "__pycache__" not in path:
        WROTE.append(f"{event} {path}")


class Late(BaseException):
    """Not an Exception: nobody below may swallow it."""


def late(signum, frame):
    raise Late("processor" if signum == signal.SIGPROF else "waiting")


def memory(name: str) -> int:
    """MB of this process now (VmRSS), or at the most since `fresh` (VmHWM)."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) >> 10


def fresh() -> int:
    """Forget the peak; MB now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


class Seen(progress.Silent):
    """Whether something was said."""

    notes = 0

    def note(self, text):
        Seen.notes += 1


def one(path: Path) -> tuple[list, int, list, str]:
    """(a few documents, how many there were, skipped, what went wrong) of one input."""
    skipped: list = []
    few, number = [], 0
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: another process on it is no fault of the file
    signal.alarm(30 * SECONDS)  # but nothing may wait for ever
    try:
        for d in read(path, skipped=skipped):
            number += 1
            if number % 100_000 == 0:  # 168 kB can be two million good rows: what gives documents all the time does not hang
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            if len(few) < 20 and len(d.text) < 1 << 20:
                few.append(d)
        return few, number, skipped, ""
    except RalmError as e:
        return few, number, [(str(path), str(e))], "" if "\n" not in str(e) else f"an error of several lines: {e}"
    except Late as e:
        return few, number, skipped, f"took more than {SECONDS} s ({e})"
    except BaseException:
        return few, number, skipped, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def main() -> None:
    folder, first, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGPROF, late)
    progress.use(Seen())
    files, kb = folder / "files", folder / "kb.ralm"
    files.mkdir(parents=True)
    OURS.extend([str(kb), str(folder / f".{kb.name}")])
    store = Datastore.create(kb, split="words:20")
    sys.addaudithook(watch)
    held, total, peak = [], 0, 0

    def say(seed: int, path: Path, what: str) -> None:
        print(json.dumps({"seed": seed, "input": path.name, "what": what}), flush=True)

    for seed in range(first, stop):
        OURS.append(str(files))
        path = inputs.make(files, seed)
        OURS.remove(str(files))
        Seen.notes, before = 0, fresh()
        WROTE.clear()
        documents, number, skipped, wrong = one(path)
        grew = memory("VmHWM") - before
        peak = max(peak, grew)
        if wrong:
            say(seed, path, wrong)
        if WROTE:
            say(seed, path, f"wrote outside the store: {WROTE[:3]}")
        if grew > MEGABYTES:
            say(seed, path, f"took {grew} MB")
        if not number and not skipped and not Seen.notes:
            say(seed, path, "gave nothing, and nothing was said")
        if any(PASSWD in d.text for d in documents):
            say(seed, path, "holds the text of a file outside of it")
        if any("\n" in r or not r for _, r in skipped):
            say(seed, path, f"a reason of several lines: {skipped}")
        total += number
        held += documents
        if seed + 1 == stop or (seed - first) % BATCH == BATCH - 1:
            WROTE.clear()
            try:
                store.add(held)
                for d in list({d.id: d for d in held}.values())[:5]:
                    if store.document(d.id).text.replace("\ufffd", "") != d.text.replace("\ufffd", ""):
                        say(seed, path, f"document {d.id!r} is stored as something else")
            except BaseException:
                say(seed, path, "storing: " + traceback.format_exc())
            if WROTE:
                say(seed, path, f"storing wrote outside the store: {WROTE[:3]}")
            held = []
            OURS.append(str(files))
            shutil.rmtree(files, ignore_errors=True)
            files.mkdir(exist_ok=True)
            OURS.remove(str(files))
    from ralm.index.sparse import BM25

    BM25(store).search(["the granite lighthouse"], 3)
    print(json.dumps({"inputs": stop - first, "documents": total, "wrong": len(store.verify()), "most_mb": peak}), flush=True)


if __name__ == "__main__":
    main()
