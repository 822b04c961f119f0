"""A process beside the run that makes its indexes: told what to do by lines on its standard input, ended by their end.

    worker = Worker(log)
    worker.submit({"name": "realm000500", ...})      # the arguments of refresh.build
    seconds = worker.wait("realm000500")
    worker.close()

The pipe closes when the run ends, also when it is killed; whatever the process is doing then, it ends with it. It looks at the
pipe before it imports anything that takes time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from ralm.errors import RalmError, need


class Worker:
    """The process, as the run sees it. It is in no group of the run's: Ctrl-C is for the run."""

    def __init__(self, log: Path):
        self.log, self.open_jobs = log, set()
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])])
        with log.open("a") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ralm.train.behind"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                env=env, start_new_session=True)
        self._end = weakref.finalize(self, _end, self.process)

    def submit(self, job: dict[str, Any]) -> None:
        self.open_jobs.add(job["name"])
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except OSError as e:
            raise self._died() from e

    def busy(self, name: str) -> bool:
        return name in self.open_jobs

    def wait(self, name: str) -> float:
        """Until a job is done: the processor seconds it took. Raises RalmError where it failed or the process has died."""
        while line := self.process.stdout.readline():
            said = json.loads(line)
            self.open_jobs.discard(said["name"])
            if said["error"]:
                raise RalmError(f"the index could not be made: {said['error']}")
            if said["name"] == name:
                return float(said["seconds"])
        raise self._died()

    def _died(self) -> RalmError:
        return RalmError(f"the process that makes the index has ended ({self.process.wait(5)}); what it said is in {self.log}; "
                         "give the command again to go on from the last save")

    def close(self) -> None:
        self._end()


def _end(process: subprocess.Popen) -> None:
    with suppress(OSError):  # it has ended by itself
        process.stdin.close()
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def main() -> None:
    """Jobs from standard input, what became of them to standard output; the end of the input is the end of the process."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        os._exit(0)  # in the middle of a build, as a kill: the next run goes on with it

    threading.Thread(target=listen, daemon=True).start()
    from ralm.train.refresh import build

    need("sentence_transformers", "making the index", "lm")  # its seconds are not those of the first index
    while True:
        job = jobs.get()
        said: dict[str, Any] = {"name": job["name"], "seconds": 0.0, "error": ""}
        try:
            said["seconds"] = build(**job)
        except Exception as e:  # told to the run, which ends with it
            said["error"] = f"{type(e).__name__}: {e}"
        out.write(json.dumps(said) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
