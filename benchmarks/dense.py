"""Dense retrieval measured: `python benchmarks/dense.py encoders|kinds|squad [--rows N]`.

encoders   passages/s of minilm, minilm-int8 and static on docstrings of the standard library (wall and cpu seconds)
kinds      queries/s and recall@10 of flat, hnsw, ivf, ivfpq through Dense, and of FAISS alone at the same setting, one process,
           one run: the ratio is what the library costs. Texts are docstrings and comments of every installed package.
squad      success@1, @5, @20 of retrievers: questions of SQuAD v1.1 dev to their own paragraph among those of dev and train
           (1,602; --data, default ../shared/data). MiniLM was trained on SQuAD's training questions among much else, ours were not.
Figures move with the machine and its load; compare those of one run."""

import argparse
import ast
import json
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ralm.index import ann, exact
from ralm.index.dense import Dense
from ralm.index.encode import encoder
from ralm.index.hybrid import Hybrid
from ralm.types import Document
from ralm.what.datastore import Datastore


@contextmanager
def clock(out: dict):
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    out["wall"], out["cpu"] = time.perf_counter() - wall, time.process_time() - cpu


def docstrings(n: int) -> list[str]:
    """Up to n distinct paragraphs of 12 words or more from the docstrings of all installed Python files."""
    found: dict[str, None] = {}
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for file in sorted(Path(root).rglob("*.py")):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    for text in (ast.get_docstring(node) or "").split("\n\n"):
                        if len(text.split()) >= 12:
                            found[" ".join(text.split())] = None
            if len(found) >= n:
                return list(found)[:n]
    return list(found)


def encoders(rows: int) -> None:
    texts = docstrings(rows)
    print(f"{len(texts)} passages, {np.mean([len(t.split()) for t in texts]):.0f} words each")
    for spec in ("static", "minilm", "minilm-int8"):
        model, t = encoder(spec), {}
        model.encode(texts[:8])
        with clock(t):
            model.encode(texts)
        print(f"{spec:8} {len(texts) / t['wall']:8.0f} passages/s   {len(texts) / t['cpu']:8.0f} per cpu second")


def kinds(rows: int) -> None:
    texts = docstrings(rows + 500)
    texts, held = texts[:-500], texts[-500:]
    queries = [" ".join(t.split()[:9]) for t in held]
    with tempfile.TemporaryDirectory() as folder:
        store = Datastore.build(Path(folder) / "kb", (Document(str(i), t) for i, t in enumerate(texts)), split="none")
        flat, t = Dense(store, "static", index="flat"), {}
        leaf = flat._opened().leaves[0]
        q_QD = leaf.encode(queries)
        truth = flat.nearest(q_QD, 10).ids
        print(f"{len(leaf.rows)} vectors of {leaf.rows.dim}, {len(queries)} queries, k = 10; q/s one by one and in one batch")
        for kind in ("flat", "hnsw", "ivf", "ivfpq"):
            with clock(t):
                found = Dense(store, index=kind)
            leaf = found._opened().leaves[0]
            ours = [speed(lambda q, found=found: found.nearest(q, 10).ids, q_QD, size) for size in (1, len(q_QD))]
            theirs = [speed(alone(leaf, kind), q_QD, size) for size in (1, len(q_QD))]
            recall = [np.mean([np.isin(a, b).mean() for a, b in zip(truth, r[1])]) for r in (ours[1], theirs[1])]
            effort = leaf.near.effort if leaf.near else "-"
            print(f"{kind:6} effort {effort!s:>4}  made in {t['cpu']:6.1f} cpu s  ralm {ours[0][0]:7.0f} {ours[1][0]:7.0f} "
                  f"recall {recall[0]:.3f}   FAISS alone {theirs[0][0]:7.0f} {theirs[1][0]:7.0f} recall {recall[1]:.3f}   "
                  f"ratio {ours[0][0] / theirs[0][0]:.2f} {ours[1][0] / theirs[1][0]:.2f}")


