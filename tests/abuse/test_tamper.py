"""Every file of a datastore flipped, cut and taken away: what is served is what was written, or an error names the file and the
way out; doctor finds all of it; one command brings a derived part back."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from ralm.app import cli
from ralm.app.doctor import examine
from ralm.errors import RalmError, StoreError
from ralm.index import retriever
from ralm.types import Document
from ralm.what import sums
from ralm.what.datastore import Datastore

WORDS = [f"w{i}" for i in range(300)]
HARMS = ("flip", "cut", "gone")
HARMLESS = ("write.lock", "latest_version_hint.json")  # nothing is read from them


@pytest.fixture(scope="module")
def base(tmp_path_factory, table) -> Path:
    """Several versions, an update, a removal, a filter column of each type; a sparse index, dense ones without and with a graph."""
    r = random.Random(3)

    def documents(first: int, stop: int) -> list[Document]:
        return [Document(f"d{i}", " ".join(r.choices(WORDS, k=60)), title=f"T{i}", metadata={
            "year": 1990 + i % 30, "lang": r.choice(["en", "de"]), "odd": i % 2 == 1, "score": i / 3}) for i in range(first, stop)]

    store = Datastore.build(tmp_path_factory.mktemp("base") / "kb", documents(0, 60), split="words:10")
    store.add(documents(60, 90))
    store.add([Document("d3", "w1 w2 another text", metadata={"year": 2000})])
    store.remove(["d5", "d65"])
    retriever("bm25", store), retriever(f"dense:{table}", store), retriever(f"dense:{table},name=near,index=hnsw", store)
    return store.path


def answers(path: Path) -> list:
    """Documents, chunks, what the indexes find with and without filters, an earlier version, and the history."""
    store = Datastore.open(path)
    out: list = [[(d.id, d.text, d.title, d.source, d.date, dict(d.metadata)) for d in store.documents()]]
    out.append([(c.id, c.document, c.start, c.end, c.text, c.title) for c in store.chunks(store.chunk_ids())])
    for spec in ("bm25", "dense", "dense:name=near"):
        found = retriever(spec, store)
        for where in (None, "year > 2005 and lang = 'en'", "odd and score < 20"):
            hits = found.search(WORDS[:30], 10, where=where)
            out.append((hits.ids.tolist(), hits.scores.tolist()))
    out.append([store.has("d7"), store.has("d5"), store.document("d7").text, len(Datastore.open(path, version=2))])
    return [*out, [(v.version, v.action, v.documents, v.total) for v in store.history()]]


def harmed(base: Path, folder: Path, file: Path, harm: str, r: random.Random) -> Path:
    path = Path(shutil.copytree(base, folder))
    raw = bytearray((path / file).read_bytes())
    if harm == "gone":
        (path / file).unlink()
    elif harm == "cut":
        (path / file).write_bytes(raw[:r.randrange(len(raw))])
    else:
        raw[r.randrange(len(raw))] ^= 1 << r.randrange(8)
        (path / file).write_bytes(raw)
    return path


def look(path: Path, file: Path, harm: str, good: list) -> tuple[str, list[str]]:
    """What a user of the harmed datastore meets ("same" or the error), and what doctor says."""
    problems: list[str] = []
    try:
        examine(path, problems)
    except StoreError as e:
        problems.append(str(e))
    try:
        found = answers(path)
    except RalmError as e:
        said = str(e)
        assert "\n" not in said and (file.name in said or str(file.parent) in said or str(file.parts[0]) in said), said
        assert re.search(r"restore|ralm index|ralm build|build the datastore", said), said
        return said, problems
    if harm == "gone" and file.parent.name == "_transactions":
        assert found[:-1] == good[:-1]  # the log of what was done is gone, what it did is not
    else:
        assert found == good, f"{file} {harm}: something else is served, and nothing is said"
    return "same", problems


def derived(path: Path, said: str, good: list, encoder: str) -> None:
    """The command that an error about an index names makes it anew."""
    command = shlex.split(re.search(r"ralm (index .* --rebuild)", said)[1])
    if command[3] == "dense":  # its manifest is gone: only the user knows the encoder
        command[3] = f"dense:{encoder}"
    assert cli.main([*command, "--quiet"]) == 0
    assert answers(path)[:8] == good[:8]  # and the other indexes are as they were; the graph may be another one


def walk(base: Path, folder: Path, cases: list[tuple[Path, str]], seed: int, encoder: str) -> dict[str, int]:
    good, r, count = answers(base), random.Random(seed), dict.fromkeys(("told", "same", "rebuilt"), 0)
    for n, (file, harm) in enumerate(cases):
        path = harmed(base, folder / str(n), file, harm, r)
        said, problems = look(path, file, harm, good)
        count["same" if said == "same" else "told"] += 1
        optional = file.name in (*HARMLESS, sums.NAME) or (file.name == "manifest.json" and harm == "gone") or (
            harm == "gone" and file.parent.name in ("_versions", "_transactions", "_deletions", "data"))  # of older versions
        assert problems or said == "same", f"{file} {harm}: {said}; doctor says nothing"
        assert problems or optional, f"{file} {harm}: doctor says nothing"
        if said != "same" and file.parts[0] == "index":
            derived(path, said, good, encoder)
            count["rebuilt"] += 1
        shutil.rmtree(path)
    return count


def files(base: Path) -> list[Path]:
    return sorted(p.relative_to(base) for p in base.rglob("*") if p.is_file() and p.stat().st_size)


def test_some_files_of_a_store_harmed(base, table, tmp_path):
    r = random.Random(1)
    kinds: dict[tuple, list] = {}
    for f in files(base):
        kinds.setdefault((f.parts[0], f.parent.name if f.parts[0] != "index" else f.name, f.suffix), []).append(f)
    index = [k for k in kinds if k[0] == "index"]
    chosen = r.sample(index, 4) + r.sample([k for k in kinds if k[0] != "index"], 8)
    count = walk(base, tmp_path, [(r.choice(kinds[k]), r.choice(HARMS)) for k in chosen], 1, table)
    assert count["told"] > 4 and count["rebuilt"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARMS)
def test_every_file_of_a_store_harmed(base, table, tmp_path, harm):
    some = files(base)
    count = walk(base, tmp_path, [(f, harm) for f in some for _ in range(3 if harm == "flip" else 1)], 2, table)
    print(harm, len(some), "files", count)
    assert count["rebuilt"] > 10


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_sums_are_those_of_sha256sum_and_follow_every_change(base, tmp_path):
    store = Datastore.open(shutil.copytree(base, tmp_path / "kb"))

    def complete() -> bool:
        listed = sums.listed(store.path)
        there = {f for t in ("documents", "texts", "chunks") for f in sums.files(store.path, t)}
        return there <= set(listed) and all(sums.sha256(store.path / f) == listed[f] for f in there)

    assert complete()
    for change in (lambda: store.add([Document("new", "w1")]), lambda: store.remove(["new"]), store.compact,
                   lambda: store.compact(purge=True)):
        change()
        assert complete() and len(Datastore.open(store.path)) == len(store)
    (store.path / sums.NAME).unlink()  # an older datastore has none
    assert len(Datastore.open(store.path)) == 88
    store.add([Document("newer", "w1")])
    assert complete()


def test_half_a_line_of_a_killed_writer(base, tmp_path):
    path = Path(shutil.copytree(base, tmp_path / "kb"))
    with (path / sums.NAME).open("ab") as f:
        f.write(b"0123456789abcdef")
    store = Datastore.open(path)
    assert store.add([Document("new", "w1")]).documents == 1 and len(Datastore.open(path)) == 89
    (path / sums.NAME).write_text("what is this\n")
    with pytest.raises(StoreError, match=r"sums.txt is damaged \(line 1\).*rm .*sums.txt && ralm compact"):
        Datastore.open(path)


def test_a_version_that_is_gone_is_missed_by_history(base, tmp_path):
    path = Path(shutil.copytree(base, tmp_path / "kb"))
    sorted((path / "documents.lance" / "_versions").glob("*.manifest"))[1].unlink()  # the newest but one
    store = Datastore.open(path)
    with pytest.raises(StoreError, match=f"lost version {store.version - 1}"):
        store.history()


def test_a_checksum_under_another_name_is_none(base, tmp_path):
    path = Path(shutil.copytree(base, tmp_path / "kb"))
    file = path / "store.json"
    file.write_text(file.read_text().replace('"sum"', '"sue"'))
    with pytest.raises(StoreError, match="nobody writes a 'sue'"):
        Datastore.open(path)


def test_a_newest_version_that_is_gone_is_not_an_older_datastore(base, tmp_path):
    """Lance alone would take the version before it for the newest one: documents would be back that were removed."""
    path = Path(shutil.copytree(base, tmp_path / "kb"))
    newest = min((path / "documents.lance" / "_versions").glob("*.manifest"))
    newest.unlink()
    with pytest.raises(StoreError, match=f"{newest.name} is missing"):
        Datastore.open(path)


def test_large_files_are_read_once_a_machine(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "LARGE", 1)
    monkeypatch.setattr(sums, "SETTLED", -10**18)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, read = Path(shutil.copytree(base, tmp_path / "kb")), []
    sha256 = sums.sha256
    monkeypatch.setattr(sums, "sha256", lambda file, *a: read.append(file) or sha256(file, *a))
    good = answers(path)
    assert len(read) > 20
    for _ in range(2):  # as another process would begin
        monkeypatch.setattr(sums, "_seen", {})
        read.clear()
        assert answers(path) == good and not read
    for kept in (tmp_path / "cache").rglob("*.json"):
        kept.write_text("[1]")
    monkeypatch.setattr(sums, "_seen", {})
    assert answers(path) == good and len(read) > 20


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_tells_a_wrong_chunk_and_a_wrong_column(base, tmp_path, capsys):
    """Files whose checksums are right, and whose contents are not: a writer with a fault."""
    import lance
    import pyarrow as pa

    path = Path(shutil.copytree(base, tmp_path / "kb"))
    chunks = lance.dataset(str(path / "chunks.lance"))
    rows = chunks.to_table().to_pydict()
    rows["end"][7] = 10**6
    rows["start"][9] -= 1
    lance.write_dataset(pa.table(rows, schema=chunks.schema), str(path / "chunks.lance"), mode="overwrite")
    lance.dataset(str(path / "documents.lance")).update({"year": "3000"}, where="id = 'd10'")
    lance.dataset(str(path / "documents.lance")).update({"sha256": "'0'"}, where="id = 'd11'")
    assert cli.main(["doctor", str(path), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    said = "\n".join(problems)
    assert all(w in said for w in ("chunk 7 says", "chunk 9 says", "'year'", "document 'd11' is not what was added"))
    assert len(problems) == 4
    assert all("ralm add" in p or "ralm index" in p for p in problems)


def test_doctor_tells_an_index_that_lacks_chunks(base, tmp_path):
    from ralm.index import manifest

    path = Path(shutil.copytree(base, tmp_path / "kb"))
    folder = path / "index" / "dense"
    now = manifest.load(folder)
    part = next(p for p in now.parts if "ids.npy" in p.files)
    ids = np.load(folder / part.name / "ids.npy")
    ids[-1] += 1  # a chunk that was never cut
    np.save(folder / part.name / "ids.npy", ids)
    sealed = manifest.seal(folder / part.name, part.first, part.stop + 1, part.rows)
    manifest.commit(folder, manifest.Manifest(**{**vars(now), "parts": tuple(sealed if p is part else p for p in now.parts)}))
    problems: list[str] = []
    examine(path, problems)
    assert len(problems) == 1 and "lacks 1 chunks" in problems[0] and "--rebuild" in problems[0]
