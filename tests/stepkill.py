"""For children that are to die at the n-th write: `watched = stepkill.after(n)`, then wrap what writes."""

import os
import signal
from collections.abc import Callable


def after(steps: int) -> Callable[[Callable], Callable]:
    """A wrapper of functions; the `steps`-th call of all that it wraps kills this process with SIGKILL."""
    left = [steps]

    def watched(call: Callable) -> Callable:
        def inner(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return inner
    return watched
