"""Builds the suffix index of a store and kills itself at the STEP-th write: `python suffix_child.py STORE TOKENIZER STEP`."""

import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ralm.index import manifest, suffix_parts
from ralm.index.suffix import SuffixIndex
from ralm.lm.gpt import BPE
from ralm.what.datastore import Datastore

sys.path.insert(0, str(Path(__file__).parents[1]))
import stepkill

watched = stepkill.after(int(sys.argv[3]))

if __name__ == "__main__":
    suffix_parts.TOKENS = 60  # tokens are committed after every few documents
    np.save, manifest.commit, manifest.seal = watched(np.save), watched(manifest.commit), watched(manifest.seal)
    SuffixIndex(Datastore.open(sys.argv[1]), BPE(Tokenizer.from_file(sys.argv[2])))
