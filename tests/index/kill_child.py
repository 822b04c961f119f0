"""Builds the sparse index of a store and kills itself at the STEP-th write: `python kill_child.py STORE STEP`."""

import os
import signal
import sys

import numpy as np

from ralm.index import grow, manifest, postings
from ralm.index.sparse import BM25
from ralm.what.datastore import Datastore


def watched(call, left=[int(sys.argv[2])]):  # noqa: B006 (one counter for all)
    def inner(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return inner


if __name__ == "__main__":
    postings.FLUSH, grow.BATCH = 40, 4  # a segment after every few chunks
    np.save, manifest.commit, manifest.seal = watched(np.save), watched(manifest.commit), watched(manifest.seal)
    BM25(Datastore.open(sys.argv[1]))
