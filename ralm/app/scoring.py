"""`ralm score`: perplexity and bits per byte of texts, alone or with retrieval, with the convention that makes them comparable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app import comparing, options
from ralm.app.options import LM, At, Files, Finder, HowArg, StoreArg, Strict, TokensArg, WhenArg, Where, positive, skip, writable
from ralm.app.parts import Parts
from ralm.app.terminal import Output, bold, count, duration, facts, number, table
from ralm.errors import UsageError

SHOWN = 10  # documents listed one by one


def score(store: StoreArg, /, *files: Files, lm: LM = "bundled:base", how: HowArg = "none",
          compare: Annotated[list[str] | None, Parameter(help="Instead of --how: several systems in one table, separated by "
                                                              "commas, each a HOW, or HOW@MODEL where the model is not --lm: "
                                                              "none,prepend:k=1,tokens=200,none@hf:NAME. The others are "
                                                              "compared with the first.")] = None,
          when: WhenArg = "once",
          window: Annotated[int | None, Parameter(help="Most tokens the model sees at once, evidence included; default: all it "
                                                       "can.")] = None,
          stride: Annotated[int | None, Parameter(help="Tokens predicted per window after the first; default: half of what the "
                                                       "window leaves for text.")] = None,
          exclude_self: Annotated[bool, Parameter(show_default=False, help="A text that is itself in the datastore (same "
                                                  "id or text) is not retrieved while it is scored. Without it, it may be, "
                                                  "which flatters the figures.")] = False,
          retriever: Finder = "auto", tokens: TokensArg = "default", database: options.DatabaseArg = "default",
          where: Where = None, at: At = None, strict: Strict = False,
          save: Annotated[Path | None, Parameter(help="Keep each document's figures in this file (JSON lines); a run that was "
                                                      "stopped goes on from it. With --compare, a file per system.")] = None,
          out: Output = Output()) -> None:  # noqa: B008
    """Perplexity and bits per byte of texts; every document of FILE is scored on its own, no context crosses.

    JSON: ppl (per token), bits_per_byte, nats_per_token, tokens, bytes, convention, seconds; word_ppl, words, documents, intervals,
    retrievals (of passages, and of neighbours of tokens), tokens_searched, passages_read, passages_cut, excluded_documents,
    rows [{id, nats, tokens, words, bytes, ...}], version. With --how retro: overlap {mean_run, copied, common_tokens, chunks, m,
    nearest, retriever}, how much of the texts is stored, and curve [{alpha, bits_per_byte, bytes, chunks}] without copied chunks.
    With --compare: systems [{name, how, lm, the same figures, curve, difference (bits per byte it saves of the first's), interval,
    window, text, stride, evidence [{text, bits_per_byte, read, documents {id: what it moved}}]}], overlap where there are
    neighbours, documents, bytes, window, stride, seconds, version."""
    from ralm.eval.perplexity import evaluate_perplexity

    positive("--window", window)
    positive("--stride", stride)
    writable("--save", save)
    if compare and how != "none":
        raise UsageError(f"--how {how} and --compare exclude each other; name it among those that are compared")
    named = options.systems(compare or [], lm)
    parts, skipped = Parts(store, at, retriever, tokens, database), []
    for spec, model in named.values():
        parts.check(model, spec)
    texts = list(options.documents("score", files, strict, skipped))
    if named:
        if any(spec != "none" for spec, _ in named.values()) and not exclude_self:
            _warn(parts.kb, texts)
        result = comparing.compared(parts, named, texts, when, where, window, stride, exclude_self, save)
        for row in result["systems"]:
            row["rows"] = _rows(row["rows"])
        shown = comparing.lines
    else:
        system = parts.system(lm, how, when, where, window)
        if system.how.how != "none" and not exclude_self:
            _warn(parts.kb, texts)
        near = system.neighbours
        result = evaluate_perplexity(system, texts, window=window, stride=stride, exclude_self=exclude_self, ledger=save,
                                     m=None if near is None else near.m)
        if near is not None:
            result |= _overlap(system, texts, result["rows"])
        result["rows"] = _rows(result["rows"])
        shown = _lines
    data = result | {"version": parts.kb.version, "skipped": [skip(s) for s in skipped]}
    out.show(data, lambda: shown(data))


def _overlap(system: Any, texts: list[Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How much of the texts stands in the neighbour database, and bits per byte where copied chunks are left out."""
    from ralm.eval.compare import chunk_nats, told
    from ralm.eval.leakage import leaks

    found = leaks(system.neighbours, system.lm.tokenizer, texts, {r["id"]: r["excluded"] for r in rows}, system.where)
    return {"overlap": told(found, system.neighbours), "curve": found.curve(chunk_nats(rows))}


def _warn(kb: Any, texts: list[Any]) -> None:
    inside = [d.id for d in texts if kb.has(d.id)]
    if inside:
        progress.note(f"{count(len(inside), 'text')} to be scored, like '{inside[0]}', may find itself in the datastore; "
                      "--exclude-self prevents that")


def _rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("sha256", "convention", "chunk_nats")} for row in rows]


def _cut(data: dict[str, Any]) -> str:
    read, cut = data["passages_read"], data["passages_cut"]
    return f"; {cut:,} of {count(read, 'passage')} cut to the tokens they may take" if cut else ""


def _lines(data: dict[str, Any]) -> Iterator[str]:
    low, high = data["intervals"]["ppl"]
    between = f"  ({number(low, 2)} – {number(high, 2)})" if data["documents"] > 1 else ""
    yield from facts({bold("perplexity"): number(data["ppl"], 3) + " per token" + between,
                      "bits per byte": number(data["bits_per_byte"]), "nats per token": number(data["nats_per_token"]),
                      "word perplexity": _short(data["word_ppl"]),
                      "over": f"{count(data['documents'], 'document')}, {count(data['tokens'], 'token')}, "
                              f"{count(data['words'], 'word')}, {count(data['bytes'], 'byte')}",
                      "retrievals": f"{data['retrievals']:,}" + _cut(data), "took": duration(data["seconds"])})
    if len(data["rows"]) > 1:
        yield ""
        rows = [[r["id"], f"{r['tokens']:,}", number(r["nats"] / r["tokens"] if r["tokens"] else None)]
                for r in data["rows"][:SHOWN]]
        yield from table(rows, ["document", "tokens", "nats per token"], right=[1, 2])
        if len(data["rows"]) > SHOWN:
            yield f"… and {len(data['rows']) - SHOWN:,} more (--json lists all)"
    if "overlap" in data:
        yield ""
        yield from comparing.overlap_lines(data["overlap"], {data["convention"]["how"]: data["curve"]})
    yield ""
    yield "convention"
    yield from ("  " + line for line in facts({k: v for k, v in data["convention"].items() if v is not None}))


def _short(value: float) -> str:
    return number(value, 2) if value < 1e6 else f"{value:.3g}"
