"""What the tests of reading share: files made on the spot and a sink that hears all progress."""

import json
import zipfile

import pytest
import zstandard

from ralm import progress


class Heard(progress.Silent):
    def __init__(self):
        self.total, self.done, self.open, self.notes = [], 0.0, 0, []

    def start(self, stage, total, unit):
        self.total.append((stage, total, unit))
        self.open += 1
        return 0

    def advance(self, task, amount):
        assert amount >= 0
        self.done += amount

    def stop(self, task):
        self.open -= 1

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def heard():
    sink = Heard()
    progress.use(sink)
    yield sink
    progress.use(progress.Silent())


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def rows(n, start=0):
    return "".join(json.dumps({"id": str(i), "text": f"row number {i}"}) + "\n" for i in range(start, start + n)).encode()


def tree(root):
    for name in ("b.txt", "a.md", "sub/c.py", "sub/deep/README", ".hidden.txt", ".git/config.txt", "node_modules/x.js",
                 "__pycache__/y.txt"):
        put(root / name, f"text of {name}")
    for name in ("p.png", "q.png", "r.so", "weights.bin.gz", "LOCK"):
        put(root / name, b"\0\1")
    return root


def zst(data, frames=1):
    cut = max(1, len(data) // frames)
    return b"".join(zstandard.ZstdCompressor().compress(data[i:i + cut]) for i in range(0, len(data), cut))


def zipped(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


BEIR = {"corpus.jsonl": b'{"_id": "d1", "title": "T", "text": "body", "metadata": {"year": 3}}\n'
                        b'{"_id": "d2", "title": "", "text": "two"}\n',
        "queries.jsonl": b'{"_id": "q1", "text": "a query"}\n', "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq1\td1\t1\n"}
