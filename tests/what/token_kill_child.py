"""Makes the token store of a datastore and kills itself at the STEP-th write: `python token_kill_child.py STORE STEP`."""

import os
import signal
import sys

import numpy as np

from ralm.index import manifest
from ralm.lm import load
from ralm.what import token_build
from ralm.what.datastore import Datastore
from ralm.what.token_store import TokenStore


def watched(call, left=[int(sys.argv[2])]):  # noqa: B006 (one counter for all)
    def inner(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return inner


if __name__ == "__main__":
    token_build.SECONDS, token_build.CHUNK = 0.0, 64 * 256  # a part after every few documents
    np.save, manifest.commit, manifest.seal = watched(np.save), watched(manifest.commit), watched(manifest.seal)
    token_build.Writer.add = watched(token_build.Writer.add)
    TokenStore.build(Datastore.open(sys.argv[1]), load("bundled:base"), index="exact")
