"""The three Lance tables of a datastore and the small file beside them: schemas, opening, commits, compaction.

    kb.ralm/
      store.json        id, split, format; what compaction must not forget (numbers already used, versions purged)
      documents.lance   one row per document of a version; its Lance version is the datastore's version
      texts.lance       one row per document revision ever added: rev -> id, title, source, text     (append-only)
      chunks.lance      one row per chunk ever cut: id -> rev, start, end                            (append-only)
      sums.txt          the checksum of every file of the tables (sums.py)
      write.lock        held by the one writer

Texts live apart from documents so that a version is a small table: removing or updating rewrites no text, and a chunk of
a document that a later version dropped can still be read by those who opened an earlier one. `rev` ties the three
together: it numbers document revisions, is never reused, and a chunk is alive in version v iff its rev is in documents@v.
A writer appends to texts and chunks first; the commit to documents is what makes them visible."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from ralm.errors import RalmError, StoreError
from ralm.what import sums

FORMAT = 1
NOTE = "ralm"  # the transaction property that says what a commit did
FRAGMENTS = 64  # more files than this in a table are merged at the end of an add,
MANY = 256  # more than this already during it
FILE, ROWS = 1 << 30, 1 << 20  # a file as large as this, or of so many rows, is not merged any further

DOCUMENTS = pa.schema([("id", pa.string()), ("rev", pa.uint64()), ("title", pa.string()), ("source", pa.string()),
                       ("licence", pa.string()), ("date", pa.string()), ("sha256", pa.string()), ("metadata", pa.large_string()),
                       ("_key", pa.uint64()), ("_chunks", pa.uint32())])  # _key: 8 bytes of a hash of id, for look-up
TEXTS = pa.schema([("rev", pa.uint64()), ("id", pa.string()), ("title", pa.string()), ("source", pa.string()),
                   ("text", pa.large_string())])
CHUNKS = pa.schema([("id", pa.uint64()), ("rev", pa.uint64()), ("start", pa.uint32()), ("end", pa.uint32())])
BOUNDS = ("next_rev", "next_chunk", "floor")  # smallest number not used yet (at least), oldest version that can be opened
SCHEMAS = {"documents": DOCUMENTS, "texts": TEXTS, "chunks": CHUNKS}


def table(path: Path, name: str, version: int | None = None):
    """The Lance dataset `name` of the store at `path`. Raises StoreError where it is missing or damaged."""
    import lance

    folder = path / f"{name}.lance"
    if not folder.is_dir():
        raise StoreError(f"{folder} is missing: {path} is damaged; restore that folder from a copy, or build the datastore again")
    sums.check(path, name, version)
    with guard(lambda e: damaged(folder, e)):
        return lance.dataset(str(folder), version=version)


@contextmanager
def guard(error: Callable[[BaseException], Exception]) -> Iterator[None]:
    """What Lance raises as an error of ours. Its panics are no Exception, and its panic messages are not for users."""
    try:
        yield
    except (RalmError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as e:
        raise error(e) from e


@contextmanager
def writing(dataset) -> Iterator[None]:
    """A commit and its checksums. A failed write is one line: a full disk, a folder without permission."""
    with guard(lambda e: StoreError(f"writing to {dataset.uri} failed ({reason(e)}); what was committed before stays: see to the "
                                    "cause (space, permissions) and run it again")):
        yield
        folder = Path(dataset.uri)
        sums.extend(folder.parent, folder.name.removesuffix(".lance"))


def damaged(folder: Path, error: BaseException) -> StoreError:
    return StoreError(f"{folder} cannot be read ({reason(error)}): restore it from a copy, or build the datastore again")


def reason(error: BaseException) -> str:
    """The part of a Lance message a person can use: without the place in Lance's own source."""
    text = " ".join(str(error).split())
    for mark in (", /home/", ", rust/", ", location:"):
        text = text.split(mark)[0]
    return text.removeprefix("Invalid user input: ").removeprefix("Schema error: ").removeprefix("LanceError(IO): ")[:300]


def empty(path: Path, name: str, columns: list[pa.Field], note: Mapping[str, Any]) -> None:
    import lance

    schema = pa.schema(list(SCHEMAS[name]) + columns)
    lance.write_dataset(schema.empty_table(), str(path / f"{name}.lance"), transaction_properties=properties(note))
    sums.extend(path, name)


def properties(note: Mapping[str, Any]) -> dict[str, str]:
    return {NOTE: json.dumps(note)}


