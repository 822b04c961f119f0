"""kNN-LM against knn-transformers (Alon et al. 2022): python benchmarks/knn.py PEER [--tokens 1000000] [--work FOLDER]

PEER is a folder with knnlm.py of github.com/neulab/knn-transformers. Both sides use one GPT-2 of transformers with a vocabulary of
50,257 (its byte-pair encoding and its weights are trained here on the text of the installed Python packages, --minutes), the same
windows ([BOS] and `window` tokens, none shared), one row a token, k, lambda, temperature and one thread. Three comparisons:

build    store and index from token ids: seconds and peak memory
same     scoring with the index that knn-transformers builds: IVFPQ, the same lists, codes and nprobe (ours re-ranks its k hits by
         stored keys, the peer uses the distances of the codes), over rows of the same keys
default  scoring with our default index against the same peer
oracle   ln p of a short text with every row a neighbour: the peer's exact distances (recompute_dists) against ours

Every step is a process of its own, run in turn (ours, peer, ours, peer ...); seconds are processor seconds, the least of --repeat.
Work that is there already is kept, so the script can be stopped and run again."""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from docstrings import by_file

WIDTH, LAYERS, HEADS, WINDOW, VOCAB = 256, 2, 4, 512, 50_257
LISTS, CODES, NPROBE = 1024, 32, 32  # of the peer's index; 32 codes of 8 dimensions: with fewer, FAISS trains ten times longer


def text() -> list[str]:
    """Docstrings and documentation of the installed packages, one document a file."""
    out = []
    for texts in by_file():
        parts = [t for t in texts if len(t) > 80]
        if sum(map(len, parts)) > 600:
            out.append("\n\n".join(parts))
    return out


def tokenizer(work: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file = work / "tokenizer.json"
    if not file.is_file():
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        inner.train_from_iterator(json.loads((work / "text.json").read_text()), trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<|end|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False))
        inner.save(str(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|end|>", bos_token="<|end|>")


def model(work: Path, minutes: float):
    """A GPT-2 trained for some minutes: its states say something, and its head has the vocabulary of the real one."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = work / "gpt2"
    if (folder / "config.json").is_file():
        return GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=2 * WINDOW,
                                     bos_token_id=0, eos_token_id=0))
    ids = torch.from_numpy(np.concatenate(documents(work)[0])).long()
    steps, began, n = None, time.process_time(), 0
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.95))
    while (spent := (time.process_time() - began) / 60) < minutes:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (n + 1) / 20) * (1 - 0.9 * spent / minutes)
        at = torch.randint(0, len(ids) - 129, (16,))
        x = torch.stack([ids[a:a + 128] for a in at])
        loss = net(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        steps, n = float(loss), n + 1
    print(f"trained {n} steps, last loss {steps:.2f}", file=sys.stderr)
    net.save_pretrained(folder)
    return net.eval()


def documents(work: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of the documents to be stored and of those to be scored (every 40th), mapped."""
    if not (work / "ends.npy").is_file():
        inner = tokenizer(work).backend_tokenizer
        found = [e.ids for e in inner.encode_batch(json.loads((work / "text.json").read_text()))]
        np.save(work / "ids.npy", np.concatenate([np.asarray(d, np.int32) for d in found]))
        np.save(work / "ends.npy", np.cumsum([len(d) for d in found]))
    ids, ends = np.load(work / "ids.npy", mmap_mode="r"), np.load(work / "ends.npy")
    found = np.split(ids, ends[:-1])
    return [d for i, d in enumerate(found) if i % 40], found[::40]


def windows(docs: list[np.ndarray], most: int) -> list[tuple[list[int], int]]:
    """(BOS and a window's tokens, number of targets) until there are `most` targets; what both sides read."""
    out, rows = [], 0
    for d in docs:
        for a in range(0, len(d), WINDOW):
            piece = d[a:a + min(WINDOW, most - rows)].tolist()
            if piece:
                out.append(([0, *piece], len(piece)))
                rows += len(piece)
        if rows >= most:
            break
    return out


# ---- ours -----------------------------------------------------------------------------------------------------------


def our_lm(work: Path):
    from ralm.lm.hf import HF

    return HF(model(work, 0), tokenizer(work), window=WINDOW)


def our_build(a) -> dict:
    from ralm.index import inverted
    from ralm.types import Document
    from ralm.what.datastore import Datastore
    from ralm.what.token_store import TokenStore

    lm, decode = our_lm(a.work), tokenizer(a.work).decode
    if a.name == "same":
        inverted.lists_of = lambda rows: LISTS
    docs = windows(documents(a.work)[0], a.tokens)
    path = a.work / f"kb-{a.name}"
    texts = Fixed([ids[1:] for ids, _ in docs])
    kb = Datastore.build(path, [Document(f"{i:06}", decode(ids[1:])) for i, (ids, _) in enumerate(docs)])
    lm.tokenizer = texts.of(kb, lm.tokenizer)
    before, began = memory(), time.process_time()
    tokens = TokenStore.build(kb, lm, window=WINDOW, stride=WINDOW, index=a.index)
    took = time.process_time() - began
    return {"seconds": took, "rows": len(tokens), "peak_mb": memory(), "before_mb": before, "index": repr(tokens),
            "recall": tokens.recall}


class Fixed:
    """Gives the stored documents the very ids of the windows, so that both sides hold the same rows (decoding and encoding again
    may cut a window's edge otherwise)."""

    def __init__(self, ids):
        self.ids = ids

    def of(self, kb, inner):
        by_text = {d.text: self.ids[int(d.id)] for d in kb.documents()}

        class Tokenizer(type(inner)):
            def encode(self, text):
                return by_text[text] if text in by_text else super().encode(text)

        made = Tokenizer.__new__(Tokenizer)
        made.__dict__ |= inner.__dict__
        return made


def our_score(a) -> dict:
    from ralm.index import inverted
    from ralm.model import RALM
    from ralm.what.datastore import Datastore
    from ralm.what.token_store import TokenStore

    inverted.REACH = a.reach
    lm, kb = our_lm(a.work), Datastore.open(a.work / f"kb-{a.name}")
    tokens = TokenStore(kb, lm, nprobe=a.nprobe)
    held = windows(documents(a.work)[1], a.scored)
    system = RALM(lm, how=f"knn:k={a.k},lam={a.lam},temperature={a.temperature}", tokens=tokens)
    system.score(held[0][0][1:])
    before, began = memory(), time.process_time()
    nats = [-system.score(ids[1:]).logp.sum() for ids, _ in held]
    took, n = time.process_time() - began, sum(t for _, t in held)
    base = RALM(lm)
    began = time.process_time()
    alone = [-base.score(ids[1:]).logp.sum() for ids, _ in held]
    return {"us_per_token": took / n * 1e6, "ppl": math.exp(sum(nats) / n), "lm_ppl": math.exp(sum(alone) / n), "tokens": n,
            "lm_us_per_token": (time.process_time() - began) / n * 1e6, "peak_mb": memory(), "before_mb": before,
            "index": repr(tokens)}


def memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# ---- the peer -------------------------------------------------------------------------------------------------------


def peer_build(a) -> dict:
    import torch

    sys.path.insert(0, str(a.peer))
    from knnlm import KNNSaver

    net, docs = model(a.work, 0), windows(documents(a.work)[0], a.tokens)
    saver = KNNSaver(dstore_size=sum(n for _, n in docs), dstore_dir=str(a.work / "peer"), dimension=WIDTH)
    before, began = memory(), time.process_time()
    with torch.no_grad():
        saver.break_into(net)
        for x, y in batches(docs, 4):
            net(input_ids=x, labels=y)
    stored = time.process_time() - began
    saver.build_index(ncentroids=LISTS, code_size=CODES, probe=NPROBE)
    saver.break_out()
    return {"seconds": time.process_time() - began, "store_seconds": stored, "rows": saver.dstore_idx, "peak_mb": memory(),
            "before_mb": before}


def batches(docs: list[tuple[list[int], int]], size: int):
    """Windows of equal length together, as the peer is fed; the targets are all but BOS."""
    import torch

    for a in range(0, len(docs), size):
        rows = docs[a:a + size]
        length = max(len(ids) for ids, _ in rows)
        x, y = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), -100)
        for i, (ids, _) in enumerate(rows):
            x[i, :len(ids)] = torch.tensor(ids)
            y[i, 1:len(ids)] = torch.tensor(ids[1:])
        yield x, y


