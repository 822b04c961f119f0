"""Every error a user can cause is a RalmError: one line that says what is wrong, the two things that disagree, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RalmError(Exception):
    """Base of all errors raised on purpose. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(RalmError):
    """The request itself is wrong: an unknown name, a bad option, a value out of range. Exit code 2."""

    exit_code = 2


class ReadError(RalmError):
    """A source file cannot be read as documents."""


class StoreError(RalmError):
    """A datastore is missing, damaged, locked, or asked for something it does not hold."""


class FingerprintError(StoreError):
    """A derived artifact was made from something else than what it is used with (DESIGN rule 1)."""


class CapabilityError(RalmError):
    """A language model cannot give what a method needs (hidden states, full distributions, spans ...). Exit code 2."""

    exit_code = 2


class MissingDependency(RalmError):
    """An optional package is absent, or there and broken; the message names the extra that brings it."""

    def __init__(self, package: str, purpose: str, extra: str, broken: str = ""):
        why = f"which is installed but cannot be imported ({broken})" if broken else "which is not installed"
        upgrade = "--upgrade " if broken else ""
        super().__init__(f"{purpose} needs the package '{package}', {why}: pip install {upgrade}'ralm[{extra}]'")


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """An UsageError for a name that is not known, with the closest known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UsageError(f"unknown {kind} '{name}'.{hint} Known: {', '.join(known)}.")


def need(package: str, purpose: str, extra: str):
    """Import `package` or raise MissingDependency naming the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as e:
        absent = isinstance(e, ModuleNotFoundError) and e.name in (package, package.partition(".")[0])
        raise MissingDependency(package, purpose, extra, "" if absent else " ".join(str(e).split())) from e
