"""In-Context RALM with and without reuse of what was read: python benchmarks/in_context.py [--lm bundled:base] [--tokens 32]

Evidence is fetched every `stride` tokens and stands in front of the text. Without a cache every new token reads the whole row
[BOS, evidence, text] again, as in-context retrieval is usually written; with it a row is read once for each retrieval that
brings other evidence (once more, in part, where evidence comes back), and every other token costs one step. Both must draw
the same tokens with the same ln p. Then: scoring with the rows of many strides in one batch, against row by row.

Times are processor seconds of this process (all threads), medians of `--repeat` runs, with the wall clock beside them."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from store import documents

from ralm.how import rows
from ralm.index import retriever
from ralm.lm import load
from ralm.lm.hf import HF
from ralm.model import RALM
from ralm.run import Run
from ralm.types import Hits
from ralm.what.datastore import Datastore

PROMPT = ("A module is a file that holds definitions and statements. The file name is the name of the module with the suffix .py "
          "appended. Within a module, the name of the module is available as the value of a global variable. ")


def random_llama(like) -> HF:
    """A Llama of 8 layers and width 512 with random weights, for machines without the bundled model: speed is the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(like), hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
                         intermediate_size=1408, max_position_embeddings=1024, bos_token_id=0, eos_token_id=None)
    return HF(LlamaForCausalLM(config), like, bos=0)


class Changing:
    """One of the eight best chunks, chosen by the query's checksum: evidence that is another one at nearly every retrieval, the
    worst case for a cache."""

    def __init__(self, inner):
        self.inner, self.store = inner, inner.store

    def search(self, queries, k=10, where=None, exclude=()):
        found = self.inner.search(queries, k=8, where=where, exclude=exclude)
        pick = np.array([crc32(q.encode()) % max(1, int((row >= 0).sum())) for q, row in zip(queries, found.ids)])[:, None]
        return Hits(np.take_along_axis(found.ids, pick, 1), np.take_along_axis(found.scores, pick, 1))


def draw(ralm: RALM, ids: list[int], count: int):
    """Greedy continuation of ids by `count` tokens through the engine's step: (tokens, their ln p, number of retrievals)."""
    run = Run(ralm, list(ids), len(ids), None, None, ())
    logp = []
    with torch.inference_mode():
        for _ in range(count):
            logp_V = run.step(len(run.ids))
            run.ids.append(int(logp_V.argmax()))
            logp.append(float(logp_V.max()))
    return run.ids[len(ids):], logp, run.evidence


def timed(call, repeat: int):
    cpu, wall = [], []
    for _ in range(repeat):
        a, b = time.process_time(), time.perf_counter()
        result = call()
        cpu.append(time.process_time() - a)
        wall.append(time.perf_counter() - b)
    return result, statistics.median(cpu), statistics.median(wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lm", default="bundled:base", help="a model spec, or 'random' (8 layers, width 512)")
    parser.add_argument("--prefix", type=int, default=256, help="tokens of text before the first new one")
    parser.add_argument("--evidence", type=int, default=256, help="most tokens of evidence")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to draw")
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.lm == "random":
        from transformers import AutoTokenizer

        from ralm.lm.reader import ReaderConfig, base_folder

        lm = random_llama(AutoTokenizer.from_pretrained(base_folder(ReaderConfig())))
    else:
        lm = load(a.lm)
    with tempfile.TemporaryDirectory() as folder:
        store = Datastore.build(Path(folder) / "kb.ralm", documents(a.documents), split="words:200")
        ralm = RALM(lm, retriever("bm25", store), how=f"prepend:k=1,tokens={a.evidence}", when=f"every:{a.stride}")
        ids = (lm.tokenizer.encode(PROMPT) * a.prefix)[:a.prefix]
        parameters = sum(p.numel() for p in lm.model.parameters()) if hasattr(lm, "model") else 0
        print(f"{lm.name}: {parameters / 1e6:.1f} M parameters, window {lm.window}; {store.n_chunks} chunks; prefix {a.prefix}, "
              f"evidence <= {a.evidence}, stride {a.stride}, {a.tokens} tokens drawn, {a.threads} thread(s)")
        generation(ralm, ids, a, "the best chunk, which stays the same for a while")
        generation(replace(ralm, retriever=Changing(ralm.retriever)), ids, a, "another chunk at every retrieval")
        scoring(ralm, ids, a)


def generation(ralm: RALM, ids: list[int], a: argparse.Namespace, title: str) -> None:
    def cached():
        cache = rows.PrefixCache(ralm.lm)
        return *draw(replace(ralm, lm=cache), ids, a.tokens), cache.prefills, cache.steps

    (again, logp_again, _), cpu_again, wall_again = timed(lambda: draw(ralm, ids, a.tokens), a.repeat)
    (tokens, logp, evidence, prefills, steps), cpu, wall = timed(cached, a.repeat)
    gap = float(np.abs(np.array(logp) - logp_again).max())
    print(f" evidence: {title}")
    print(f"  rows read anew for each token   {cpu_again / a.tokens * 1e3:8.1f} ms CPU/token  {wall_again:6.2f} s")
    print(f"  with the prefix cache           {cpu / a.tokens * 1e3:8.1f} ms CPU/token  {wall:6.2f} s   "
          f"{len(evidence)} retrievals, {prefills} rows read, {steps} steps")
    print(f"  ratio {cpu_again / cpu:.2f} x (CPU), {wall_again / wall:.2f} x (wall); same tokens: {tokens == again}, largest "
          f"difference of ln p {gap:.1e}")


def scoring(ralm: RALM, ids: list[int], a: argparse.Namespace) -> None:
    text = ids[:64]
    batched, cpu, wall = timed(lambda: ralm.score(text), a.repeat)
    bound = rows.BATCH_TOKENS
    rows.BATCH_TOKENS = 1
    single, cpu_single, wall_single = timed(lambda: ralm.score(text), a.repeat)
    rows.BATCH_TOKENS = bound
    gap = float(np.abs(batched.logp - single.logp).max())
    print(f"  scoring {len(text)} tokens: rows in batches {cpu:.2f} s CPU ({wall:.2f} s), row by row {cpu_single:.2f} s CPU "
          f"({wall_single:.2f} s): {cpu_single / cpu:.2f} x; largest difference {gap:.1e}")


if __name__ == "__main__":
    main()
