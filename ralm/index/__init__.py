"""SEARCH: text in, the k best chunks out. `retriever("bm25:form=atire", store).search(["who wrote faust"], k=10)`

    spec                                     what it is                                                       artifact
    bm25, bm25:form=atire,k1=1.2,b=0.75      one of five BM25 forms                                           index/bm25
    tfidf                                    tf / |d| * ln(N / df)                                            index/bm25
    dense, dense:minilm, dense:static        nearest vectors of an encoder                                    index/dense[-NAME]
    hybrid, hybrid:...                       the ranks of bm25 and dense fused                                both
    auto (or nothing)                        hybrid where both are there, else the one that is, else bm25"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ralm import progress
from ralm.errors import UsageError, unknown
from ralm.index import manifest
from ralm.registry import make, parse
from ralm.types import Retriever

SPECS = ("bm25", "tfidf", "dense", "hybrid", "auto")


def retriever(spec: str, store) -> Retriever:
    """The retriever that a spec names, ready to search: its index is opened, and built or extended where rows are missing.

    Raises UsageError for an unknown name or option, FingerprintError where the index there was made from something else."""
    name, _, rest = (spec.strip() or "auto").partition(":")
    if name == "auto":
        if rest:
            raise UsageError(f"retriever '{spec}': auto takes no options; name bm25, dense or hybrid")
        spec = name = _default(store)
        progress.note(f"retriever: {spec}")
    return make("retriever", spec, {name: partial(_class(name), store)})


def build(spec: str, store, rebuild: bool = False) -> None:
    """Build what the spec's retriever needs, or extend it to all stored rows; with `rebuild` it is made anew.

    A rebuild is how settings change: what is there is removed first, under the store's lock."""
    if rebuild:
        asked = parse(spec or "auto")
        named = f"{_family(asked.name)}-{asked.options['name']}" if asked.options.get("name") else _family(asked.name)
        for part, _ in store.parts:
            with part.lock():
                there = [p.name for p in _folder(part).glob("*") if p.is_dir()]  # those without a manifest too
                for artifact in there:
                    if artifact == named or (asked.name in ("auto", "hybrid") and _family(artifact) in ("bm25", "dense")):
                        manifest.discard(_folder(part) / artifact)
    retriever(spec, store)


def built(store) -> list[str]:
    """The names of the artifacts under index/, sorted; of a union those that every part has."""
    each = []
    for part, _ in store.parts:
        folder = _folder(part)
        each.append({p.name for p in folder.iterdir() if (p / "manifest.json").is_file()} if folder.is_dir() else set())
    return sorted(set.intersection(*each)) if each else []


def update(store) -> None:
    """Extend every artifact that is there to all stored rows; linear in the new ones. To be called after an add.

    A suffix index needs its tokenizer, so it is extended when it is opened next."""
    for part, _ in store.parts:
        for artifact in built(part):
            if _kind(part, artifact) == "sparse":
                from ralm.index import grow

                grow.ready(part, grow.Wish())
            elif _kind(part, artifact) == "dense":
                from ralm.index import dense

                dense.update(part, artifact)


def compact(store) -> None:
    """Rewrite every artifact, token stores and neighbours among them, without the rows that are gone from the store. To be called
    after store.compact(purge=...)."""
    from ralm.what import neighbour_build, token_build
    from ralm.what.token_chunks import TokenChunks

    for part, _ in store.parts:
        for made in sorted((Path(part.path) / "tokens").glob("*/manifest.json")):
            token_build.compact(part, made.parent.name)
        for made in sorted((Path(part.path) / "neighbours").glob("*/chunks/manifest.json")):
            name = made.parents[1].name
            neighbour_build.compact(part, name)
            _compact(TokenChunks(part, name, as_it_is=True))
        for family in ("tokens", "neighbours"):
            manifest.sweep(Path(part.path) / family)
        _compact(part)


def _compact(part) -> None:
    """The indexes over one datastore, or over one's chunks."""
    manifest.sweep(_folder(part))
    for artifact in built(part):
        if _kind(part, artifact) == "sparse":
            from ralm.index import grow

            grow.compact(part)
        elif _kind(part, artifact) == "dense":
            from ralm.index import dense

            dense.compact(part, artifact)
        elif _kind(part, artifact) == "suffix":
            from ralm.index import suffix

            suffix.compact(part, artifact)


def _class(name: str):
    if name in ("bm25", "tfidf"):
        from ralm.index import sparse

        return sparse.BM25 if name == "bm25" else sparse.TFIDF
    if name == "dense":
        from ralm.index.dense import Dense

        return Dense
    if name == "hybrid":
        from ralm.index.hybrid import Hybrid

        return Hybrid
    raise unknown("retriever", name, SPECS)


def _default(store) -> str:
    """hybrid where both indexes are built, else the one that is, else bm25."""
    kinds = {_family(artifact) for artifact in built(store)}
    if {"bm25", "dense"} <= kinds:
        return "hybrid"
    return "dense" if "dense" in kinds else "bm25"


def _family(name: str) -> str:
    """bm25 for tfidf, which shares its folder; dense for dense-NAME."""
    return {"tfidf": "bm25"}.get(name, name.partition("-")[0])


def _folder(store) -> Path:
    return Path(store.path) / "index"


def _kind(store, artifact: str) -> str:
    return manifest.load(_folder(store) / artifact).kind
