"""How a token store is made: one forward pass over every document, one row per token, committed part by part.

    tokens/NAME/
      manifest.json
      PART/keys.bin float16 or int8 [N, D], norms.bin float32 [N], values.bin uint16 or int32 [N]
      PART/documents.npy int64 [M, 2]      revision and first row (counted in the part) of every document
      PART/projection.safetensors          mean [D'], components [D, D'], step [D]: of a store with projected or int8 keys
      PART/rows.faiss                      an inverted index over the first rows of all parts together (index/inverted.py)

A row is a token of a document: its value, and as its key the state of the model that predicts it, after [BOS, the tokens before it]
(Khandelwal et al. 2020, section 2), in windows as `RALM.score` has them. No context crosses from one document to the next. A key
depends on its document alone, bit for bit: windows are padded on the right to a multiple of PAD tokens and run in batches of one
shape per length, so that neither the number nor the order of documents can move a bit. That is what makes removal exact and
a resumed build equal to an uninterrupted one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ralm import progress
from ralm.errors import CapabilityError, FingerprintError, StoreError, UsageError, unknown
from ralm.index import manifest
from ralm.index.nearest import METRICS
from ralm.registry import parse, whole
from ralm.when import windows

KIND = "tokens"
PAD = 64  # windows are padded to multiples of it
BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}  # tokens of one forward
CHUNK = 1 << 26  # numbers of keys held at once
SECONDS, ROWS = 60.0, 2_000_000  # a part is committed after so long or so many rows: what a kill can cost
LARGEST = 8_000_000  # rows; parts above it are not merged any further
SAMPLE = 20_000  # tokens a projection is fitted on
SAMPLED = 1.5  # seconds of forward passes an estimate is made from, at least
DTYPES = {"float16": np.float16, "int8": np.int8}


@dataclass(frozen=True)
class Wish:
    """What is asked of a token store; None where what is stored will do (for a new one: the values of FIRST)."""

    key: str | None = None  # ffn_in | hidden
    window: int | None = None  # tokens the model sees at once
    stride: int | None = None  # tokens added per window after the first
    project: str | None = None  # none | pca:D
    dtype: str | None = None  # float16 | int8
    metric: str | None = None  # l2 | ip
    index: str | None = None  # auto | exact | ivf | ivfpq

    def __post_init__(self):
        """UsageError for what no model could do, so that it is told before one is loaded."""
        from ralm.index.inverted import kind_of
        from ralm.lm.keys import check_key

        checks = {"key": check_key, "index": lambda x: kind_of(x, 0), "project": lambda x: _projected(x, 1 << 20),
                  "dtype": lambda x: _known("dtype", x, DTYPES), "metric": lambda x: _known("metric", x, METRICS),
                  "window": lambda x: whole(2, window=x), "stride": lambda x: whole(1, stride=x)}
        for name, check in checks.items():
            if getattr(self, name) is not None:
                check(getattr(self, name))

    def asked(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None and k != "index"}


def _known(what: str, value: Any, known: Any) -> None:
    if value not in known:
        raise unknown(what, str(value), known)


FIRST = {"key": "ffn_in", "project": "none", "dtype": "float16", "metric": "l2"}


def folder_of(store, name: str) -> Path:
    """tokens/NAME of a datastore. Raises UsageError for a name that is no folder name."""
    name = str(name or "default")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"name = '{name}': letters, digits, - and _ only")
    return Path(store.path) / "tokens" / name


def ready(store, lm, name: str, wish: Wish) -> manifest.Manifest:
    """The manifest of a token store that covers every document this version may see; what is missing is made.

    Raises StoreError where there is none and no model to make one, FingerprintError where it was made otherwise."""
    folder = folder_of(store, name)
    found = manifest.load(folder)
    if found is not None:
        check(folder, found, store, lm, wish)
        if found.stop >= store.revision_rows and not _index_due(found, wish):
            return found
    elif lm is None:
        raise StoreError(f"{store.path} has no token store '{folder.name}': make one with ralm tokens {store.path} --lm …")
    if lm is None:
        raise StoreError(f"{folder} covers {found.stop} of {store.revision_rows} document revisions, and no model is given to go "
                         f"on with: ralm tokens {store.path} --lm {found.settings['lm']}")
    try:
        with store.lock():
            return _extend(store, folder, lm, wish)
    except OSError as e:
        raise StoreError(f"{folder} covers {found.stop if found else 0} of {store.revision_rows} document revisions and cannot be "
                         f"extended ({e}); make it where the datastore can be written: ralm tokens {store.path}") from e


def check(folder: Path, now: manifest.Manifest, store, lm, wish: Wish) -> None:
    """Raise FingerprintError unless this is a token store of that datastore, model and wish."""
    ours: dict[str, Any] = {"kind": KIND, "datastore": store.id} | wish.asked()
    theirs = {"kind": now.kind, "datastore": now.store} | dict(now.settings)
    if lm is not None:
        from ralm.lm.keys import fingerprint

        ours |= {"lm": lm.name, "fingerprint": fingerprint(lm)}
        if ours["fingerprint"] == theirs.get("fingerprint"):
            theirs["lm"] = lm.name  # the same weights by another name
    for key, value in ours.items():
        if value != theirs.get(key):
            raise FingerprintError(
                f"{folder} was made with {key} = {theirs.get(key)!r}, {value!r} is asked for: use {theirs.get(key)!r}, or make "
                f"another beside it (ralm tokens {store.path} --lm … --name OTHER)")


def _extend(store, folder: Path, lm, wish: Wish) -> manifest.Manifest:
    """Under the lock: run the documents that are not covered yet, then bring the index up to date."""
    now = manifest.load(folder)
    if now is None:
        now = _begin(store, folder, lm, wish)
    else:
        check(folder, now, store, lm, wish)
    if now.stop < store.revision_rows:
        now = _run(store, folder, now, lm)
    if _index_due(now, wish):
        from ralm.index import inverted

        now = inverted.refresh(folder, now, wish.index)
    return now


def _index_due(now: manifest.Manifest, wish: Wish) -> bool:
    from ralm.index import inverted

    return inverted.due(now, wish.index)


# ---- the first manifest ---------------------------------------------------------------------------------------------


def _begin(store, folder: Path, lm, wish: Wish) -> manifest.Manifest:
    """Settings, and the projection where keys are projected or quantised."""
    settings = settled(lm, wish)
    parts = ()
    if settings["project"] != "none" or settings["dtype"] == "int8":
        path = manifest.new_part(folder)
        _fit(store, lm, settings).save(path)
        parts = (manifest.seal(path, 0, 0, 0),)
    now = manifest.Manifest(KIND, settings, store.id, store.split, parts)
    manifest.commit(folder, now)
    return now


def settled(lm, wish: Wish) -> dict[str, Any]:
    """The settings of a new token store. Raises CapabilityError for a model without states, UsageError for what does not fit it."""
    from ralm.lm.keys import fingerprint

    if "hidden" not in getattr(lm, "gives", ()):
        raise CapabilityError(f"a token store needs hidden states from the model, '{lm.name}' gives {', '.join(sorted(lm.gives))} "
                              "only; use a local model (bundled:base, hf:NAME)")
    settings = FIRST | wish.asked()
    width = lm.key_width(settings["key"])
    size = settings["window"] = settings.get("window", lm.window)
    stride = settings["stride"] = settings.get("stride", max(1, size // 2))
    if size > lm.window or stride > size:
        raise UsageError(f"window {size} and stride {stride} do not fit '{lm.name}', which sees {lm.window} tokens; the stride is "
                         "at most the window")
    dim = _projected(settings["project"], width)
    return settings | {"lm": lm.name, "fingerprint": fingerprint(lm), "width": width, "dim": dim, "vocab": int(lm.vocab),
                       "index": wish.index or "auto"}


def _projected(spec: str, width: int) -> int:
    if spec == "none":
        return width
    found = parse(str(spec))
    dim = found.args[0] if found.name == "pca" and len(found.args) == 1 and not found.options else None
    if not isinstance(dim, int) or not 1 <= dim <= width:
        raise UsageError(f"project = '{spec}': write pca:D with D from 1 to {width} (the width of a key), or none")
    return dim


@dataclass(frozen=True)
class Projection:
    """key -> (key - mean) @ components.T, in steps of `step` where keys are int8. Identity parts are None."""

    mean: np.ndarray | None = None  # float32 [D']
    components: np.ndarray | None = None  # float32 [D, D']
    step: np.ndarray | None = None  # float32 [D]

    def __call__(self, keys_ND: np.ndarray) -> np.ndarray:
        """float32 [N, D]: keys or queries in the space that is stored."""
        if self.components is None:
            return np.ascontiguousarray(keys_ND, np.float32)
        return (keys_ND.astype(np.float32) - self.mean) @ self.components.T

    def stored(self, keys_ND: np.ndarray) -> np.ndarray:
        """As they are written: float16, or int8 steps."""
        keys_ND = self(keys_ND)
        if self.step is not None:
            return np.clip(np.rint(keys_ND / self.step), -127, 127).astype(np.int8)
        with np.errstate(over="ignore"):
            return keys_ND.astype(np.float16)

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({k: np.ascontiguousarray(v) for k, v in vars(self).items() if v is not None}, path / "projection.safetensors")

    @staticmethod
    def load(folder: Path, now: manifest.Manifest) -> Projection:
        part = next((p for p in now.parts if "projection.safetensors" in p.files), None)
        if part is None:
            return Projection()
        from safetensors.numpy import load_file

        return Projection(**load_file(folder / part.name / "projection.safetensors"))


def _fit(store, lm, settings: dict[str, Any]) -> Projection:
    """Principal components and steps from windows of randomly drawn documents (the same ones at every run)."""
    alive = np.flatnonzero(store.revisions())
    order, texts, size = np.random.default_rng(0).permutation(len(alive)), [], 0
    for at in order.tolist():
        (source,) = store.state([int(alive[at])]).values()
        texts.append(lm.tokenizer.encode(source.text[:8 * SAMPLE])[:max(256, SAMPLE // 16)])
        size += len(texts[-1])
        if size >= SAMPLE:
            break
    if not size:
        raise UsageError(f"{store.path} has no text to fit {settings['project']}, {settings['dtype']} on; add documents first")
    keys = np.concatenate([k for k, _ in states(lm, texts, settings)])
    mean = components = None
    if settings["project"] != "none":
        mean = keys.mean(0)
        _, vectors = np.linalg.eigh(np.cov((keys - mean).T.astype(np.float64)))
        components = np.ascontiguousarray(vectors.T[::-1][:settings["dim"]], np.float32)
        keys = (keys - mean) @ components.T
    step = None
    if settings["dtype"] == "int8":
        step = np.maximum(np.quantile(np.abs(keys), 0.9995, axis=0) * 1.05 / 127, 1e-12).astype(np.float32)
    return Projection(mean, components, step)


# ---- the forward pass -----------------------------------------------------------------------------------------------


def states(lm, texts: Sequence[Sequence[int]], settings: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(keys float32 [n, D'], values int64 [n]) of all tokens of the texts, in order, at most CHUNK numbers at a time."""
    most = max(PAD, CHUNK // settings["width"])
    held: list[tuple[Sequence[int], int, int, int]] = []
    size = 0
    for ids in texts:
        for context, start, stop in windows(len(ids), settings["window"], settings["stride"]):
            held.append((ids, context, start, stop))
            size += stop - start
            if size >= most:
                yield _states(lm, held, settings)
                held, size = [], 0
    if held:
        yield _states(lm, held, settings)


def _states(lm, held: Sequence[tuple[Sequence[int], int, int, int]], settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Windows of one padded length together, each batch of one shape whatever else there is."""
    import torch

    rows = [[lm.bos, *ids[context:stop - 1]] for ids, context, _, stop in held]
    places = np.concatenate([[0], np.cumsum([stop - start for _, _, start, stop in held])])
    out = np.empty((int(places[-1]), settings["width"]), np.float32)
    padded = [min(-(-len(r) // PAD) * PAD, max(settings["window"], len(r))) for r in rows]
    device = "cuda" if "cuda" in str(getattr(getattr(lm.model, "device", None), "type", "cpu")) else "cpu"
    for length in sorted(set(padded)):
        same = [i for i, n in enumerate(padded) if n == length]
        size = max(1, BATCH_TOKENS[device] // length)
        for a in range(0, len(same), size):
            batch = same[a:a + size]
            ids_BT = torch.full((size, length), int(lm.bos), dtype=torch.long)  # always `size` rows: one shape, one result
            for b, i in enumerate(batch):
                ids_BT[b, :len(rows[i])] = torch.as_tensor(rows[i])
            with torch.inference_mode():
                keys_BTD = lm.keys(ids_BT, settings["key"]).cpu().numpy()
            for b, i in enumerate(batch):
                new = int(places[i + 1] - places[i])
                out[places[i]:places[i + 1]] = keys_BTD[b, len(rows[i]) - new:len(rows[i])]
    return out, np.concatenate([np.asarray(ids[start:stop], np.int64) for ids, _, start, stop in held])


def estimate(store, lm, name: str, wish: Wish) -> dict[str, float]:
    """What making (or extending) the token store would take, from a sample that is run: {"rows", "bytes", "seconds", "memory"}.

    Raises what making it would raise for settings that do not fit."""
    folder = folder_of(store, name)
    if (found := manifest.load(folder)) is not None:
        check(folder, found, store, lm, wish)
    settings = settled(lm, wish) if found is None else dict(found.settings)
    first, sample = found.stop if found else 0, []
    for _, source in store.states(first):
        sample.append(source.text[:20_000])
        if sum(map(len, sample)) >= 160_000:
            break
    tokens = [lm.tokenizer.encode(s) for s in sample]
    rate = sum(map(len, tokens)) / max(1, sum(map(len, sample)))
    done, began, bundle = 0, time.perf_counter(), []
    for n, ids in enumerate(tokens, 1):  # as many at once as a run takes, for a few seconds
        bundle.append(ids[:4 * BATCH_TOKENS["cpu"]])
        if sum(map(len, bundle)) >= 4 * BATCH_TOKENS["cpu"] or n == len(tokens):
            done, bundle = done + sum(len(v) for _, v in states(lm, bundle, settings)), []
            if time.perf_counter() - began > SAMPLED:
                break
    seconds = (time.perf_counter() - began) / max(1, done)
    each = settings["dim"] * DTYPES[settings["dtype"]]().itemsize + 4 + value_type(lm.vocab)().itemsize
    rows = round(store.characters(first) * rate)
    return {"rows": rows, "bytes": rows * each, "seconds": rows * seconds,
            "memory": min(rows, ROWS) * each + 4 * CHUNK + 4 * BATCH_TOKENS["cpu"] * settings["width"] * 8}


def value_type(vocab: int) -> type:
    """The smallest integers that hold every token id: 16 bits do not hold a vocabulary of 65,537."""
    return np.uint16 if vocab <= 1 << 16 else np.int32


# ---- parts ----------------------------------------------------------------------------------------------------------


class Writer:
    """One part being written: rows go to disk as they come."""

    def __init__(self, folder: Path, first: int, vocab: int):
        self.folder, self.first, self.stop, self.rows = folder, first, first, 0
        self.path = manifest.new_part(folder)
        self.files = {name: (self.path / f"{name}.bin").open("wb") for name in ("keys", "norms", "values")}
        self.documents: list[tuple[int, int]] = []
        self.type = value_type(vocab)

    def document(self, rev: int, tokens: int) -> None:
        """Announce the document whose rows come next (after those announced before)."""
        self.documents.append((rev, self.rows + self.pending))
        self.pending += tokens
        self.stop = rev + 1

    pending = 0

    def add(self, keys: np.ndarray, norms: np.ndarray, values: np.ndarray) -> None:
        self.files["keys"].write(np.ascontiguousarray(keys).data)
        self.files["norms"].write(np.ascontiguousarray(norms, np.float32).data)
        self.files["values"].write(np.ascontiguousarray(values.astype(self.type)).data)
        self.rows += len(values)
        self.pending -= len(values)

    def seal(self, stop: int) -> manifest.Part:
        for file in self.files.values():
            file.close()
        if self.pending:
            raise StoreError(f"{self.path}: {self.pending} rows were announced and did not come; run it again")
        np.save(self.path / "documents.npy", np.asarray(self.documents, np.int64).reshape(-1, 2), allow_pickle=False)
        if not self.rows:  # nothing but documents without text: files of no bytes cannot be mapped
            for file in self.files.values():
                Path(file.name).unlink()
        return manifest.seal(self.path, self.first, stop, self.rows)


def _run(store, folder: Path, now: manifest.Manifest, lm) -> manifest.Manifest:
    """Run all documents that are not covered; a part is committed every SECONDS seconds or ROWS rows, at a document's end."""
    projection, settings, stop = Projection.load(folder, now), dict(now.settings), store.revision_rows
    most = max(PAD, CHUNK // settings["width"])
    writer, since, held = None, time.monotonic(), 0
    texts: list[tuple[int, list[int]]] = []
    with progress.task(f"tokens ({lm.name})", total=store.characters(now.stop), unit="characters") as advance:
        for rev, source in store.states(now.stop):
            writer = writer or Writer(folder, now.stop, settings["vocab"])
            texts.append((rev, lm.tokenizer.encode(source.text)))
            held += len(texts[-1][1])
            if held >= min(most, 65_536):
                _write(writer, lm, texts, settings, projection)
                texts, held = [], 0
            advance(len(source.text))
            if not texts and (time.monotonic() - since > SECONDS or writer.rows >= ROWS):
                now, writer, since = _append(folder, now, writer.seal(rev + 1)), None, time.monotonic()
        if texts:
            _write(writer, lm, texts, settings, projection)
        if writer is not None:
            now = _append(folder, now, writer.seal(stop))
    if now.stop < stop:  # the last revisions are gone
        now = replace(now, parts=(*now.parts, manifest.Part(f"none-{now.stop}-{stop}", now.stop, stop, 0, {})))
        manifest.commit(folder, now)
    return now


def _write(writer: Writer, lm, texts: Sequence[tuple[int, list[int]]], settings: dict[str, Any], projection: Projection) -> None:
    for rev, ids in texts:
        writer.document(rev, len(ids))
    for keys, values in states(lm, [ids for _, ids in texts], settings):
        stored = projection.stored(keys)
        wide = stored.astype(np.float32) if projection.step is None else stored.astype(np.float32) * projection.step
        if not np.isfinite(wide).all():
            raise UsageError(f"keys of '{lm.name}' do not fit {settings['dtype']} (largest {np.abs(keys).max():.3g}); "
                             "use dtype=int8")
        writer.add(stored, np.einsum("nd,nd->n", wide, wide, dtype=np.float64), values)


def _append(folder: Path, now: manifest.Manifest, part: manifest.Part) -> manifest.Manifest:
    """Commit one more part, merged with its left neighbours while they are not twice as large: a row is copied log2(N) times."""
    others, old, tail = [p for p in now.parts if not p.stop], [p for p in now.parts if p.stop], [part]
    while old and old[-1].rows < 2 * sum(p.rows for p in tail) and old[-1].rows < LARGEST:
        tail.insert(0, old.pop())
    if len(tail) > 1:
        tail = [merge(folder, tail, now.settings)]
    now = replace(now, parts=(*others, *old, *tail))
    manifest.commit(folder, now)
    return now


def merge(folder: Path, parts: Sequence[manifest.Part], settings: dict[str, Any], keep: Any = None) -> manifest.Part:
    """The rows of consecutive parts as one part; `keep(rev)` False leaves a document out."""
    writer = Writer(folder, parts[0].first, settings["vocab"])
    for part in parts:
        if not part.files:
            continue
        keys, norms, values, documents = mapped(folder, part, settings)
        ends = np.append(documents[1:, 1], part.rows)
        for (rev, start), end in zip(documents.tolist(), ends.tolist()):
            if keep is None or keep(rev):
                writer.document(rev, end - start)
                for a in range(start, end, 65_536):
                    rows = slice(a, min(a + 65_536, end))
                    writer.add(keys[rows], norms[rows], values[rows])
    from ralm.what import token_merge
    token_merge.carry(folder, parts, settings, keep, writer.path)
    return writer.seal(parts[-1].stop)


def mapped(folder: Path, part: manifest.Part, settings: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """keys [N, D], norms [N], values [N], documents [M, 2] of a part, memory-mapped."""
    shape = {"keys": (DTYPES[settings["dtype"]], (part.rows, settings["dim"])), "norms": (np.float32, (part.rows,)),
             "values": (value_type(settings["vocab"]), (part.rows,))}
    out = []
    for name, (kind, size) in shape.items():
        file = folder / part.name / f"{name}.bin"
        if part.rows and file.stat().st_size != np.dtype(kind).itemsize * int(np.prod(size)):
            raise damaged(folder, f"{part.name}/{name}.bin has {file.stat().st_size} bytes, {size} numbers are expected")
        out.append(np.memmap(file, kind, "r", shape=size) if part.rows else np.zeros(size, kind))
    try:
        documents = np.load(folder / part.name / "documents.npy", allow_pickle=False)
    except ValueError as e:
        raise damaged(folder, f"{part.name}/documents.npy is not what was written ({e})") from e
    return *out, documents


def damaged(folder: Path, what: str) -> StoreError:
    return StoreError(f"{folder} is damaged: {what}; {manifest.remedy(folder)}")


def prefer(store, name: str, index: str) -> None:
    """Let a token store be searched by this index from now on (auto, exact, ivf, ivfpq). One that is not there is not made."""
    folder = folder_of(store, name)
    with store.lock():
        now = manifest.load(folder)
        if now is not None and now.settings["index"] != index:
            manifest.commit(folder, replace(now, settings=dict(now.settings) | {"index": index}))


def compact(store, name: str) -> None:
    """Rewrite the parts that hold rows of documents which are gone from the store; the index over them is made anew."""
    folder = folder_of(store, name)
    with store.lock():
        now = manifest.load(folder)
        if now is None:
            return
        stored = set(store.stored_revisions().tolist())
        parts = []
        for part in now.parts:
            if "documents.npy" in part.files:
                revs = set(mapped(folder, part, now.settings)[3][:, 0].tolist())
                if not revs <= stored:
                    part = merge(folder, [part], now.settings, stored.__contains__)
            parts.append(part)
        if tuple(parts) == now.parts:
            return
        parts = tuple(p for p in parts if "rows.faiss" not in p.files)
        now = replace(now, parts=parts, facts={k: v for k, v in now.facts.items() if k != "ivf"})
        manifest.commit(folder, now)
        if _index_due(now, Wish()):
            from ralm.index import inverted

            inverted.refresh(folder, now, None)
