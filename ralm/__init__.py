"""Retrieval-augmented language models: p(x_t | x_<t, D) over one versioned datastore. Start with `ralm.types` and `ralm.model`.

The public names load on first use, so `import ralm` costs nothing and pulls in neither torch nor transformers."""

from __future__ import annotations

__version__ = "0.1.0"

_HOME = {
    "Document": "ralm.types", "Chunk": "ralm.types", "Hits": "ralm.types", "Citation": "ralm.types", "Answer": "ralm.types",
    "Scored": "ralm.types", "RALM": "ralm.model", "Datastore": "ralm.what.datastore", "read": "ralm.what.read",
    "retriever": "ralm.index", "BM25": "ralm.index.sparse", "TFIDF": "ralm.index.sparse", "Dense": "ralm.index.dense",
    "load_lm": "ralm.lm", "fusion": "ralm.how", "schedule": "ralm.when", "Once": "ralm.when", "EveryN": "ralm.when",
    "Adaptive": "ralm.when", "TokenStore": "ralm.what.token_store",
    "NeighbourStore": "ralm.what.neighbours", "RalmError": "ralm.errors",
}
__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'ralm' has no attribute '{name}'")
    import importlib

    value = getattr(importlib.import_module(_HOME[name]), "load" if name == "load_lm" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