def peer_wrap(a, net, size: int, **more):
    sys.path.insert(0, str(a.peer))
    from knnlm import DIST, KNNWrapper

    return KNNWrapper(dstore_size=size, dstore_dir=str(a.work / "peer"), dimension=WIDTH, knn_sim_func=DIST.l2,
                      move_dstore_to_mem=True, knn_gpu=False, k=a.k, lmbda=a.lam, knn_temp=a.temperature, probe=NPROBE, **more)


def peer_score(a) -> dict:
    import torch

    net, size = model(a.work, 0), sum(n for _, n in windows(documents(a.work)[0], a.tokens))
    held = windows(documents(a.work)[1], a.scored)
    wrapper = peer_wrap(a, net, size, no_load_keys=True)
    wrapper.break_into(net)
    rows = list(batches(held, 1))
    with torch.no_grad():
        net(input_ids=rows[0][0], labels=rows[0][1])
        before, began = memory(), time.process_time()
        nats = [float(net(input_ids=x, labels=y).loss) * int((y != -100).sum()) for x, y in rows]
        took = time.process_time() - began
    n = sum(t for _, t in held)
    return {"us_per_token": took / n * 1e6, "ppl": math.exp(sum(nats) / n), "tokens": n, "peak_mb": memory(), "before_mb": before}


