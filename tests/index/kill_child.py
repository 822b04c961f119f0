"""Builds the sparse index of a store and kills itself at the STEP-th write: `python kill_child.py STORE STEP`."""

import sys
from pathlib import Path

import numpy as np

from ralm.index import grow, manifest, postings
from ralm.index.sparse import BM25
from ralm.what.datastore import Datastore

sys.path.insert(0, str(Path(__file__).parents[1]))
import stepkill

watched = stepkill.after(int(sys.argv[2]))

if __name__ == "__main__":
    postings.FLUSH, grow.BATCH = 40, 4  # a segment after every few chunks
    np.save, manifest.commit, manifest.seal = watched(np.save), watched(manifest.commit), watched(manifest.seal)
    BM25(Datastore.open(sys.argv[1]))
