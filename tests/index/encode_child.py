"""A builder that the dense tests kill: `python encode_child.py STORE ENCODER STEP` kills itself at the STEP-th unit encoded."""

import os
import signal
import sys

from ralm import progress
from ralm.index import vectors
from ralm.index.dense import Dense
from ralm.what.datastore import Datastore


class Deadly(progress.Silent):
    left = int(sys.argv[3])

    def advance(self, task, amount):
        Deadly.left -= 1
        if not Deadly.left:
            os.kill(os.getpid(), signal.SIGKILL)


vectors.UNIT, vectors.ROWS = 64, 128
progress.use(Deadly())
Dense(Datastore.open(sys.argv[1]), sys.argv[2])