def oracle(a) -> dict:
    """ln p of each token of a short text by both, over a small store: every row a neighbour, exact distances on both sides."""
    import torch

    changes = {"tokens": 3000, "name": "oracle", "index": "exact", "k": 3000, "work": a.work / "oracle"}
    small = argparse.Namespace(**vars(a) | changes)
    small.work.mkdir(exist_ok=True)
    for name in ("text.json", "tokenizer.json", "ids.npy", "ends.npy", "gpt2"):
        if not (small.work / name).exists():
            os.symlink(a.work / name, small.work / name)
    our_build(small)
    sys.path.insert(0, str(a.peer))
    from knnlm import KNNSaver

    docs, held = windows(documents(a.work)[0], small.tokens), windows(documents(a.work)[1], 200)
    net = model(a.work, 0)
    saver = KNNSaver(dstore_size=small.tokens, dstore_dir=str(small.work / "peer"), dimension=WIDTH)
    with torch.no_grad():
        if not (small.work / "peer").exists():
            saver.break_into(net)
            for x, y in batches(docs, 1):
                net(input_ids=x, labels=y)
            saver.build_index(ncentroids=4, code_size=CODES, probe=4)
            saver.break_out()
        wrapper = peer_wrap(small, net, small.tokens, recompute_dists=True)
        wrapper.probe = 4
        wrapper.break_into(net)
        theirs = []
        for x, y in batches(held, 1):
            logits = net(input_ids=x, labels=y).logits[0, :-1]
            theirs += logits.gather(1, x[0, 1:, None])[:, 0].tolist()  # it writes ln p where logits were
        wrapper.break_out()
    from ralm.model import RALM
    from ralm.what.datastore import Datastore
    from ralm.what.token_store import TokenStore

    lm = our_lm(a.work)
    tokens = TokenStore(Datastore.open(small.work / "kb-oracle"), lm, index="exact")
    system = RALM(lm, how=f"knn:k={small.tokens},lam={a.lam},temperature={a.temperature}", tokens=tokens)
    ours = np.concatenate([system.score(ids[1:]).logp for ids, _ in held])
    return {"largest_difference_nats": float(np.abs(ours - np.asarray(theirs)).max()), "tokens": len(ours), "rows": len(tokens)}


# ---- running --------------------------------------------------------------------------------------------------------


def child(step: str, a, **more) -> dict:
    """One step in a process of its own, with one thread; its result is kept."""
    file = a.work / f"result-{step}-{'-'.join(map(str, more.values()))}.json"
    if step.endswith("build") and file.is_file():
        return json.loads(file.read_text())
    options = {**vars(a), **more}
    command = [sys.executable, __file__, str(a.peer), "--child", step]
    for key, value in options.items():
        if key not in ("peer", "child", "repeat") and value is not None:
            command += [f"--{key}", str(value)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, check=True,
                          stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    file.write_text(json.dumps(result))
    shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}
    print(f"  {step} {more or ''}: {shown}", flush=True)
    return result


def best(step: str, a, **more) -> dict:
    return min((child(step, a, **more) for _ in range(a.repeat)), key=lambda r: r["us_per_token"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", type=Path)
    for name, kind, value in (("tokens", int, 1_000_000), ("scored", int, 4096), ("minutes", float, 6), ("repeat", int, 2),
                              ("k", int, 1024), ("lam", float, 0.25), ("temperature", float, 10.0), ("reach", float, 1.25),
                              ("nprobe", int, None), ("index", str, "ivf"), ("name", str, "default"), ("child", str, None),
                              ("work", Path, Path("benchmarks-knn"))):
        parser.add_argument(f"--{name}", type=kind, default=value)
    a = parser.parse_args()
    a.work = a.work.absolute()
    a.work.mkdir(exist_ok=True)
    if a.child:
        print(json.dumps(globals()[a.child](a)))
        return
    if not (a.work / "text.json").is_file():
        (a.work / "text.json").write_text(json.dumps(text()))
    model(a.work, a.minutes)
    print(f"{a.tokens:,} rows of {WIDTH} numbers, vocabulary {VOCAB:,}, k={a.k}, lam={a.lam}, T={a.temperature}, one thread")
    print("oracle", child("oracle", a))
    ours, peer = child("our_build", a), child("peer_build", a)
    line("build, default index", peer["seconds"] / ours["seconds"], f"{ours['seconds']:.0f} s against {peer['seconds']:.0f} s; "
         f"peak memory {ours['peak_mb'] - ours['before_mb']} MB above the start against {peer['peak_mb'] - peer['before_mb']} MB")
    same = dict(index="ivfpq", name="same")
    child("our_build", a, **same)
    theirs = best("peer_score", a)
    for label, settings in (("scoring, same index", same | dict(reach=1, nprobe=NPROBE)), ("scoring, default index", {})):
        ours = best("our_score", a, **settings)
        line(label, theirs["us_per_token"] / ours["us_per_token"], f"{ours['us_per_token']:.0f} against "
             f"{theirs['us_per_token']:.0f} us a token (the model alone {ours['lm_us_per_token']:.0f}); ppl {ours['ppl']:.2f} "
             f"against {theirs['ppl']:.2f}, model alone {ours['lm_ppl']:.2f}; peak memory {ours['peak_mb']} MB against "
             f"{theirs['peak_mb']} MB")


def line(what: str, ratio: float, rest: str) -> None:
    print(f"{what}: {ratio:.1f} times; {rest}", flush=True)


if __name__ == "__main__":
    main()
