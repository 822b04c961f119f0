"""Dense retrieval measured: `python benchmarks/dense.py encoders|kinds|alive|exact|squad [--rows N]`.

encoders   passages/s of minilm, minilm-int8 and static on docstrings of the standard library (wall and cpu seconds)
kinds      queries/s and recall@10 of flat, hnsw, ivf, ivfpq through Dense, and of FAISS alone at the same setting, one process,
           one run: the ratio is what the library costs. Texts are docstrings and comments of every installed package.
alive      the alive filter's cost: HNSW through Dense after 1 % of the documents were removed against FAISS alone on the same
           index at the same ef, one by one and batched, in turns; processor seconds, one thread
exact      exact search of a million vectors of 384 dimensions (means of MiniLM's word vectors of docstrings, repeated with noise
           of a twentieth of their length) in batches of 256, against FAISS IndexFlatIP and torch's matmul and topk; as above
squad      success@1, @5, @20 of retrievers: questions of SQuAD v1.1 dev to their own paragraph among those of dev and train
           (1,602; --data, default ../shared/data). MiniLM was trained on SQuAD's training questions among much else, ours were not.
Figures move with the machine and its load; compare those of one run."""

import argparse
import json
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from docstrings import by_file

from ralm.index import ann, exact, vectors
from ralm.index.dense import Dense
from ralm.index.encode import encoder
from ralm.index.hybrid import Hybrid
from ralm.index.static import unit
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
    for texts in by_file():
        for text in (paragraph for t in texts for paragraph in t.split("\n\n")):
            if len(text.split()) >= 12:
                found[" ".join(text.split())] = None
        if len(found) >= n:
            break
    return list(found)[:n]


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


def alive(rows: int) -> None:
    import faiss

    faiss.omp_set_num_threads(1)
    texts = docstrings(rows + 1000)
    texts, held = texts[:-1000], texts[-1000:]
    with tempfile.TemporaryDirectory() as folder:
        store = Datastore.build(Path(folder) / "kb", (Document(str(i), t) for i, t in enumerate(texts)), split="none")
        found = Dense(store, "static", index="hnsw")
        store.remove([str(i) for i in range(0, len(texts), 100)])
        leaf = found._opened().leaves[0]
        q_QD, faiss_alone = leaf.encode([" ".join(t.split()[:10]) for t in held]), alone(leaf, "hnsw")
        truth, ours = Dense(store, index="flat").nearest(q_QD, 10).ids, found.nearest(q_QD, 10).ids
        print(f"{len(leaf.rows)} vectors of {leaf.rows.dim}, {len(leaf.rows) - len(store)} removed, ef {leaf.near.effort}, "
              f"recall@10 when made {found.recall}, now {np.mean([np.isin(a, b).mean() for a, b in zip(truth, ours)]):.3f}")
        for size in (1, 10, len(q_QD)):
            ratio(f"{size} at a time", {"ralm": lambda q: found.nearest(q, 10), "FAISS alone": faiss_alone}, q_QD, size)


def exact_search(rows: int) -> None:
    import faiss
    import torch

    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    made, rng = word_means(docstrings(20_000)), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        x_ND = np.lib.format.open_memmap(Path(folder) / "x.npy", "w+", np.float16, (rows, made.shape[1]))
        for a in range(0, rows, 50_000):
            some = made[rng.integers(0, len(made), min(50_000, rows - a))]
            x_ND[a:a + 50_000] = unit(some + rng.standard_normal(some.shape, np.float32) * np.float32(0.05 / some.shape[1] ** 0.5))
        stored = vectors.Rows.__new__(vectors.Rows)
        stored.maps, stored.starts, stored.dim, stored.ids = [x_ND], np.array([0, rows]), x_ND.shape[1], np.arange(rows)
        some = made[rng.integers(0, len(made), 256)]
        q_QD = unit(some + rng.standard_normal(some.shape, np.float32) * np.float32(0.3 / some.shape[1] ** 0.5))
        whole = x_ND.astype(np.float32)
        flat, turned = faiss.IndexFlatIP(x_ND.shape[1]), torch.from_numpy(whole).T
        flat.add(whole)
        print(f"{rows} vectors of {x_ND.shape[1]}; ralm holds {x_ND.nbytes >> 20} MB mapped, FAISS and torch "
              f"{whole.nbytes >> 20} MB each")
        for k in (10, 100):
            ours, theirs = exact.top(stored, q_QD, k, None)[0], flat.search(q_QD, k)[1]
            print(f"k = {k}: {np.mean([np.isin(a, b).mean() for a, b in zip(ours, theirs)]):.5f} of the hits are FAISS's")
            ratio(f"k = {k}", {"ralm": lambda q, k=k: exact.top(stored, q, k, None), "FAISS flat": lambda q, k=k: flat.search(q, k),
                               "torch": lambda q, k=k: torch.topk(torch.from_numpy(q) @ turned, k)}, q_QD, 256)


def word_means(texts: list[str]) -> np.ndarray:
    """float32 [N, 384]: centred input vectors of MiniLM's tokens, their mean for every text."""
    from safetensors import safe_open
    from tokenizers import Tokenizer

    folder = encoder("minilm").folder
    with safe_open(str(folder / "model.safetensors"), "np") as file:
        table_VD = file.get_tensor("embeddings.word_embeddings.weight")
    table_VD -= table_VD.mean(0)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return unit(np.stack([table_VD[e.ids].mean(0) for e in tokenizer.encode_batch(texts, add_special_tokens=False) if e.ids]))


def ratio(what: str, searches: dict, q_QD: np.ndarray, size: int, rounds: int = 2) -> None:
    """The searches in turn, best of the rounds in processor seconds; FAISS is what the others are compared to."""
    best = dict.fromkeys(searches, np.inf)
    for _ in range(rounds):
        for name, search in searches.items():
            start = time.process_time()
            for a in range(0, len(q_QD), size):
                search(q_QD[a:a + size])
            best[name] = min(best[name], time.process_time() - start)
    base = next(v for name, v in best.items() if name.startswith("FAISS"))
    print(f"{what:16}" + "   ".join(f"{name} {len(q_QD) / s:8.1f} q/s ({base / s:.2f}x)" for name, s in best.items()), flush=True)


def alone(leaf, kind):
    """The same search by FAISS alone: its own flat index, or the index that was made, without re-ranking and look-up of ids."""
    import faiss

    if kind == "flat":
        index = faiss.IndexFlatIP(leaf.rows.dim)
        index.add(leaf.rows.take(np.arange(len(leaf.rows))).astype(np.float32))
        return lambda q: index.search(q, 10)[1]
    index, n = leaf.near.index, leaf.near.effort
    if kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=n)
        return lambda q: index.search(q, 10, params=parameters)[1]
    k, parameters = 10 * ann.FACTOR if kind == "ivfpq" else 10, faiss.SearchParametersIVF(nprobe=n)

    def search(q):
        rows = index.search(q, k, params=parameters)[1]
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
    parser.add_argument("what", choices=("encoders", "kinds", "alive", "exact", "squad"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    given = parser.parse_args()
    if given.what == "squad":
        squad(given.data)
    else:
        run, rows = {"encoders": (encoders, 1000), "kinds": (kinds, 50_000), "alive": (alive, 300_000),
                     "exact": (exact_search, 1_000_000)}[given.what]
        run(given.rows or rows)
