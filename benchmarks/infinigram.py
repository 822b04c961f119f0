"""The ∞-gram index against the package infini-gram: build, counts, and what a text costs to score.

    python benchmarks/infinigram.py STORE TEXT [--peer FOLDER] [--positions 20000]

STORE is a datastore, TEXT a file; the tokenizer is bundled:base's. FOLDER is where infini-gram lies (pip install --target FOLDER
infini-gram tqdm); it gets our tokens, so that only sorting and search are compared. Both have one thread; times are processor
seconds, those of searches the best of three, taken in turns."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ralm.index import manifest, suffix_parts
from ralm.index.suffix import SuffixIndex
from ralm.lm.bundled import bundled
from ralm.lm.gpt import BPE
from ralm.what.datastore import Datastore

SEPARATOR = 65_535


def processor() -> float:
    """Seconds of this process and of the children it has waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in both)


def timed(call):
    began = processor()
    made = call()
    return made, processor() - began


def ours(store: Datastore, tokenizer: BPE) -> SuffixIndex:
    """Built anew, with the parts of the time it takes."""
    shutil.rmtree(store.path / "index" / "suffix", ignore_errors=True)
    spent = {"tokenise": 0.0, "sort": 0.0}

    def measured(name, call):
        def inner(*args):
            made, seconds = timed(lambda: call(*args))
            spent[name] += seconds
            return made
        return inner

    suffix_parts._tokenise = measured("tokenise", suffix_parts._tokenise)
    suffix_parts._sort = measured("sort", suffix_parts._sort)
    index = SuffixIndex(store, tokenizer, "bundled:base")
    used = sum(f["bytes"] for p in manifest.load(store.path / "index" / "suffix").parts for f in p.files.values())
    print(f"ralm: {index.tokens:,} tokens; tokenise {spent['tokenise']:.1f} s, sort and write {spent['sort']:.1f} s; "
          f"{used / index.tokens:.3f} bytes a token")
    return index


def peer(folder: Path, store: Datastore, tokenizer: BPE, into: Path):
    """infini-gram over the same tokens, sorted by its own program."""
    sys.path.insert(0, str(folder))
    from infini_gram.engine import InfiniGramEngine

    at = 0
    with (into / "tokenized.0").open("wb") as tokens, (into / "offset.0").open("wb") as offsets:
        for document in store.documents():
            content = np.array([SEPARATOR, *tokenizer.encode(document.text)], np.uint16).tobytes()
            tokens.write(content)
            offsets.write(np.uint64(at).tobytes())
            at += len(content)
    command = [sys.executable, "-m", "infini_gram.indexing", "--data_dir", str(into), "--save_dir", str(into), "--cpus", "1",
               "--mem", "8", "--ulimit", str(resource.getrlimit(resource.RLIMIT_NOFILE)[1])]
    path = {**os.environ, "PYTHONPATH": str(folder)}
    done, seconds = timed(lambda: subprocess.run(command, env=path, capture_output=True, text=True))
    if not (into / "table.0").is_file():
        raise SystemExit(f"infini-gram did not build its index: {done.stdout[-500:]} {done.stderr[-500:]}")
    used = sum((into / name).stat().st_size for name in ("tokenized.0", "offset.0", "table.0"))
    print(f"infini-gram: sort and write {seconds:.1f} s; {used / (at / 2):.3f} bytes a token")
    return InfiniGramEngine(str(into), eos_token_id=0, vocab_size=len(tokenizer), load_to_ram=True)


def compare(index: SuffixIndex, engine, ids: list[int], window: int = 256) -> None:
    """Every position scored with up to `window` tokens before it."""
    places = range(window, len(ids))

    def we():
        return index.match(ids, window, len(ids), most=window)

    def they():
        return [engine.infgram_prob(prompt_ids=ids[t - window:t], cont_id=ids[t]) for t in places]

    best = [np.inf, np.inf]
    for _ in range(3 if engine else 1):
        mine, seconds = timed(we)
        best[0] = min(best[0], seconds)
        if engine:
            theirs, seconds = timed(they)
            best[1] = min(best[1], seconds)
    print(f"ralm: scores {len(places) / best[0]:,.0f} positions a second, mean suffix {mine.length.mean():.2f} tokens, "
          f"{mine.sparse.mean():.3f} sparse")
    if not engine:
        return
    print(f"infini-gram: {len(places) / best[1]:,.0f}; ralm is {best[1] / best[0]:.1f} times as fast")
    length, count, target = (np.array([r[key] for r in theirs]) for key in ("suffix_len", "prompt_cnt", "cont_cnt"))
    same = (length == mine.length) & (target == mine.target)
    ends = count - mine.count  # infini-gram counts ends of documents, after which nothing stands
    print(f"same suffix and successors at {same.mean():.4%} of {len(same):,} positions, same occurrences at "
          f"{(ends == 0).mean():.2%}, elsewhere infini-gram counts up to {ends.max()} ends of documents more, fewer at "
          f"{(ends < 0).sum()}")
    some = range(window, min(len(ids), window + 2000))
    _, first = timed(lambda: [index.match(ids[t - window:t + 1], window, window + 1, most=window) for t in some])
    _, second = timed(lambda: [engine.infgram_prob(prompt_ids=ids[t - window:t], cont_id=ids[t]) for t in some])
    print(f"one position at a time: ralm {len(some) / first:,.0f}/s, infini-gram {len(some) / second:,.0f}/s")
    _, first = timed(lambda: [index.match(ids[t - window:t], window, window + 1, most=window).followers(0) for t in some])
    _, second = timed(lambda: [engine.infgram_ntd(prompt_ids=ids[t - window:t], max_support=10**9) for t in some])
    print(f"whole distributions, one at a time: ralm {len(some) / first:,.0f}/s, infini-gram {len(some) / second:,.0f}/s")
    grams = [ids[t:t + n] for t in range(0, len(ids) - 8, 5) for n in (1, 2, 3, 5, 8)]
    a, first = timed(lambda: [index.count(g) for g in grams])
    b, second = timed(lambda: [engine.count(input_ids=g)["count"] for g in grams])
    print(f"{len(grams):,} counts: ralm {len(grams) / first:,.0f}/s, infini-gram {len(grams) / second:,.0f}/s, equal: {a == b}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("text", type=Path)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--positions", type=int, default=20_000)
    asked = parser.parse_args()
    store, tokenizer = Datastore.open(asked.store), BPE(Tokenizer.from_file(str(bundled("base") / "tokenizer.json")))
    index = ours(store, tokenizer)
    ids = tokenizer.encode(asked.text.read_text(encoding="utf-8"))[:asked.positions]
    with tempfile.TemporaryDirectory() as folder:
        compare(index, peer(asked.peer, store, tokenizer, Path(folder)) if asked.peer else None, ids)


if __name__ == "__main__":
    main()
