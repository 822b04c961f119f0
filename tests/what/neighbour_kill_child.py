"""Makes the neighbours of a datastore and kills itself at the STEP-th write: `python neighbour_kill_child.py STORE STEP`."""

import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ralm.index import grow, manifest
from ralm.lm.bundled import bundled
from ralm.what import neighbour_build
from ralm.what.datastore import Datastore
from ralm.what.neighbours import NeighbourStore

sys.path.insert(0, str(Path(__file__).parents[1]))
import stepkill

watched = stepkill.after(int(sys.argv[2]))

class Plain:
    """The bundled model's tokenizer without torch, which takes seconds to load."""

    inner = Tokenizer.from_file(str(bundled("base") / "tokenizer.json"))

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids


if __name__ == "__main__":
    neighbour_build.TOKENS, grow.BATCH = 64, 4  # a part after every document
    np.save, manifest.commit, manifest.seal, manifest.room = (
        watched(f) for f in (np.save, manifest.commit, manifest.seal, manifest.room))
    NeighbourStore.build(Datastore.open(sys.argv[1]), Plain(), m=8)