def alone(leaf, kind):
    """The same search by FAISS alone: its own flat index, or the index that was made, without re-ranking and look-up of ids."""
    import faiss

    if kind == "flat":
        index = faiss.IndexFlatIP(leaf.rows.dim)
        index.add(leaf.rows.take(np.arange(len(leaf.rows))).astype(np.float32))
        return lambda q: index.search(q, 10)[1]
    index, n = leaf.near.index, leaf.near.effort
    if kind == "hnsw":
        return lambda q: index.search(q, 10, params=faiss.SearchParametersHNSW(efSearch=n))[1]
    k = 10 * ann.FACTOR if kind == "ivfpq" else 10

    def search(q):
        rows = index.search(q, k, params=faiss.SearchParametersIVF(nprobe=n))[1]
        return rows if kind == "ivf" else exact.score(leaf.rows, q, rows, 10)[0]  # re-ranked too: recall is compared as well

    return search


def speed(search, q_QD, size: int) -> tuple[float, np.ndarray]:
    search(q_QD[:size])
    start = time.perf_counter()
    found = [search(q_QD[i:i + size]) for i in range(0, len(q_QD), size)]
    return len(q_QD) / (time.perf_counter() - start), np.concatenate(found)


def squad(data: Path) -> None:
    import zstandard

    documents, asked = [], []
    for split in ("dev", "train"):
        with zstandard.open(data / "qa" / f"squad-v1.1.{split}.json.zst", "rt", encoding="utf-8") as file:
            for article in json.load(file)["data"]:
                for paragraph in article["paragraphs"]:
                    if split == "dev":
                        asked += [(q["question"], str(len(documents))) for q in paragraph["qas"]]
                    documents.append(Document(str(len(documents)), paragraph["context"], article["title"].replace("_", " ")))
    with tempfile.TemporaryDirectory() as folder:
        store = Datastore.build(Path(folder) / "kb", documents, split="none")
        gold = dict(zip(store.document_ids(store.chunk_ids().tolist()), store.chunk_ids().tolist()))
        right = np.array([gold[d] for _, d in asked])[:, None]
        static, minilm, int8 = (Dense(store, name, name=name) for name in ("static", "minilm", "minilm-int8"))
        print(f"{len(asked)} questions, {store.n_chunks} paragraphs; seconds are wall, cpu for all questions in one batch")
        for name, found in {
            "bm25": Hybrid(store, "bm25"), "dense static": static, "dense minilm": minilm, "dense minilm-int8": int8,
            "hybrid bm25 + static, rrf": Hybrid(store, ["bm25", static], fusion="rrf"),
            "hybrid bm25 + static, score": Hybrid(store, ["bm25", static], fusion="score"),
            "hybrid bm25 + minilm, rrf": Hybrid(store, ["bm25", minilm], fusion="rrf"),
            "hybrid bm25 + minilm, score": Hybrid(store, ["bm25", minilm], fusion="score"),
            "hybrid bm25 + minilm-int8, score": Hybrid(store, ["bm25", int8], fusion="score"),
            "bm25, minilm re-ranks 20": Hybrid(store, "bm25", depth=20, rerank="minilm"),
            "bm25, minilm re-ranks 50": Hybrid(store, "bm25", depth=50, rerank="minilm"),
            "bm25, minilm re-ranks 20, blend 1": Hybrid(store, "bm25", depth=20, rerank="minilm", blend=1),
            "bm25, minilm re-ranks 50, blend 1": Hybrid(store, "bm25", depth=50, rerank="minilm", blend=1),
            "bm25 + static, minilm re-ranks 20": Hybrid(store, ["bm25", static], depth=20, rerank="minilm"),
            "bm25 + static, minilm re-ranks 50": Hybrid(store, ["bm25", static], depth=50, rerank="minilm"),
        }.items():
            t = {}
            with clock(t):
                place = found.search([q for q, _ in asked], 20).ids == right
            print(f"{name:36}" + "".join(f" @{k} {place[:, :k].any(1).mean():.3f}" for k in (1, 5, 20))
                  + f"   {t['wall']:.1f} s, {t['cpu']:.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encoders", "kinds", "squad"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    given = parser.parse_args()
    if given.what == "squad":
        squad(given.data)
    else:
        {"encoders": encoders, "kinds": kinds}[given.what](given.rows or {"encoders": 1000, "kinds": 50_000}[given.what])
