"""What making neighbours would take, from a sample that is cut, analysed and encoded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

from ralm.index import manifest
from ralm.lm.pieces import spans
from ralm.registry import parse
from ralm.what import neighbour_build
from ralm.what.neighbours import FIRST, spec_of

CHARACTERS = 400_000  # of documents that are cut, at most
ENCODED = 64  # chunks that are encoded
POSTING = 9  # bytes: row, how often, and the term the other way round


def estimate(store, lm: Any, name: str = "", m: int | None = None, retriever: str | None = None) -> dict[str, float]:
    """What `NeighbourStore.build` would take: {"chunks", "tokens", "bytes", "seconds"}; chunks to cut, and what their index takes.

    An index that is not there yet takes all chunks in. Raises what building would raise for settings that do not fit."""
    folder = neighbour_build.chunks_of(store, name)
    now = manifest.load(folder)
    if now is not None:
        neighbour_build.check(store, folder, now, lm, m)
    settings = neighbour_build.settled(lm, m) if now is None else now.settings
    first, there = (now.stop, sum(p.rows for p in now.parts)) if now else (0, 0)
    texts, read, tokens, began = [], 0, 0, time.perf_counter()
    for text in _sample(store, first if store.characters(first) else 0):
        ids, _, ends = spans(neighbour_build.tokenizer_of(lm), text)
        cuts = [0, *ends[settings["m"] - 1::settings["m"]].tolist(), len(text)]
        texts += [text[a:b] for a, b in pairwise(cuts) if a < b]
        read, tokens = read + len(text), tokens + len(ids)
    seconds, share = time.perf_counter() - began, store.characters(first) / max(1, read)
    chunks = round(len(texts) * share)
    size = tokens * neighbour_build.token_type(settings["vocab"])().itemsize + 4 * len(texts)
    plan = {"chunks": chunks, "tokens": round(tokens * share), "bytes": round(size * share), "seconds": seconds * share}
    spec = spec_of(retriever or (now.facts.get("retriever", FIRST) if now else FIRST))
    for artifact, more in _costs(spec, texts):
        built = manifest.load(folder.parent / "index" / artifact)
        wanted = chunks + there - (sum(p.rows for p in built.parts) if built else 0)
        if wanted > 0 and texts:
            one, each = more(built)
            plan["bytes"] += round(wanted * one)
            plan["seconds"] += wanted * each
    return plan


def _sample(store, first: int) -> Iterator[str]:
    size = 0
    for _, source in store.states(first):
        yield source.text[:CHARACTERS - size]
        size += len(source.text)
        if size >= CHARACTERS:
            return


def _costs(spec: str, texts: Sequence[str]):
    """(artifact, a call that gives bytes and seconds a chunk) of every index that a retriever needs."""
    asked = parse(spec)
    parts = str(asked.options.get("parts", "bm25+dense")).split("+") if asked.name == "hybrid" else [spec]
    for part in parts:
        p = parse(part)
        if p.name == "dense":
            named = p.options.get("name", "")
            encoder = str(p.args[0] if p.args else p.options.get("encoder") or "minilm")
            yield (f"dense-{named}" if named else "dense",
                   lambda built, e=encoder: _dense(built.settings["encoder"] if built else e, texts))
        else:
            yield "bm25", lambda built: _sparse(texts)


def _sparse(texts: Sequence[str]) -> tuple[float, float]:
    from ralm.index.analyse import Analyser, Settings

    began = time.perf_counter()
    terms = len(Analyser(Settings()).count(texts)[1])
    return POSTING * terms / len(texts) + 20, 2 * (time.perf_counter() - began) / len(texts)


def _dense(spec: str, texts: Sequence[str]) -> tuple[float, float]:
    from ralm.index.encode import encoder

    model, some = encoder(spec), list(islice(texts, ENCODED))
    model.encode(some[:2])  # loads the weights
    began = time.perf_counter()
    model.encode(some)
    return 2 * model.dim + 8, (time.perf_counter() - began) / len(some)
