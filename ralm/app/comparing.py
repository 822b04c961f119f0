"""`ralm score --compare`: several systems in one table, how much of the texts is stored already, and which documents helped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ralm.app.parts import Parts
from ralm.app.terminal import bold, count, duration, facts, number, table
from ralm.errors import UsageError
from ralm.eval.leakage import HALF

MOVED = 3  # documents named for a text
FEW = (0.125, 0.25, 0.5, 1.0)  # of the curve, in a table


def compared(parts: Parts, named: Mapping[str, tuple[str, str]], texts: Sequence[Any], when: str, where: str | None,
             window: int | None, stride: int | None, exclude_self: bool, save: Path | None, evidence: int = 2) -> dict[str, Any]:
    """What `compare` returns, of systems by name: (how, model). All of them are made, then scored."""
    from ralm.eval.compare import compare
    from ralm.how import fusion
    from ralm.how.output import innermost

    reads = {name: innermost(fusion(how)).how == "input" for name, (how, _) in named.items()}
    if when != "once" and not any(reads.values()):
        raise UsageError(f"--when {when} is a schedule for passages, none of {', '.join(named)} reads any; leave it out")
    systems = {name: parts.system(lm, how, when if reads[name] else "once", where, window) for name, (how, lm) in named.items()}
    neighbours = next((s.neighbours for s in systems.values() if s.neighbours is not None), None)
    return compare(systems, texts, window, stride, exclude_self, save, neighbours, evidence)


def lines(data: Mapping[str, Any]) -> Iterator[str]:
    yield from system_lines(data)
    if data["overlap"]:
        yield ""
        yield from overlap_lines(data["overlap"], {r["name"]: r["curve"] for r in data["systems"] if r["curve"]})
    yield ""
    yield from evidence_lines(data)
    yield ""
    yield "convention"
    yield from ("  " + line for line in facts(convention(data)))


def system_lines(data: Mapping[str, Any]) -> list[str]:
    """One row a system."""
    rows = []
    for n, r in enumerate(data["systems"]):
        low, high = r["interval"]
        saved = f"{r['difference']:+.4f}" + (f" ({low:+.4f} to {high:+.4f})" if data["documents"] > 1 else "") if n else ""
        rows.append([r["name"], number(r["ppl"], 2), number(r["bits_per_byte"]), saved, f"{r['text']}", f"{r['retrievals']:,}",
                     duration(r["seconds"])])
    return table(rows, ["system", "ppl per token", "bits per byte", "saved", "text", "retrievals", "time"], right=range(1, 7))


def overlap_lines(o: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    """How much of the texts is stored, and bits per byte of each system where chunks that are copied are left out."""
    yield (f"of {count(o['chunks'], 'chunk')} of {o['m']} tokens, beside the {o['nearest']} nearest stored ({o['retriever']}): the "
           f"longest common run is {100 * o['mean_run']:.1f} % of a chunk on average, above {100 * HALF:.0f} % in "
           f"{100 * o['copied']:.1f} % of chunks; {100 * o['common_tokens']:.1f} % of tokens occur there")
    some = {name: [p for p in curve if p["alpha"] in FEW] for name, curve in curves.items()}
    head = ["bits per byte of chunks with a run of at most", *(f"{100 * a:g} %" for a in FEW)]
    rows = [[name, *(number(p["bits_per_byte"]) for p in curve)] for name, curve in some.items()]
    share = ["(their share of the bytes)", *(f"{100 * p['bytes']:.0f} %" for p in next(iter(some.values())))]
    yield from table([*rows, share], head, right=range(1, len(head)))


def evidence_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The texts that each system improved most, and the stored documents that moved them."""
    first = data["systems"][0]["name"]
    for r in data["systems"][1:]:
        for e in r["evidence"]:
            moved = {name: w for name, w in e["documents"].items() if w > 0}
            total = sum(moved.values())
            by = ", ".join(f"{name} {100 * w / total:.0f} %" for name, w in list(moved.items())[:MOVED])
            yield (f"{bold(r['name'])} saves {number(e['bits_per_byte'], 3)} bits a byte of {e['text']}: "
                   + (by or "no document by itself") + (f" and {len(moved) - MOVED:,} more" if len(moved) > MOVED else ""))
    if not any(r.get("evidence") for r in data["systems"]):
        yield f"no text gained on {first}"


def convention(data: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the rows comparable, and where they are not."""
    first = data["systems"][0]
    models = list(dict.fromkeys(r["convention"]["tokenizer"] for r in data["systems"]))
    c = first["convention"]
    return {"over": f"{count(data['documents'], 'document')}, {data['bytes']:,} bytes, the same for all; {c['documents']}",
            "window": f"{data['window']} tokens at most, moved by {data['stride']}, for all; column text: how many of them are the "
                      "text's, the rest is evidence",
            "tokenizer": "; ".join(models) + (": perplexities per token of different tokenizers do not compare, bits per byte do"
                                              if len({r["tokens"] for r in data["systems"]}) > 1 else ""),
            "saved": f"bits per byte less than {first['name']}; in brackets 95 %, paired bootstrap over documents",
            "bos": c["bos"], "average": c["average"], "own documents": c["own_document"], "took": duration(data["seconds"])}
