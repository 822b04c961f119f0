"""Runs commands of `ralm` in forks of itself, to be killed: `python kill_child.py`, one line of JSON in, two lines out for
each.

In: {"argv": [...], "batch": documents a transaction, "said": a file}. Out: the process id when the command begins, its wait
status when it has ended. The fork has everything imported, so what is killed is the command, not its imports. After every
commit it writes to `said` how many documents it has committed so far; segments of indexes are made small, so that there are
several commits to one."""

import json
import os
import sys

import ralm.app.cli
import ralm.app.indexes
import ralm.app.stores
import ralm.index.dense
import ralm.index.sparse
import ralm.what.split
import ralm.what.union  # noqa: F401
from ralm.app import cli
from ralm.index import grow, postings, vectors
from ralm.what import write
from ralm.what.datastore import Datastore

for name in ("lance", "lance.optimize", "model2vec", "tokenizers", "pyarrow.parquet"):
    __import__(name)


def work(job: dict) -> int:
    said, count = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 0
    commit = write.Writer._commit

    def told(self, rows, *rest):
        nonlocal count
        commit(self, rows, *rest)
        count += len(rows)
        os.pwrite(said, b"%8d" % count, 0)

    write.Writer._commit = told
    Datastore.add.__defaults__ = (job["batch"],)
    postings.FLUSH, grow.BATCH = 1500, 64
    vectors.UNIT, vectors.ROWS = 64, 128
    out = os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    return cli.main([*job["argv"], "--quiet"])


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            os._exit(work(job))
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