def widen(dataset, fields: list[pa.Field]) -> None:
    """A version with these columns more, null everywhere."""
    with writing(dataset):
        dataset.add_columns(pa.schema(fields))


def append(dataset, rows: pa.Table, note: Mapping[str, Any] | None = None):
    """One transaction that adds rows; the dataset at its new version."""
    import lance

    with writing(dataset):
        return lance.write_dataset(rows, dataset, mode="append", transaction_properties=properties(note) if note else None)


def upsert(dataset, rows: pa.Table, note: Mapping[str, Any]):
    """One transaction that replaces the rows whose id is there and adds the others."""
    builder = dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    with writing(dataset):
        return _commit(dataset, builder.execute_uncommitted(rows)[0], note)


def delete(dataset, revs, note: Mapping[str, Any] | None = None):
    """One transaction without the rows of these revs. By join, not by predicate: a long IN list is slow, and is kept in the log."""
    rows = pa.table({"rev": pa.array(revs, pa.uint64())})
    with writing(dataset):
        return _commit(dataset, dataset.merge_insert("rev").when_matched_delete().execute_uncommitted(rows)[0], note)


def mark(dataset, note: Mapping[str, Any]):
    """A transaction that changes nothing but the history."""
    import lance

    operation = lance.LanceOperation.Append([])
    with writing(dataset):
        return _commit(dataset, lance.Transaction(dataset.version, operation), note)


def _commit(dataset, transaction, note: Mapping[str, Any] | None):
    import lance

    if note:
        transaction.transaction_properties = dict(transaction.transaction_properties or {}) | properties(note)
    return lance.LanceDataset.commit(dataset, transaction)


def small_files(dataset) -> int:
    """How many files `merge_files` would take for small."""
    target = _sizes(dataset)["target_rows_per_fragment"]
    return sum(f.physical_rows < target for f in dataset.get_fragments())


def _sizes(dataset) -> dict[str, int]:
    """How many rows a file should have. By bytes, not by rows alone: a table of long texts would otherwise be rewritten whole, time
    and again."""
    fragments = dataset.get_fragments()
    rows = sum(f.physical_rows for f in fragments)
    size = max(1, sum(file.file_size_bytes or 0 for f in fragments for file in f.data_files()))
    most = min(ROWS, 1 << max(0, (FILE * rows // size).bit_length() - 1))  # a power of two: it seldom changes
    return {"target_rows_per_fragment": most}


def merge_files(dataset) -> bool:
    """Rewrite small files and files with deleted rows into few; row order stays. Whether there was anything to do.

    Pages are copied as they are where no row was deleted: to decode and encode texts anew takes twenty times as long, and memory
    that grows with the table."""
    with writing(dataset):
        done = dataset.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0,
                                              compaction_mode="try_binary_copy", **_sizes(dataset))
    return done.fragments_removed > 0


def forget(dataset, everything: bool) -> None:
    """Delete files that only earlier versions need: all of them, or those more than an hour old (a reader may be at them)."""
    with writing(dataset):
        dataset.cleanup_old_versions(older_than=timedelta(0) if everything else timedelta(hours=1), delete_unverified=everything)


# ---- store.json ------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """store.json. Raises StoreError where there is no datastore, it is damaged, or of a newer format."""
    file = path / "store.json"
    if not file.is_file():
        what = "is no datastore (it has no store.json)" if path.exists() else "does not exist"
        raise StoreError(f"{path} {what}; build one with ralm build {path} FILES, or check the path")
    try:
        facts = sums.unsealed(json.loads(file.read_text(encoding="utf-8")))
        number = int(facts["format"])
        odd = facts.keys() - {"format", "id", "split", *BOUNDS}
        if odd and number <= FORMAT:  # a checksum under another name would be none
            raise ValueError(f"nobody writes a '{min(odd)}' there")
        if not all(isinstance(facts[k], str) for k in ("id", "split")) or not all(isinstance(facts[k], int) for k in BOUNDS):
            raise ValueError("a value has the wrong type")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise StoreError(f"{file} is damaged ({type(e).__name__}: {e}); restore it from a copy, or build it again") from e
    if number > FORMAT:
        raise StoreError(f"{path} has format {number}, this ralm reads up to {FORMAT}; install a newer ralm")
    return facts


def save(path: Path, facts: Mapping[str, Any]) -> None:
    """Replace store.json in one step."""
    temporary = path / f"store.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(sums.sealed(facts), f, indent=1, sort_keys=True)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path / "store.json")
