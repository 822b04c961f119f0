"""`ralm tokens`: the token store of a datastore, made or brought up to date, with what it takes said before the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ralm import progress
from ralm.app.options import StoreArg
from ralm.app.terminal import Output, bold, count, duration, facts, number, size

if TYPE_CHECKING:
    from ralm.what.datastore import Datastore
    from ralm.what.token_build import Wish
    from ralm.what.token_store import TokenStore

Text = str | None


def tokens(store: StoreArg, /, *,
           lm: Annotated[str, Parameter(help="The model whose states are the keys: bundled:base, hf:NAME or hf:FOLDER; the "
                                             "one to score and generate with.")],
           name: Annotated[str, Parameter(help="Of this token store; several can stand side by side.")] = "default",
           index: Annotated[Text, Parameter(help="exact, ivf, ivfpq or auto (exact up to 200,000 tokens, then ivf).")] = None,
           key: Annotated[Text, Parameter(help="Which state: ffn_in (what the last feed-forward network reads) or hidden (what the "
                                               "output layer reads).")] = None,
           window: Annotated[int | None, Parameter(help="Most tokens the model sees at once; default: all it can.")] = None,
           stride: Annotated[int | None, Parameter(help="Tokens added per window after the first; default: half a window.")] = None,
           project: Annotated[Text, Parameter(help="none, or pca:256: principal components to keep of a key.")] = None,
           dtype: Annotated[Text, Parameter(help="float16 or int8: how a number of a key is stored.")] = None,
           metric: Annotated[Text, Parameter(help="l2 (squared) or ip (inner product).")] = None,
           rebuild: Annotated[bool, Parameter(show_default=False, help="Delete this token store and make it anew; needed where "
                                                                       "settings change.")] = False,
           out: Output = Output()) -> None:  # noqa: B008
    """Keep a state of the model for every token of the datastore, for --how knn. What is there is kept: only new documents are
    run, and a run that was stopped goes on. The settings of the first time hold for all later ones.

    JSON: name, rows (tokens held), dim, bytes, index, nprobe, recall (@100, against exact search), added (rows made now),
    documents, estimate {rows, bytes, seconds, memory} (of what was to be made), settings, lm, version, seconds."""
    from ralm.index import manifest
    from ralm.lm import load
    from ralm.what.datastore import Datastore
    from ralm.what.token_build import Wish, estimate, folder_of, prefer
    from ralm.what.token_store import TokenStore

    began = time.perf_counter()
    wish = Wish(key, window, stride, project, dtype, metric, index)
    kb = Datastore.open(store)
    folder = folder_of(kb, name)
    model = load(lm)
    if rebuild and folder.is_dir():
        with kb.lock():
            manifest.discard(folder)
    before = 0 if rebuild else _rows(folder)
    plan = estimate(kb, model, name, wish)
    _announce(kb, plan, before)
    if index is not None:
        prefer(kb, name, index)
    made = TokenStore.build(kb, model, name, **vars(wish))
    data = _made(kb, made, wish, before) | {"estimate": plan, "lm": lm, "version": kb.version,
                                            "seconds": round(time.perf_counter() - began, 3)}
    out.show(data, lambda: _lines(data))


def _rows(folder) -> int:
    from ralm.index import manifest

    found = manifest.load(folder)
    return sum(p.rows for p in found.parts) if found else 0


def _announce(kb: Datastore, plan: dict[str, float], before: int) -> None:
    """What is about to be done, before it is."""
    if not plan["rows"]:
        progress.note("every document has its tokens already" if before else f"{kb.path} has no text to read")
        return
    progress.note(f"about {plan['rows']:,} {'more ' if before else ''}tokens to read: {size(plan['bytes'])} on disk, "
                  f"{duration(plan['seconds'])}, {size(plan['memory'])} of memory")


def _made(kb: Datastore, made: TokenStore, wish: Wish, before: int) -> dict[str, Any]:
    from ralm.app.stores import disk
    from ralm.index import inverted

    leaf, settings = made.leaves[0], made.settings
    if wish.index in ("ivf", "ivfpq") and leaf.near is None:
        progress.note(f"fewer than {inverted.LEAST:,} tokens are searched exactly, whatever the index")
    return {"name": made.name, "rows": len(made), "dim": settings["dim"], "bytes": disk(leaf.rows.folder), "index": leaf.kind,
            "nprobe": leaf.near.nprobe if leaf.near else None, "recall": made.recall, "added": len(made) - before,
            "documents": len(kb), "settings": {k: v for k, v in settings.items() if k not in ("fingerprint", "vocab", "lm")}}


def _lines(data: dict[str, Any]) -> Iterator[str]:
    s = data["settings"]
    yield (f"{count(data['added'], 'token')} added; {bold(data['name'])} holds {count(data['rows'], 'token')} of "
           f"{count(data['documents'], 'document')} ({duration(data['seconds'])})")
    search = data["index"] + ("" if data["nprobe"] is None else f", {data['nprobe']} lists a search, recall@100 "
                                                                  f"{number(data['recall'], 3)}")
    yield from facts({"key": f"{s['key']}, {s['dim']:,} numbers, {s['dtype']}, project {s['project']}, metric {s['metric']}",
                      "windows": f"{s['window']:,} tokens, stride {s['stride']:,}", "search": search, "size": size(data["bytes"])})
