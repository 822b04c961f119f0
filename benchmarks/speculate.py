"""Speculation (ralm/speculate.py) against a search at every token: the same output, how much sooner.

    python benchmarks/speculate.py STORE --index exact --tokens 128 --steps 4,8,auto

STORE: a datastore with a token store for the model. Each prompt is streamed by every way in turn, so that what else the machine
does falls on all of them; seconds are of the processor. A way that changes one token, or one bit of a ln p, ends the run with an
error."""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

PROMPTS = ["The history of the river is", "In 1873 the city", "The population of the", "She was born in London and"]


def main():
    import torch

    from ralm.lm import load
    from ralm.model import RALM
    from ralm.speculate import Ahead
    from ralm.types import Token
    from ralm.what.datastore import Datastore
    from ralm.what.token_store import TokenStore

    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("store")
    ask.add_argument("--lm", default="bundled:base")
    ask.add_argument("--name", default="", help="of the token store")
    ask.add_argument("--index", default=None, help="exact or ivf (default: the store's)")
    ask.add_argument("--how", default="knn:k=1024,lam=0.25,temperature=10")
    ask.add_argument("--tokens", type=int, default=128)
    ask.add_argument("--steps", default="4,8,auto")
    ask.add_argument("--prompts", type=int, default=len(PROMPTS))
    ask.add_argument("--temperature", type=float, default=0.0)
    given = ask.parse_args()

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    lm = load(given.lm)
    tokens = TokenStore(Datastore.open(given.store), lm, given.name, given.index)
    ralm = RALM(lm, how=given.how, tokens=tokens)
    ways = {"naive": None} | {s: s for s in given.steps.split(",")}
    seconds, counts, drawn = dict.fromkeys(ways, 0.0), {w: [0, 0, 0] for w in ways}, 0
    list(ralm.stream(PROMPTS[0], max_tokens=2, speculate=2))  # maps and compiles
    print(f"{tokens!r}, {lm.name}, {given.how}, temperature {given.temperature}, {given.tokens} tokens of {given.prompts} prompts")
    for seed, prompt in enumerate(PROMPTS[:given.prompts]):
        naive = None
        for way, steps in ways.items():
            ahead, began = Ahead.of(steps), time.process_time()
            said = [(e.id, e.logp) for e in ralm.stream(prompt, max_tokens=given.tokens, temperature=given.temperature, seed=seed,
                                                        speculate=ahead) if isinstance(e, Token)]
            seconds[way] += time.process_time() - began
            naive = naive or said
            if said != naive:
                raise SystemExit(f"speculate={way} changed the output of '{prompt}'")
            if ahead is not None:
                counts[way] = [a + b for a, b in zip(counts[way], (ahead.checked, ahead.right, ahead.searches))]
        drawn += len(naive)
    for way in ways:
        checked, right, searches = counts[way]
        more = f", {right / checked:.0%} of checked steps right, {drawn / searches:.1f} tokens a search" if checked else ""
        print(f"  {way:>6}: {1e3 * seconds[way] / drawn:6.1f} ms a token, x{seconds['naive'] / seconds[way]:.2f}{more}", flush=True)


if __name__ == "__main__":
    main()
