"""Encoding measured: `python benchmarks/encoding.py [--rows N] [--threads T]`: passages/s of every route to MiniLM's vectors.

Docstrings of 5 to 250 words, whole, of the installed packages, in one process: plain sentence-transformers as its users call it
(batches of 32), ralm's minilm (float32), minilm-int8 and static. Two rounds, the routes in turn; the better round counts, in
processor seconds and by the clock. The ratios are to plain sentence-transformers, cosines to its vectors."""

import argparse
import time

import numpy as np
from docstrings import ROOTS, by_file

from ralm.index.encode import encoder

MOST = 3  # docstrings of one file: no package is most of the sample


def mixed(n: int) -> list[str]:
    """n distinct docstrings of 5 to 250 words, drawn from those of all installed Python files."""
    found: dict[str, None] = {}
    for root in ROOTS:
        for texts in by_file(root):
            whole = [" ".join(t.split()) for t in texts if 5 <= len(t.split()) <= 250]
            found.update(dict.fromkeys(whole[:MOST]))
        if len(found) > 20 * n:
            break
    rng = np.random.default_rng(0)
    return [list(found)[i] for i in rng.permutation(len(found))[:n]]


def main(rows: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    texts, model = mixed(rows), encoder("minilm").model
    words = np.array([len(t.split()) for t in texts])
    print(f"{len(texts)} docstrings of {words.min()} to {words.max()} words, {words.mean():.0f} on average; {threads} threads; "
          f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    routes = {"sentence-transformers": lambda t: model.encode(t, show_progress_bar=False)}
    routes |= {name: encoder(name).encode for name in ("minilm", "minilm-int8", "static")}
    best, made = {}, {}
    for encode in routes.values():
        encode(texts[:8])
    for _ in range(2):
        for name, encode in routes.items():
            wall, cpu = time.perf_counter(), time.process_time()
            made[name] = encode(texts)
            now = len(texts) / (time.process_time() - cpu), len(texts) / (time.perf_counter() - wall)
            best[name] = np.maximum(best.get(name, 0), now)
    plain = best["sentence-transformers"]
    for name, (cpu, wall) in best.items():
        line = f"{name:22} {cpu:8.1f} per cpu s ({cpu / plain[0]:6.2f}x)  {wall:8.1f} per s ({wall / plain[1]:6.2f}x)"
        if made[name].shape == made["sentence-transformers"].shape:
            cosine = (made[name] * made["sentence-transformers"]).sum(1)
            line += f"  cosine mean {cosine.mean():.5f}, 1st percentile {np.quantile(cosine, .01):.5f}, least {cosine.min():.5f}"
        print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    main(given.rows, given.threads)
