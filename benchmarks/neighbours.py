"""Neighbours of a training corpus against retro-pytorch 0.3.9's pipeline: python benchmarks/neighbours.py FILE... [--chunks 4000]

From documents to the k neighbours of every chunk, none of its own document: tokenise, cut, embed, index, search. FILE: anything
ralm build reads (whole documents, until --chunks are there). Needs retro-pytorch, autofaiss and embedding-reader (installed with
--no-deps), einops, fire, fsspec and faiss-cpu beside ralm[lm].

Both sides use wordpieces and weights of all-MiniLM-L6-v2, chunks of 64, k = 2, one thread. The peer is its own two functions,
text_folder_to_chunks_ and chunks_to_precalculated_knn_, called as by its TrainingWrapper (100 extra neighbours); its module-level
MODEL and TOKENIZER are assigned, and JSON is taught numpy's numbers, which autofaiss writes. Ours: Datastore, NeighbourStore,
precompute.

Seconds are processor seconds, children's too, the least of --repeat, all sides in turn. Recall: of the neighbours that exact search
by float32 MiniLM finds, how many are found (the peer's are those of its own vectors, which pool otherwise)."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from retro_pytorch import retrieval  # noqa: E402

from ralm.index.encode import _minilm  # noqa: E402
from ralm.lm.hf import HFTokenizer  # noqa: E402
from ralm.types import Document  # noqa: E402
from ralm.what.corpus_neighbours import precompute  # noqa: E402
from ralm.what.datastore import Datastore  # noqa: E402
from ralm.what.neighbours import NeighbourStore  # noqa: E402
from ralm.what.read import read  # noqa: E402

M, K, EXTRA, DIM = 64, 2, 100, 384
OURS = ("dense:minilm", "dense:minilm-int8", "dense:static", "bm25")


def seconds() -> float:
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


class Clock:
    """Processor seconds by step."""

    def __init__(self):
        self.steps: dict[str, float] = {}

    def __call__(self, step: str, run: Callable):
        begin = seconds()
        out = run()
        self.steps[step] = self.steps.get(step, 0.0) + seconds() - begin
        return out

    @property
    def total(self) -> float:
        return sum(self.steps.values())


# ---- the peer ----------------------------------------------------------------------------------------------------------------


class Wordpieces:
    """What the peer calls of a tokenizer: batch_encode_plus, which transformers no longer has."""

    def __init__(self, inner):
        self.inner = inner

    def batch_encode_plus(self, texts, **options):
        return self.inner(list(texts), verbose=False, **options)


def assigned() -> None:
    mini = _minilm().model
    retrieval.MODEL, retrieval.TOKENIZER = mini[0].model.eval(), Wordpieces(mini.tokenizer)
    retrieval.chunks_to_index_and_embed = partial(retrieval.chunks_to_index_and_embed, embed_dim=DIM)  # it is not handed on
    default = json.JSONEncoder.default
    json.JSONEncoder.default = lambda self, x: x.item() if isinstance(x, np.generic) else default(self, x)


def peer(documents: list[Document], folder: Path) -> tuple[Clock, int, float]:
    clock, embed = Clock(), retrieval.chunks_to_embeddings_
    (folder / "texts").mkdir()
    for i, d in enumerate(documents):
        (folder / "texts" / f"{i:05d}.txt").write_text(d.text)
    here = Path.cwd()
    os.chdir(folder)
    retrieval.chunks_to_embeddings_ = lambda **given: clock("embed", lambda: embed(**given))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            stats = clock("cut", lambda: retrieval.text_folder_to_chunks_(
                folder="texts", chunks_memmap_path="train.chunks.dat", seqs_memmap_path="train.seq.dat",
                doc_ids_memmap_path="train.doc_ids.dat", chunk_size=M, seq_len=2048))
            n, began = stats["chunks"], seconds()
            path, _ = retrieval.chunks_to_precalculated_knn_(
                num_chunks=n, chunk_size=M, chunk_memmap_path="train.chunks.dat", doc_ids_memmap_path="train.doc_ids.dat",
                num_nearest_neighbors=K, num_extra_neighbors=EXTRA)
            clock.steps["index and search"] = seconds() - began - clock.steps["embed"]
        found = np.memmap(path, np.int32, "r", shape=(n, K))
        x = np.memmap("train.chunks.dat.embedded", np.float32, "r", shape=(n, DIM))
        own = np.memmap("train.doc_ids.dat", np.int32, "r")[:n]
        return clock, n, recall(found, nearest(np.asarray(x), own))
    finally:
        retrieval.chunks_to_embeddings_ = embed
        os.chdir(here)


def nearest(x_ND: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """int64 [N, K]: the exact nearest vectors of other documents."""
    square, out = (x_ND * x_ND).sum(1), []
    for a in range(0, len(x_ND), 1000):
        d = square - 2 * x_ND[a:a + 1000] @ x_ND.T
        d[own_N[a:a + 1000, None] == own_N] = np.inf
        out.append(np.argpartition(d, K, 1)[:, :K])
    return np.concatenate(out)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float((found[:, :, None] == exact[:, None]).any(2).mean())


# ---- ours --------------------------------------------------------------------------------------------------------------------


def ours(documents: list[Document], folder: Path, retriever: str) -> tuple[Clock, int, np.ndarray]:
    clock, tokenizer = Clock(), HFTokenizer(_minilm().model.tokenizer)
    store = clock("store", lambda: Datastore.build(folder / "kb", documents))
    found = clock("cut, embed, index", lambda: NeighbourStore.build(store, tokenizer, m=M, retriever=retriever))

    def search() -> np.ndarray:
        ids = np.arange(len(found))
        own = found.documents(ids)
        rows = found.gather(ids)[0][:, :M]
        return precompute(found, rows, [{d} for d in own], K, folder / "out", held=ids[:, None], special=())[:, 0]

    return clock, len(found), np.array(clock("search", search))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--chunks", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    documents, size = [], 0
    for d in read(*args.files):
        documents.append(d)
        size += len(d.text)
        if size > args.chunks * 270:
            break
    assigned()
    small = documents[:1]
    for spec in OURS:  # what is compiled and loaded once is not timed
        with tempfile.TemporaryDirectory() as folder:
            ours(small, Path(folder), spec)
    best: dict[str, tuple[Clock, int, float]] = {}
    exact = None
    for _ in range(args.repeat):
        for name in (OURS[0], "retro-pytorch", *OURS[1:]):
            with tempfile.TemporaryDirectory() as folder:
                if name == "retro-pytorch":
                    clock, n, share = peer(documents, Path(folder))
                else:
                    clock, n, found = ours(documents, Path(folder), name)
                    exact = found if exact is None else exact
                    share = recall(found, exact)
            if name not in best or clock.total < best[name][0].total:
                best[name] = clock, n, share
            print(f"  {name}: {clock.total:.1f} s", flush=True)
    theirs = best["retro-pytorch"][0].total
    print(f"{len(documents)} documents, {size:,} characters, k = {K}")
    for name, (clock, n, share) in best.items():
        steps = ", ".join(f"{step} {s:.1f}" for step, s in clock.steps.items())
        print(f"{name:18} {n:6,} chunks  {clock.total:7.1f} s  {n / clock.total:7.1f} chunks/s  {theirs / clock.total:5.2f}x  "
              f"recall {share:.3f}  ({steps})")


if __name__ == "__main__":
    main()
