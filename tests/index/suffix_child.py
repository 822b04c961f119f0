"""Builds the suffix index of a store and kills itself at the STEP-th write: `python suffix_child.py STORE TOKENIZER STEP`."""

import os
import signal
import sys

import numpy as np
from tokenizers import Tokenizer

from ralm.index import manifest, suffix_parts
from ralm.index.suffix import SuffixIndex
from ralm.lm.gpt import BPE
from ralm.what.datastore import Datastore


def watched(call, left=[int(sys.argv[3])]):  # noqa: B006 (one counter for all)
    def inner(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return inner


if __name__ == "__main__":
    suffix_parts.TOKENS = 60  # tokens are committed after every few documents
    np.save, manifest.commit, manifest.seal = watched(np.save), watched(manifest.commit), watched(manifest.seal)
    SuffixIndex(Datastore.open(sys.argv[1]), BPE(Tokenizer.from_file(sys.argv[2])))
