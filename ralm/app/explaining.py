"""`ralm explain`: what retrieval changed, token by token, and which documents did it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from cyclopts import Parameter

from ralm import progress
from ralm.app import options
from ralm.app.asking import cited
from ralm.app.options import LM, At, Finder, HowArg, StoreArg, TokensArg, WhenArg, Where, Words, positive, said, writable
from ralm.app.parts import Parts
from ralm.app.terminal import Output, bold, columns, count, dim, number, table, wrapped
from ralm.errors import UsageError

if TYPE_CHECKING:
    from ralm.model import RALM
    from ralm.provenance import Provenance

SHOWN = 12  # tokens, runs and documents that are listed where text is printed
LEAST = 3  # tokens of a run that is listed


def explain(store: StoreArg, /, *text: Words, lm: LM = "bundled:base", how: HowArg = "knn", when: WhenArg = "once",
            file: Annotated[Path | None, Parameter(help="Read the text from here; without it and TEXT, from stdin.")] = None,
            tokens: TokensArg = "default", database: options.DatabaseArg = "default", retriever: Finder = "auto",
            where: Where = None, at: At = None,
            exclude_self: Annotated[bool, Parameter(show_default=False, help="Leave out documents that are this text.")] = False,
            exclude: Annotated[list[str] | None, Parameter(help="Id of a document to leave out; several are allowed.")] = None,
            window: Annotated[int | None, Parameter(help="Most tokens the model sees at once.")] = None,
            stride: Annotated[int | None, Parameter(help="Tokens predicted per window after the first.")] = None,
            neighbours: Annotated[int, Parameter(help="How many are listed for a token, the heaviest first.")] = 8,
            html: Annotated[Path | None, Parameter(help="Also write a page to read in a browser; it needs no network.")] = None,
            out: Output = Output()) -> None:  # noqa: B008
    """Each token's probability by the model alone and with what was retrieved, and what moved it: with --how knn the tokens of the
    datastore whose contexts were most alike, with prepend and ensemble the passages in force, with retro the neighbours of the
    chunk in force and what was copied from them.

    JSON: tokens [{text, p_lm, p_knn, p, neighbours [{left, target, document, start, distance, weight}]}], documents {id: weight},
    convention; with passages and with retro, evidence [{first, stop, query, kind, passages}]: the tokens [first, stop) under it.
    target is at character start of the stored document. A document's weight is the number of tokens whose probability it supplied;
    with passages and retro, the nats they moved. With retro, tokens have copied (null, or the longest run that ends there and
    stands in a neighbour: {tokens, document, chunk, start, end}), and copies lists such runs [{first, stop, nats, ...}]."""
    from ralm.how import fusion

    if fusion(how).how == "none":
        raise UsageError(f"with --how {how} nothing is retrieved, so there is nothing to explain; use --how knn, prepend or "
                         "retro")
    positive("--neighbours", neighbours)
    positive("--window", window)
    positive("--stride", stride)
    writable("--html", html)
    given = _text(text, file)
    system = Parts(store, at, retriever, tokens, database).system(lm, how, when, where, window)
    left_out = [*(exclude or ()), *(_own(system, given) if exclude_self else ())]
    made = system.explain(given, window=window, stride=stride, exclude=left_out, neighbours=neighbours)
    data = as_json(system, made)
    if html is not None:
        from ralm.app.explained import page
        from ralm.eval.files import whole

        with whole(html) as f:
            f.write(page(data))
        progress.note(f"written to {html}")
    out.show(data, lambda: _lines(data, given))


def _text(words: tuple[str, ...], file: Path | None) -> str:
    """The text to explain: TEXT, a file, or stdin."""
    from ralm.eval.files import opened

    if file is not None:
        if words:
            raise UsageError("give the text itself or --file FILE, not both")
        with opened(file) as f:
            return said("text", f.read())
    if not words:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("there is no text; give TEXT, --file FILE, or pipe it in")
        return said("text", sys.stdin.read())
    if len(words) == 1 and Path(words[0]).is_file():
        progress.note(f"explaining the words '{words[0]}'; --file {words[0]} reads the file")
    return said("text", " ".join(words))


def _own(system: RALM, text: str) -> list[str]:
    from ralm.eval.perplexity import own_documents
    from ralm.types import Document

    return own_documents(system.store, [Document("", text)])[""]


def as_json(system: RALM, made: Provenance) -> dict[str, Any]:
    """A `Provenance` as the fields that `ralm explain --json` promises."""
    p_knn = made.p_knn if made.p_knn is not None else np.full(len(made.tokens), np.nan)
    near = made.neighbours or [[] for _ in made.tokens]
    rows = [{"text": text, "p_lm": float(a), "p_knn": float(b), "p": float(c),
             "neighbours": [{"left": n.left, "target": n.target, "document": n.document, "start": n.start, "distance": n.distance,
                             "weight": n.weight} for n in some]}
            for text, a, b, c, some in zip(made.tokens, np.exp(made.logp_lm), p_knn, np.exp(made.logp), near)]
    data = {"tokens": rows, "documents": made.documents, "convention": made.convention}
    if made.copied is not None:
        for row, copy in zip(rows, made.copied):
            row["copied"] = copy and asdict(copy)
        data["copies"] = [{"first": max(0, t + 1 - c.tokens), "stop": t + 1,
                           "nats": float(made.gain[max(0, t + 1 - c.tokens):t + 1].sum()), **asdict(c)} for t, c in made.copies()]
    return data | ({"evidence": _evidence(system, made)} if made.convention["retriever"] else {})


def _evidence(system: RALM, made: Provenance) -> list[dict[str, Any]]:
    """Passages or neighbours of chunks, and the tokens [first, stop) they were in force for."""
    from ralm.how.cite import passages

    out = []
    for i, e in enumerate(made.evidence):
        under = np.flatnonzero(made.under == i)
        if len(under):
            out.append({"first": int(under[0]), "stop": int(under[-1]) + 1, "query": e.query, "kind": e.kind,
                        "passages": [cited(c) for c in passages(system.source(e), e.ids, e.scores)]})
    return out


# ---- telling --------------------------------------------------------------------------------------------------------


def gains(data: dict[str, Any]) -> np.ndarray:
    """ln p less ln p of the model alone, per token."""
    tiny = 1e-300
    return np.array([np.log(max(t["p"], tiny)) - np.log(max(t["p_lm"], tiny)) for t in data["tokens"]])


def perplexities(data: dict[str, Any]) -> tuple[float, float]:
    """(of the model alone, of the system)."""
    each = [np.log([max(t[name], 1e-300) for t in data["tokens"]]) for name in ("p_lm", "p")]
    return tuple(float(np.exp(-np.mean(x))) if len(x) else float("nan") for x in each)


def _lines(data: dict[str, Any], text: str) -> Iterator[str]:
    alone, system = perplexities(data)
    gain = gains(data)
    yield (f"{count(len(gain), 'token')}: perplexity {bold(number(system, 2))}, the model alone {number(alone, 2)}; "
           f"{int((gain > 0.01).sum()):,} tokens more probable, {int((gain < -0.01).sum()):,} less")
    if coloured():
        yield ""
        yield from _painted(data, gain)
    yield ""
    yield "what was moved most"
    for i in np.argsort(-np.abs(gain), kind="stable")[:SHOWN].tolist():
        yield from token_lines(data, i, gain[i])
    yield from _copied(data, text)
    yield ""
    unit = "tokens supplied" if data["tokens"] and data["convention"].get("tokens") else "nats moved"
    rows = [[name, number(w, 3)] for name, w in list(data["documents"].items())[:SHOWN]]
    yield from table(rows, ["document", unit], right=[1]) if rows else ["no document moved anything"]
    if len(data["documents"]) > SHOWN:
        yield f"… and {len(data['documents']) - SHOWN:,} more (--json lists all)"


def _copied(data: dict[str, Any], text: str) -> Iterator[str]:
    """The longest runs that stand in a neighbour too, with what retrieval saved over them."""
    found = sorted((c for c in data.get("copies", ()) if c["tokens"] >= LEAST), key=lambda c: -c["tokens"])
    if not found:
        return
    yield ""
    yield "copied spans, the longest"
    words = [t["text"] for t in data["tokens"]]
    rows = [[f"{c['tokens']}", f"{c['nats']:+.2f}", f"{c['document']} {c['start']}–{c['end']}",
             _flat("".join(words[c["first"]:c["stop"]]))[:60]] for c in found[:SHOWN]]
    yield from table(rows, ["tokens", "nats", "document, characters", "text"], right=[0, 1])


def token_lines(data: dict[str, Any], i: int, gain: float) -> Iterator[str]:
    """One token: its probabilities, the end of what stands before it, and the neighbours that say the same."""
    token = data["tokens"][i]
    left = "".join(t["text"] for t in data["tokens"][max(0, i - 8):i])
    knn = "" if np.isnan(token["p_knn"]) else f", neighbours {_p(token['p_knn'])}"
    told = dim(f"model {_p(token['p_lm'])}{knn}, together {_p(token['p'])}")
    here = bold(f"[{_flat(token['text'])}]")
    yield f"  {'+' if gain >= 0 else '−'}{abs(gain):.2f}  …{_flat(left)}{here}  {told}"
    same = [n for n in token["neighbours"] if n["target"] == token["text"]] or token["neighbours"]
    for n in same[:1]:
        place = f"{n['document']} {n['start']}: …{n['left']}[{n['target']}] (weight {n['weight']:.2f})"
        yield from wrapped(place, "         ", most=2)


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _flat(text: str) -> str:
    return " ".join(text.split("\n"))


def coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _painted(data: dict[str, Any], gain: np.ndarray) -> Iterator[str]:
    """The text on coloured ground, wrapped at white space: blue where retrieval helped, red where it cost."""
    line, width = "", 0
    for token, g in zip(data["tokens"], gain.tolist()):
        for n, part in enumerate(token["text"].split("\n")):
            if n or (width + len(part) > columns() and part[:1].isspace()):
                yield line
                line, width = "", 0
            line += _ground(part, g)
            width += len(part)
    yield line


def _ground(text: str, gain: float) -> str:
    shades = (17, 18, 19) if gain > 0 else (52, 88, 124)
    level = sum(abs(gain) > edge for edge in (0.1, 0.7, 2.0))
    return f"\x1b[48;5;{shades[level - 1]}m\x1b[97m{text}\x1b[0m" if level and text else text
