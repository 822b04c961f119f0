"""Makes the neighbours of a datastore and kills itself at the STEP-th write: `python neighbour_kill_child.py STORE STEP [FOLDER]`.

With FOLDER, those of a corpus (`corpus`) are precomputed there from what STORE has, and the writes are those."""

import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ralm.index import grow, manifest
from ralm.lm.bundled import bundled
from ralm.what import corpus_neighbours, neighbour_build
from ralm.what.datastore import Datastore
from ralm.what.neighbours import NeighbourStore

sys.path.insert(0, str(Path(__file__).parents[1]))
import stepkill


class Plain:
    """The bundled model's tokenizer without torch, which takes seconds to load."""

    inner = Tokenizer.from_file(str(bundled("base") / "tokenizer.json"))

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)


def corpus(neighbours, L=3):
    """(rows [N, L m], documents): all alive chunks one after the other, whole ones only."""
    alive = np.flatnonzero(neighbours.alive())
    tokens, mask = (x[..., :neighbours.m] for x in neighbours.gather(alive))
    whole = mask.all(1)
    n = int(whole.sum()) // L
    names = np.array(neighbours.documents(alive[whole]))[:n * L].reshape(n, L)
    return tokens[whole][:n * L].reshape(n, -1), [set(x.tolist()) for x in names], alive[whole][:n * L].reshape(n, L)


def precompute(store, tokenizer, folder, watched=lambda f: f):
    corpus_neighbours.BLOCK = 6
    neighbours = NeighbourStore(store, tokenizer)
    corpus_neighbours._state, neighbours.search = watched(corpus_neighbours._state), watched(neighbours.search)
    rows, documents, _ = corpus(neighbours)
    return corpus_neighbours.precompute(neighbours, rows, documents, 2, folder)


if __name__ == "__main__":
    watched = stepkill.after(int(sys.argv[2]))
    if len(sys.argv) > 3:
        precompute(Datastore.open(sys.argv[1]), Plain(), sys.argv[3], watched)
        sys.exit()
    neighbour_build.TOKENS, grow.BATCH = 64, 4  # a part after every document
    np.save, manifest.commit, manifest.seal, manifest.room = (
        watched(f) for f in (np.save, manifest.commit, manifest.seal, manifest.room))
    NeighbourStore.build(Datastore.open(sys.argv[1]), Plain(), m=8)
