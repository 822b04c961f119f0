"""Compiled functions work wherever their machine code can be kept, and where it cannot."""

import os
import subprocess
import sys

import numpy as np
import pytest

from ralm.index.compiled import compiled

PROGRAM = """
import numpy as np
from ralm.index import kernels
slots = np.full(4, -1, np.int32)
kernels.rehash(np.zeros(2, np.uint64), 2, slots)
print(slots.tolist(), kernels.rehash.stats.cache_path)
"""


def test_no_folder_to_keep_code_in(tmp_path):
    """A cache folder that cannot be made: every process compiles, nothing fails."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | {"NUMBA_CACHE_DIR": str(blocked / "cache")},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0, 1, -1, -1]")


def test_code_is_kept(tmp_path):
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("kernels.rehash*.nbc"))


def test_other_errors_are_not_hidden():
    @compiled
    def broken(x):
        return x.nothing

    with pytest.raises(Exception, match="nothing"):
        broken(np.zeros(1))
