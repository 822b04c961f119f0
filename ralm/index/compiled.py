"""How kernels are compiled: once per machine, and released from the interpreter lock so that threads can search at once."""

from __future__ import annotations

from numba import njit


def compiled(function, **options):
    """Compile with numba and keep the machine code: beside the source file, or in the user's cache folder where that is read-only
    (or in NUMBA_CACHE_DIR). Where no folder can be written it is compiled in every process, which takes some seconds."""
    try:
        return njit(cache=True, nogil=True, **options)(function)
    except RuntimeError as e:
        if "cannot cache" not in str(e):
            raise
        return njit(nogil=True, **options)(function)


def summing(function):
    """`compiled`, where sums may be taken in the order that suits the processor: the same at every call on one machine."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})
