"""The command line: names, help and exit codes. What a command does is in stores.py, indexes.py, tokens.py, neighbours.py,
asking.py, scoring.py, explaining.py, evaluating.py, tuning.py and doctor.py.

stdout carries the result, stderr the talk. Exit codes: 0 done, 1 it could not be done, 2 the request is wrong, 130 stopped by
Ctrl-C. Commands load when they are used, so `ralm --help` is quick; nothing here imports torch, numpy or a table engine."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter, UnknownCommandError

import ralm
from ralm import progress
from ralm.app import terminal
from ralm.errors import RalmError, unknown

HELP = """Retrieval-augmented language models over one versioned datastore.

First steps:  ralm build kb docs/   then   ralm ask kb "a question"   (or ralm demo)."""

BUILD, USE, MEASURE, MORE = (Group(name, sort_key=i) for i, name in enumerate(
    ("Make a datastore", "Use it", "Measure", "More"), 1))

COMMANDS = {  # where it is, what it takes, one line of help, its group
    "build": ("stores:build", "STORE PATH...", "Make a datastore from files and folders.", BUILD),
    "add": ("stores:add", "STORE PATH...", "Add or update documents.", BUILD),
    "remove": ("stores:remove", "STORE --id ID | --where FILTER", "Remove documents, at once in every index.", BUILD),
    "index": ("indexes:index", "STORE [--index SPEC]", "Build or extend an index.", BUILD),
    "tokens": ("tokens:tokens", "STORE --lm MODEL", "The token store of a model, for --how knn.", BUILD),
    "neighbours": ("neighbours:neighbours", "STORE --lm MODEL", "Chunks that a RETRO model reads, for --how retro.", BUILD),
    "show": ("stores:show", "STORE", "What a datastore holds and how it was made.", BUILD),
    "history": ("stores:history", "STORE", "The versions of a datastore.", BUILD),
    "compact": ("stores:compact", "STORE", "Rewrite a datastore without gaps.", BUILD),
    "search": ("asking:search", "STORE QUERY | STORE --queries FILE", "Passages for a query, or for a file of queries.", USE),
    "ask": ("asking:ask", "STORE QUESTION", "Answer a question with quotes and sources.", USE),
    "generate": ("asking:generate", "STORE PROMPT", "Continue a prompt with retrieval, as a stream.", USE),
    "score": ("scoring:score", "STORE FILE...", "Perplexity and bits per byte of texts.", MEASURE),
    "explain": ("explaining:explain", "STORE TEXT --lm MODEL --how HOW", "What retrieval changed, token by token.", MEASURE),
    "eval retrieval": ("evaluating:retrieval", "STORE --queries FILE --qrels FILE", "nDCG, recall and others.", MEASURE),
    "eval qa": ("evaluating:qa", "STORE --questions FILE | --predictions P --gold G", "Exact match and F1 of answers.", MEASURE),
    "tune knn": ("tuning:knn", "STORE FILE... --lm MODEL", "Choose k, lam and temperature of --how knn on held-out text.", MEASURE),
    "train": ("training:train", "RECIPE.toml | --list", "Train a model by a recipe; a stopped run goes on.", MORE),
    "doctor": ("doctor:doctor", "[STORE]", "What this machine has; with STORE, verify it.", MORE),
    "demo": ("demo:demo", "", "Everything on real text, in minutes.", MORE),
}


FAMILIES = {"eval": "Measures of retrieval and of answers.", "tune": "Settings chosen on held-out text."}
WRITERS = ("build", "add", "remove", "index", "tokens", "neighbours", "compact", "demo", "train")  # they go on where they stopped


def application(argv: Sequence[str]) -> App:
    """The commands, none of them imported yet. The one that argv names shows its docstring as help."""
    app = App(name="ralm", help=HELP, version=ralm.__version__, default_parameter=Parameter(negative=()), help_format="plaintext")
    families = {name: App(name=name, help=text, group=MEASURE, sort_key=len(COMMANDS)) for name, text in FAMILIES.items()}
    for i, (name, (path, takes, text, group)) in enumerate(COMMANDS.items()):
        family, _, last = name.rpartition(" ")
        help_text = _docstring(path) if last in argv else text
        families.get(family, app).command(f"ralm.app.{path}", name=last, help=help_text, group=group, sort_key=i,
                                          usage=f"Usage: ralm {name} {takes} [OPTIONS]")
    for family in families.values():
        app.command(family)
    return app


def _docstring(path: str) -> str:
    """A command's docstring, each paragraph on one line for the terminal to wrap."""
    import inspect
    from importlib import import_module

    module, _, name = path.partition(":")
    paragraphs = (inspect.getdoc(getattr(import_module(f"ralm.app.{module}"), name)) or "").split("\n\n")
    return "\n\n".join(" ".join(p.split()) for p in paragraphs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. The console script `ralm`. With RALM_DEBUG set, what is raised passes through."""
    debug = bool(os.environ.get("RALM_DEBUG"))
    for name in ("stdout", "stderr"):  # closed by the caller (>&-): what is said goes nowhere
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if not debug:
        _hush()
    previous = None
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        previous = signal.signal(signal.SIGTERM, _terminated)
    argv = list(sys.argv[1:] if argv is None else argv)
    talk = terminal.Talk()
    before = progress._sink
    progress.use(talk)
    try:
        code = _run(argv, talk)
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
        return code
    except BrokenPipeError:
        _silence_stdout()
        return 141  # what the shell gives for a writer whose reader has gone
    except BaseException as e:
        talk.close()
        if debug and not isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        text, code = explain(e, argv)
        if text:
            terminal.error(text)
        return code
    finally:
        talk.close()
        progress.use(before)
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _run(argv: list[str], talk: terminal.Talk) -> int:
    app = application(argv)
    command, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
    out = bound.arguments.get("out")
    talk.quiet = isinstance(out, terminal.Output) and out.quiet
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def explain(e: BaseException, argv: Sequence[str] = ()) -> tuple[str, int]:
    """(one line, exit code) for anything that ended the command `argv`."""
    if isinstance(e, CycloptsError):
        return _misuse(e), 2
    if isinstance(e, RalmError):
        return str(e), e.exit_code
    if isinstance(e, KeyboardInterrupt):
        kept = (argv[:1] and argv[0] in WRITERS) or "--save" in argv
        return "stopped" + ("; what was done is kept, the same command goes on from there" if kept else ""), getattr(e, "code", 130)
    if isinstance(e, SystemExit):
        return ("", e.code) if isinstance(e.code, int) else ("", 0) if e.code is None else (str(e.code), 1)
    if isinstance(e, OSError):
        return _os_error(e), 1
    if isinstance(e, MemoryError):
        return "out of memory; use a smaller model, batch or --index bm25", 1
    said = " ".join(str(e).split())
    return f"unexpected {type(e).__name__}: {said[:400]}; RALM_DEBUG=1 ralm ... shows where (please report it)", 1


def _misuse(e: CycloptsError) -> str:
    """What is wrong with the arguments, and which help to read."""
    chain = " ".join(("ralm", *(e.command_chain or ())))
    if isinstance(e, UnknownCommandError) and e.unused_tokens:
        family = chain.partition(" ")[2]
        words = [name.removeprefix(f"{family} ") for name in COMMANDS if name.startswith(family)] if family in FAMILIES else [
            name.split()[0] for name in COMMANDS]
        return str(unknown("command", e.unused_tokens[0], set(words)))
    if isinstance(e, MissingArgumentError) and e.argument is not None:
        name = e.keyword or e.argument.name
        what = f"{name} needs a value" if e.keyword else f"{name} is missing"
    else:
        what = " ".join(str(e).split()).rstrip(".")
    return f"{what[:1].lower() + what[1:] if what[:2].istitle() else what} (see {chain} --help)"


def _os_error(e: OSError) -> str:
    what = e.strerror or (str(e).splitlines() or ["input or output failed"])[0][:300]
    files = " -> ".join(str(f) for f in (e.filename, e.filename2) if f is not None)
    return f"{files}: {what}" if files else what


class Stopped(KeyboardInterrupt):
    """SIGTERM, ended like Ctrl-C with the shell's code for it."""

    code = 143


def _terminated(signum: int, frame: Any) -> None:
    raise Stopped


def _hush() -> None:
    """Other libraries' warnings and bars are not this program's talk. What the user has set stands."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _silence_stdout() -> None:
    """Python flushes stdout once more at exit; give it somewhere to go."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass


if __name__ == "__main__":
    sys.exit(main())
