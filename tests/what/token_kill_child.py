"""Makes the token store of a datastore and kills itself at the STEP-th write: `python token_kill_child.py STORE STEP`."""

import sys
from pathlib import Path

import numpy as np

from ralm.index import manifest
from ralm.lm import load
from ralm.what import token_build
from ralm.what.datastore import Datastore
from ralm.what.token_store import TokenStore

sys.path.insert(0, str(Path(__file__).parents[1]))
import stepkill

watched = stepkill.after(int(sys.argv[2]))

if __name__ == "__main__":
    token_build.SECONDS, token_build.CHUNK = 0.0, 64 * 256  # a part after every few documents
    np.save, manifest.commit, manifest.seal = watched(np.save), watched(manifest.commit), watched(manifest.seal)
    token_build.Writer.add = watched(token_build.Writer.add)
    TokenStore.build(Datastore.open(sys.argv[1]), load("bundled:base"), index="exact")
