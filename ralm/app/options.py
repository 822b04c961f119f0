"""The arguments that several commands share: named, explained and checked once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ralm.errors import ReadError, UsageError

if TYPE_CHECKING:
    from ralm.types import Document

READS = ("txt md html pdf docx jsonl csv parquet, .gz and .zst of them, a DPR psgs_w100.tsv, a BEIR folder or zip; folders "
         "recursively.")
StoreArg = Annotated[Path, Parameter(name="STORE", help="Folder of the datastore.")]
Paths = Annotated[Path, Parameter(name="PATH", help=f"Files and folders: {READS}")]
Files = Annotated[Path, Parameter(name="FILE", help="Texts, in any format that ralm build reads.")]
Words = Annotated[str, Parameter(help="Text; several words without quotes are joined by spaces.")]
Strict = Annotated[bool, Parameter(show_default=False, help="Stop at the first file that cannot be read instead of skipping it.")]
Index = Annotated[list[str] | None, Parameter(help="Indexes by spec, separated by commas: bm25, dense, bm25:form=atire, "
                                                   "dense:minilm.")]
Where = Annotated[str | None, Parameter(help="Filter on document fields and metadata, as in SQL: \"year >= 2020 and "
                                             "licence = 'cc0'\".")]
At = Annotated[int | None, Parameter(help="Read the datastore as it was at this version (see ralm history).")]
Finder = Annotated[str, Parameter(name="--retriever", help="tfidf, bm25, dense or hybrid, with options: bm25:k1=1.2,b=0.75. "
                                                           "auto: the best that is built.")]
HowArg = Annotated[str, Parameter(help="How what is retrieved enters the model: none, prepend:k=2, ensemble:k=4,weights=posterior "
                                 "(passages take 256 tokens of the window, half of it where it is smaller; tokens=N sets that); "
                                 "knn:k=1024,lam=0.25,temperature=10 (needs ralm tokens); retro:k=2 (needs ralm neighbours and a "
                                 "RETRO, bundled:retro, as --lm); prepend:k=1+knn:lam=0.2, retro+knn.")]
TokensArg = Annotated[str, Parameter(name="--tokens", help="With --how knn: the token store, by the name ralm tokens gave it.")]
DatabaseArg = Annotated[str, Parameter(name="--database", help="With --how retro: the neighbour database, by the name ralm "
                                                               "neighbours gave it; --retriever says what searches it.")]
AskHow = Annotated[str | None, Parameter(name="--how", help="How a language model is given the passages: prepend, "
                                                            "ensemble:weights=posterior. A reader needs none.")]
WhenArg = Annotated[str, Parameter(help="When to retrieve: once, every:4, adaptive:theta=0.4.")]
LM = Annotated[str, Parameter(help="bundled:base, bundled:reader, bundled:retro, hf:NAME or hf:FOLDER, retro:FOLDER, "
                                   "remote:URL#NAME.")]


def positive(name: str, value: int | None) -> int | None:
    """Raise UsageError for a number of things below 1."""
    if value is not None and value < 1:
        raise UsageError(f"{name} is {value}, which asks for nothing; use at least 1")
    return value


def writable(name: str, path: Path | None) -> None:
    """Raise UsageError for a file to be written into a folder that is not there: told before the work, not after it."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{name} {path} cannot be written: there is no folder {path.parent}; make it, or choose another path")


def said(what: str, text: str) -> str:
    """Raise UsageError for an empty query, question or prompt."""
    if not text.strip():
        raise UsageError(f"the {what} is empty; say what to look for")
    return text


def systems(given: list[str], lm: str) -> dict[str, tuple[str, str]]:
    """{name: (how, model)} out of `--compare none,prepend:k=1,tokens=200,knn@hf:NAME`: a comma begins a new system unless an option
    (key=value, or a number) of the last one follows. Raises UsageError for an empty name or one that comes twice."""
    names: list[str] = []
    for text in given:
        for n, part in enumerate(text.split(",")):
            part = part.strip()
            if not part:
                raise UsageError(f"'{text}' names an empty system; write names separated by commas, like none,prepend:k=1")
            if n and re.match(r"[a-z_]+=|[^a-z]", part):
                names[-1] += "," + part
            else:
                names.append(part)
    if twice := [n for n in names if names.count(n) > 1]:
        raise UsageError(f"'{twice[0]}' is compared with itself; name every system once")
    split = {name: name.partition("@") for name in names}
    if bare := [name for name, (how, mark, model) in split.items() if not how or (mark and not model)]:
        raise UsageError(f"'{bare[0]}' lacks a name beside @; write HOW@MODEL, like none@bundled:base")
    return {name: (how, model or lm) for name, (how, _, model) in split.items()}


def specs(given: list[str] | None, default: str = "") -> list[str]:
    """Spec strings out of `--index bm25:form=atire,k1=1.2,dense --index …`: a comma starts a new spec where what follows is a
    name, and goes on with the last one's options where it is key=value."""
    out: list[str] = []
    for text in given if given else [default] if default else []:
        first = True
        for part in text.split(","):
            part = part.strip()
            if not part:
                raise UsageError(f"'{text}' names an empty part; write names separated by commas, like bm25,dense")
            head, colon, _ = part.partition(":")
            if not first and "=" in head and not colon:
                out[-1] += "," + part
            else:
                out.append(part)
            first = False
    return list(dict.fromkeys(out))


def documents(command: str, paths: tuple[Path, ...], strict: bool, skipped: list[Any]) -> Iterable[Document]:
    """Documents of the given files; the first one is read at once, so that nothing is created where there is nothing to read.

    Raises UsageError for no paths, ReadError where no file gives a document."""
    from ralm.what.read import read

    if not paths:
        raise UsageError(f"{command} needs at least one file or folder: ralm {command} STORE PATH...")
    for path in paths:
        if (path / "store.json").is_file() and (path / "documents.lance").is_dir():
            raise UsageError(f"{path} is a datastore, not a folder of texts; the order is ralm {command} STORE PATH...")
    found = iter(read(*paths, strict=strict, skipped=skipped))
    first = next(found, None)
    if first is None:
        why = "".join(f" ({len(skipped)} skipped, like {s['file']}: {s['reason']})" for s in map(skip, skipped[:1]))
        raise ReadError(f"no documents in {', '.join(map(str, paths))}{why}; see ralm build --help for what can be read")
    return chain([first], found)


def skip(skip: Any) -> dict[str, str]:
    """A skipped file as {file, reason}."""
    return {"file": str(skip[0]), "reason": " ".join(str(skip[1]).split())}
