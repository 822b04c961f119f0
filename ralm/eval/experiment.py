"""A recipe of measurements: one datastore, one model, several ways to read it, each with the figure it is expected to reach.

    python -m ralm.eval.experiment recipes/knnlm_docs.toml [--data ../shared/data] [--work FOLDER] [--plot FILE] [--json]

[store] and [held] name texts: "docs" (Python's documentation and docstrings, on every machine), or files below --data. Every
`every`th document of the source is held out where both come from one. Articles of the files in `spaced` are put into the typography
of WikiText. A run with `share` reads that part of the datastore: the documents carry a number from 0 to 99, and the share is a
filter on it. Expected figures are in nats per token of the held-out text; a run that misses its own by more than `tolerance` makes
the command fail."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

from ralm import progress
from ralm.errors import RalmError, UsageError
from ralm.eval.perplexity import evaluate_perplexity
from ralm.types import Document


def texts(source: dict[str, Any], data: Path) -> Iterator[Document]:
    """The documents a recipe names, at most `documents` of each source, each cut at `characters`."""
    names, most, longest = source["source"], source.get("documents"), source.get("characters")
    for name in [names] if isinstance(names, str) else names:
        for d in islice(_documents(name, source, data), most):
            yield replace(d, text=d.text[:longest], metadata={})


def _documents(name: str, source: dict[str, Any], data: Path) -> Iterator[Document]:
    if name == "docs":
        from ralm.app.corpus import documentation

        yield from documentation(source.get("words", 300_000))
        return
    file = data / name
    if not file.exists():
        raise UsageError(f"{file} is not there; give the folder of the data sets with --data")
    if name.endswith(".raw.txt.zst"):  # WikiText: one text, articles begin with " = Title = "
        import re

        import zstandard

        text = zstandard.ZstdDecompressor().stream_reader(file.open("rb")).read().decode()
        for n, article in enumerate(re.split(r"(?m)^(?= = [^=].* = $)", text)):
            if article.strip():
                yield Document(f"{Path(name).name}#{n}", article.strip())
        return
    if name in source.get("spaced", ()):
        from ralm.train.gpt_data import documents as articles
        from ralm.train.gpt_data import spaced

        for title, article in articles(file):
            yield Document(f"{name}/{title}", spaced(title, article), title)
        return
    from ralm.what.read import read

    yield from read(file)


def documents(recipe: dict[str, Any], data: Path) -> tuple[list[Document], list[Document]]:
    """(to be stored, to be scored)."""
    stored, held = list(texts(recipe["store"], data)), None
    if recipe["held"].get("source", recipe["store"]["source"]) == recipe["store"]["source"]:
        every = recipe["held"]["every"]
        held, stored = stored[::every], [d for n, d in enumerate(stored) if n % every]
    else:
        held = list(texts(recipe["held"], data))
    most, size, some = recipe["held"].get("total", 10 ** 9), 0, []
    for d in held:
        if d.text.strip() and size < most:
            some.append(replace(d, text=d.text[:most - size]))
            size += len(some[-1].text)
    return [replace(d, metadata={"part": crc32(d.id.encode()) % 100}) for d in stored], some


def run(recipe: dict[str, Any], data: Path, work: Path) -> list[dict[str, Any]]:
    """Build what the recipe needs (kept in `work`, gone on with where it was stopped) and measure every run of it."""
    from ralm.lm import load
    from ralm.model import RALM
    from ralm.what.datastore import Datastore
    from ralm.what.token_store import TokenStore

    lm = load(recipe["lm"])
    stored, held = documents(recipe, data)
    kb = Datastore.build(work / f"{recipe['name']}.ralm", stored)
    tokens = TokenStore.build(kb, lm, **recipe.get("tokens", {}))
    out = []
    with progress.task(recipe["name"], total=len(recipe["run"]), unit="runs") as advance:
        for wanted in recipe["run"]:
            share, how = wanted.get("share", 1.0), wanted["how"]
            where = None if share == 1 else f"part < {round(100 * share)}"
            system = RALM(lm, how=how, tokens=tokens, where=where)
            got = evaluate_perplexity(system, held, window=wanted.get("window"), stride=wanted.get("stride"))
            off = None if "nats" not in wanted else got["nats_per_token"] - wanted["nats"]
            out.append({"how": how, "share": share, "nats_per_token": got["nats_per_token"], "ppl": got["ppl"],
                        "bits_per_byte": got["bits_per_byte"], "word_ppl": got["word_ppl"], "tokens": got["tokens"],
                        "interval": got["intervals"]["nats_per_token"], "rows": len(tokens), "expected": wanted.get("nats"),
                        "tolerance": wanted.get("tolerance", recipe.get("tolerance", 0.02)), "off": off, "seconds": got["seconds"],
                        "convention": got["convention"]})
            advance(1)
    return out


def lines(recipe: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{recipe['name']}: {recipe['title']}"
    for r in rows:
        verdict = ""
        if r["off"] is not None:
            verdict = f"  expected {r['expected']:.3f}: " + ("as expected" if good(r) else f"off by {r['off']:+.3f}")
        yield (f"  {r['how']:<44} share {r['share']:<5g} {r['nats_per_token']:.4f} nats a token, perplexity {r['ppl']:.2f}, "
               f"{r['bits_per_byte']:.4f} bits a byte{verdict}")
    c = rows[0]["convention"]
    yield (f"  {rows[0]['tokens']:,} tokens of {c['tokenizer']}; window {c['window']}, stride {c['stride']}; token store of "
           f"{rows[0]['rows']:,} rows; one BOS a window")


def good(row: dict[str, Any]) -> bool:
    return row["off"] is None or abs(row["off"]) <= row["tolerance"]


def plot(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    """Perplexity over the share of the datastore, one line a method."""
    from ralm.errors import need

    need("matplotlib", "a plot", "plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for how in dict.fromkeys(r["how"] for r in rows):
        some = sorted((r for r in rows if r["how"] == how), key=lambda r: r["share"])
        if len(some) > 1:
            axes.plot([100 * r["share"] for r in some], [r["ppl"] for r in some], marker="o", label=how)
        else:
            axes.axhline(some[0]["ppl"], linestyle="--", color="grey", label=how)
    axes.set(xscale="log", xlabel="share of the datastore, %", ylabel="perplexity per token", title=title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)


def arguments(text: str | None) -> argparse.ArgumentParser:
    """What every command that runs a recipe takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--json", action="store_true")
    return parser


def command(a: argparse.Namespace, measure: Callable[[dict[str, Any]], list[dict[str, Any]]], lines: Callable,
            dumps: Callable) -> int:
    """Read the recipe, measure, print; the exit code: 0 where every row is as expected."""
    from ralm.app.terminal import Talk

    try:
        progress.use(Talk())
        recipe = {"name": a.recipe.stem} | tomllib.loads(a.recipe.read_text(encoding="utf-8"))
        a.work.mkdir(parents=True, exist_ok=True)
        rows = measure(recipe)
    except RalmError as e:
        sys.stderr.write(f"{e}\n")
        return e.exit_code
    sys.stdout.write((dumps(rows) if a.json else "\n".join(lines(recipe, rows))) + "\n")
    return 0 if all(map(good, rows)) else 1


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()

    def measure(recipe: dict[str, Any]) -> list[dict[str, Any]]:
        rows = run(recipe, a.data, a.work)
        if a.plot:
            plot(rows, a.plot, recipe["title"])
        return rows

    return command(a, measure, lines, lambda rows: json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(main())
