"""Real text that every machine with the packages has: the docstrings of all installed Python files."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
ROOTS = sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]


def by_file(*roots: str) -> Iterator[list[str]]:
    """The docstrings of one file after the other, below the roots (default: all); files that Python cannot parse are left out."""
    for root in roots or ROOTS:
        for file in sorted(Path(root).rglob("*.py")):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
                continue
            yield [d for n in ast.walk(tree) if isinstance(n, DOCUMENTED) and (d := ast.get_docstring(n))]
