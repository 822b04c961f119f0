"""Real text that every machine with Python has: the language reference in `pydoc_data.topics`, and docstrings.

Sources are parsed, never imported: reading a corpus runs no code. One document per topic and per documented object, titled with
its dotted name, so that a citation says `numpy.linalg.norm` rather than a file."""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from ralm import progress
from ralm.types import Document

SKIP = frozenset({"test", "tests", "testing", "_tests", "idlelib", "lib2to3", "site-packages", "_vendor", "turtledemo",
                  "__pycache__"})
PACKAGES = ("numpy", "pyarrow", "hypothesis", "rich", "torch", "transformers")  # in this order, as far as they are needed
SHORTEST = 20  # words; a shorter docstring says little more than the name


def topics() -> Iterator[Document]:
    """The Python language reference, as `help()` shows it: one document per topic."""
    from pydoc_data.topics import topics as texts

    for name, text in sorted(texts.items()):
        title = text.strip().partition("\n")[0].strip()
        yield Document(f"python/{name}", text.strip(), title, f"pydoc_data.topics['{name}']", "PSF-2.0",
                       metadata={"kind": "reference"})


def docstrings(root: Path, prefix: str = "") -> Iterator[Document]:
    """Docstrings of the modules below `root`, in a fixed order: id and title are the dotted name."""
    seen: set[str] = set()
    for file in _sources(root):
        inside = file.relative_to(root).with_suffix("").parts
        module = ".".join([*([prefix] if prefix else []), *(p for p in inside if p != "__init__")])
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # templates and old code that this Python cannot read hold no docstrings
            continue
        for name, text in _documented(tree, module):
            if len(text.split()) >= SHORTEST and name not in seen:
                seen.add(name)
                yield Document(name, text, name, f"docstring of {name}",
                               metadata={"kind": "docstring", "package": name.partition(".")[0]})


def _sources(root: Path) -> Iterator[Path]:
    """Python files below `root` in a fixed order; folders in SKIP are not entered (site-packages may lie inside the library)."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(d for d in below if d not in SKIP)
        yield from (Path(folder, n) for n in sorted(names) if n.endswith(".py"))


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function and of what is defined directly inside it."""
    if text := ast.get_docstring(node):
        yield name, inspect.cleandoc(text)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")


def documentation(words: int = 720_000, packages: Sequence[str] = PACKAGES) -> Iterator[Document]:
    """The language reference, then the standard library, then installed packages, until about `words` words are read."""
    folders = [("", Path(sysconfig.get_paths()["stdlib"]))]
    site = Path(sysconfig.get_paths()["purelib"])
    folders += [(p, site / p) for p in packages if (site / p).is_dir()]
    with progress.task("read documentation", words, "words") as advance:
        count = 0
        for documents in (topics(), *(docstrings(root, prefix) for prefix, root in folders)):
            for document in documents:
                size = len(document.text.split())
                count += size
                advance(size)
                yield document
                if count >= words:
                    return
