"""A writer that the crash tests kill: `python crash_child.py STORE add|remove|compact|purge [STEP]`.

Says `ready` when everything is imported, begins on a line of input, and says how far it has got after each commit.
STEP kills it from inside at the STEP-th call into the tables: before a write, between two writes, after one."""

import os
import signal
import sys
from pathlib import Path

from ralm.types import Document
from ralm.what import tables
from ralm.what.datastore import Datastore

DOCUMENTS, BATCH = 60, 5


def document(i: int) -> Document:
    return Document(f"d{i}", f"secret{i}zz and some words more " * 12, title=f"T{i}", metadata={"number": i})


def documents(say):
    for i in range(DOCUMENTS):
        if i % BATCH == 0:
            say(i)  # asked for the next batch: those before it are committed
        yield document(i)


def die_at(step: int) -> None:
    calls = 0

    def watched(call):
        def inner(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return inner

    for name in ("append", "upsert", "delete", "mark", "merge_files", "forget", "save"):
        setattr(tables, name, watched(getattr(tables, name)))


def main() -> None:
    path, action = Path(sys.argv[1]), sys.argv[2]
    out = os.fdopen(1, "wb", buffering=0)

    def say(what) -> None:
        out.write(f"{what}\n".encode())

    if len(sys.argv) > 3:
        die_at(int(sys.argv[3]))
    say("ready")
    sys.stdin.readline()
    if action == "add":
        Datastore.build(path, documents(say), split="words:10", batch=BATCH)
    elif action == "remove":
        store = Datastore.open(path)
        for i in range(0, DOCUMENTS, 4):
            store.remove([f"d{i}", f"d{i + 1}"])
            say(i + 4)
    else:
        Datastore.open(path).compact(purge=action == "purge")
    say("done")


if __name__ == "__main__":
    main()
