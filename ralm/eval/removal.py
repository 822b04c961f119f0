"""Taking books out (the opt-out experiment of SILO, Min et al. 2023): what an author's other book costs a model with a
token store of many books, with one book of the author less, and with none of the author's left.

    python -m ralm.eval.removal recipes/knnlm_removal.toml [--data ../shared/data] [--work FOLDER] [--json]

The books of [store] are put in, those of [[case]] are scored and never put in. Each case works on a copy of the store, removes with
`Datastore.remove`, as `ralm remove` does, and scores at once: no index is rebuilt. A figure that misses the one the recipe expects
by more than `tolerance` nats a token makes the command fail."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ralm.errors import UsageError
from ralm.eval.experiment import arguments, command, good
from ralm.eval.perplexity import evaluate_perplexity
from ralm.types import Document

STEPS = ("alone", "all", "one_removed", "author_removed")  # the model without a store, then the store as books leave it


def books(file: Path) -> Iterator[Document]:
    """The books of a collection whose `path` says Author/Title; they get that as their id."""
    from ralm.what.read import read

    if not file.exists():
        raise UsageError(f"{file} is not there; give the folder of the data sets with --data")
    for d in read(file):
        author, _, title = str(d.metadata["path"]).removesuffix(".md").partition("/")
        yield Document(f"{author}/{title}", d.text, title, metadata={"author": author})


def run(recipe: dict[str, Any], library: Sequence[Document], work: Path) -> list[dict[str, Any]]:
    """Every case of a recipe, a row for each step and text: {"case", "step", "scored", "removed", "nats_per_token", "ppl", ...}."""
    from ralm.lm import load
    from ralm.what.datastore import Datastore
    from ralm.what.token_store import TokenStore

    lm = load(recipe["lm"]) if isinstance(recipe["lm"], str) else recipe["lm"]
    by_id = {d.id: d for d in library}
    stored = [d for d in library if _wanted(d.id, recipe["store"]["books"])]
    wanted = {name for case in recipe["case"] for name in (case["held"], case["one"], case["control"])}
    if missing := sorted(wanted - by_id.keys()):
        raise UsageError(f"the recipe names '{missing[0]}', which is not among the {len(by_id)} books; ids are Author/Title")
    if held := sorted({c[n] for c in recipe["case"] for n in ("held", "control")} & {d.id for d in stored}):
        raise UsageError(f"'{held[0]}' is to be scored and to be stored; leave it out of the store")
    kb = Datastore.build(work / f"{recipe['name']}.ralm", stored)
    tokens = TokenStore.build(kb, lm, **recipe.get("tokens", {}))
    out = []
    for case in recipe["case"]:
        texts = [replace(by_id[case[n]], text=by_id[case[n]].text[:recipe.get("characters")]) for n in ("held", "control")]
        author = by_id[case["held"]].metadata["author"]
        copy = work / f"{recipe['name']}.copy.ralm"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(kb.path, copy)
        try:
            out += _case(recipe, case, Datastore.open(copy), lm, tokens.name, texts, author)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
    return out


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    """Author/Title, or Author/ for all of an author's."""
    return any(name == p or (p.endswith("/") and name.startswith(p)) for p in patterns)


def _case(recipe: dict[str, Any], case: dict[str, Any], kb: Any, lm: Any, name: str, texts: Sequence[Document],
          author: str) -> Iterator[dict[str, Any]]:
    from ralm.model import RALM
    from ralm.what.token_store import TokenStore

    for step in STEPS:
        gone = []
        if step == "one_removed":
            gone = [case["one"]]
        elif step == "author_removed":
            gone = [d.id for d in kb.documents() if d.metadata["author"] == author]
        if gone:
            kb.remove(gone)
        tokens = TokenStore(kb, lm, name)
        system = RALM(lm) if step == "alone" else RALM(lm, how=recipe["how"], tokens=tokens)
        for scored, text in zip(("held", "control"), texts):
            got = evaluate_perplexity(system, [text], exclude_self=False)
            expected = case.get("expected", {}).get(scored, {}).get(step)
            off = None if expected is None else got["nats_per_token"] - expected
            yield {"case": author, "step": step, "scored": scored, "text": text.id, "removed": gone, "documents": len(kb),
                   "nats_per_token": got["nats_per_token"], "ppl": got["ppl"], "tokens": got["tokens"], "rows": len(tokens),
                   "expected": expected, "tolerance": recipe["tolerance"], "off": off, "seconds": got["seconds"],
                   "convention": got["convention"]}


def lines(recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{recipe['name']}: {recipe['title']}"
    for r in rows:
        if r["step"] == STEPS[0] and r["scored"] == "held":
            yield f"  {r['case']}"
        verdict = "" if r["off"] is None else "  as expected" if good(r) else f"  expected {r['expected']:.4f}"
        yield (f"    {r['step'].replace('_', ' '):<15} {r['text']:<40.40} {r['nats_per_token']:.4f} nats a token, perplexity "
               f"{r['ppl']:.2f}, {r['documents']} books{verdict}")
    c = rows[-1]["convention"]
    yield f"  {c['how']} over {c['tokens']}; {c['tokenizer']}; window {c['window']}, stride {c['stride']}"


def main() -> int:
    from ralm.app.terminal import dumps

    a = arguments(__doc__).parse_args()
    return command(a, lambda recipe: run(recipe, list(books(a.data / recipe["store"]["source"])), a.work), lines,
                   lambda rows: dumps({"rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
