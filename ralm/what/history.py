"""What each version of a datastore was made by: read from the transactions themselves, so it cannot disagree with the data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from ralm.errors import StoreError
from ralm.what import sums, tables

ACTIONS = {"Append": "add", "Update": "change", "Delete": "remove", "Merge": "columns",
           "Rewrite": "compact", "BaseOperation": "compact"}


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """`documents` and `chunks` count what the action added, removed or dropped; None where the transaction does not say."""

    version: int
    time: datetime  # UTC
    action: str  # create add remove columns compact purge
    documents: int | None = None
    updated: int | None = None
    chunks: int | None = None
    total: int | None = None  # documents in this version


def of(view) -> list[VersionInfo]:
    """The versions from the oldest that can be opened up to the view's."""
    sums.check_log(view.path, "documents")
    out = []
    with tables.guard(lambda e: tables.damaged(view.path / "documents.lance", e)):
        versions = view.documents.versions()
    for entry in versions:
        number = entry["version"]
        if not view.facts["floor"] <= number <= view.version:
            continue
        total = entry["metadata"].get("total_rows")
        out.append(VersionInfo(number, entry["timestamp"], total=None if total is None else int(total), **_note(view, number)))
    gap = sorted(set(range(view.facts["floor"], view.version + 1)) - {v.version for v in out})
    if gap:  # nothing but a purge drops versions, and it moves the floor
        raise StoreError(f"{view.path / 'documents.lance'} has lost version {gap[0]} (its manifest in _versions is gone), the "
                         "others can be opened: restore it from a copy")
    return out


def _note(view, version: int) -> dict:
    """What the transaction says it did; at least its kind, where it carries no note."""
    try:
        transaction = view.documents.read_transaction(version)
    except Exception:  # a log entry that is gone takes nothing from the version itself
        return {"action": "unknown"}
    if transaction is None:
        return {"action": "unknown"}
    try:
        note = json.loads((transaction.transaction_properties or {}).get(tables.NOTE, "{}"))
        known = {k: note[k] for k in ("action", "documents", "updated", "chunks") if k in note}
    except (ValueError, TypeError):
        known = {}
    return {"action": ACTIONS.get(type(transaction.operation).__name__, "unknown")} | known
