"""A BERT encoder in integer products: about three times faster than float32 on an x86 CPU, cosine to it above 0.99.

Weights are kept in 7 bits with a scale per output, activations in 8 bits with a scale and minimum per token (no calibration; as
ZeroQuant has it, Yao and others, NeurIPS 2022). Products run in oneDNN through torch; attention, residuals and layer normalisation
stay in float32 (int8_kernels.py). With 7 bits no processor saturates (AVX2 adds two products in 16 bits: 2 * 255 * 64 < 2^15),
so vectors agree between processors as float32 vectors do, up to a rounding now and then.

The tokens of a batch are one matrix without padding, and attention looks at one text at a time: a vector does not depend, to the
last bit, on the texts beside it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from ralm.errors import UsageError, need
from ralm.index import int8_kernels as kernels
from ralm.index.static import unit

BITS = 64  # largest weight: see above
TOKENS = 768  # of a batch: its states stay in the processor's caches
WINDOW = 1024  # texts whose tokens are sorted by length together

_one = threading.Lock()  # torch's number of threads is changed while texts are encoded


class Int8:
    """Encoder over a sentence-transformers folder that holds a BERT and mean pooling; `fingerprint`: of the float32 model's."""

    def __init__(self, name: str, folder: Path, fingerprint: str):
        self.name, self.folder, self.fingerprint = name, Path(folder), f"{fingerprint[:24]}-int8-1"

    @cached_property
    def _net(self) -> Net:
        return Net(self.folder)

    @cached_property
    def _tokenizer(self):
        from tokenizers import Tokenizer

        found = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        found.no_padding()
        found.enable_truncation(self._net.window)
        return found

    @property
    def dim(self) -> int:
        return self._net.dim

    def encode(self, texts: Sequence[str], role: str = "passage", batch: int = 0) -> np.ndarray:
        """float32 [N, D], L2-normalised; `role` is ignored (the model has no prompts), so is `batch`: batches hold TOKENS tokens.

        One thread a core of torch's, each with batches of its own; the next texts are tokenised meanwhile."""
        import torch

        net, tokenizer = self._net, self._tokenizer
        out_ND = np.zeros((len(texts), net.dim), np.float32)

        def tokens(first: int) -> list[list[int]]:
            return [e.ids for e in tokenizer.encode_batch_fast(list(texts[first:first + WINDOW]))]

        def forward(rows: list[int], ids: list[list[int]]) -> None:
            torch.set_num_threads(1)
            try:
                out_ND[rows] = net.forward(ids)
            finally:
                torch.set_num_threads(threads)

        with _one, ThreadPoolExecutor(threads := torch.get_num_threads()) as pool:
            coming = pool.submit(tokens, 0)
            for first in range(0, len(texts), WINDOW):
                ids = coming.result()
                work = [pool.submit(forward, [first + i for i in rows], [ids[i] for i in rows]) for rows in batches(ids)]
                coming = pool.submit(tokens, first + WINDOW)
                for w in work:
                    w.result()
        return unit(out_ND)


def batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Positions of texts, longest first, cut where TOKENS tokens are reached."""
    out, size = [], TOKENS
    for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        if size + len(ids[i]) > TOKENS:
            out.append([])
            size = 0
        out[-1].append(i)
        size += len(ids[i])
    return out


class Net:
    """The model's weights in integers, and its forward pass. Raises UsageError for a model of another kind."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        need("torch", "encoding with integers", "lm")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        if (config["model_type"], config["hidden_act"], pooling.get("pooling_mode_mean_tokens")) != ("bert", "gelu", True):
            raise UsageError(f"'{folder}' is no BERT with GELU and mean pooling; encode it in float32 (st:{folder})")
        self.window = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
        self.heads, self.eps = config["num_attention_heads"], np.float32(config["layer_norm_eps"])
        with safe_open(str(folder / "model.safetensors"), "np") as file:
            def get(name: str) -> np.ndarray:
                return file.get_tensor(name).astype(np.float32)

            self.word_VD = get("embeddings.word_embeddings.weight")
            self.place_PD = get("embeddings.position_embeddings.weight") + get("embeddings.token_type_embeddings.weight")[0]
            self.dim = self.word_VD.shape[1]
            self.norm = get("embeddings.LayerNorm.weight"), get("embeddings.LayerNorm.bias")
            self.layers = [Layer(get, f"encoder.layer.{i}.") for i in range(config["num_hidden_layers"])]

    def forward(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 [B, D]: the mean state of each text. Texts of one length are best neighbours of each other."""
        import torch

        count_B = np.array([len(i) for i in ids])
        start_B = np.concatenate([[0], count_B.cumsum()])
        id_T = np.concatenate([np.asarray(i, np.int64) for i in ids])
        place_T = np.arange(len(id_T)) - np.repeat(start_B[:-1], count_B)
        with torch.inference_mode():
            x = Rows(len(id_T), self.dim)
            h_TD = np.empty((len(id_T), self.dim), np.float32)
            kernels.embed(id_T, place_T, self.word_VD, self.place_PD, *self.norm, self.eps, h_TD, x.q, x.s, x.m)
            for layer in self.layers:
                layer.forward(h_TD, x, start_B, self.heads, self.eps)
        out_BD = np.empty((len(ids), self.dim), np.float32)
        kernels.pool(h_TD, start_B, out_BD)
        return out_BD


class Rows:
    """T rows of bytes, each with a scale and minimum: x ~ s*q + m."""

    def __init__(self, rows: int, dim: int):
        self.q, self.s, self.m = np.empty((rows, dim), np.uint8), np.empty(rows, np.float32), np.empty(rows, np.float32)


class Product:
    """x W + b with W in 7 bits, laid out for the processor at hand. `of(x)` is q W; the kernels make the value of it."""

    def __init__(self, weight_ND: np.ndarray, bias_N: np.ndarray):
        import torch

        scale_N = np.maximum(np.abs(weight_ND).max(1), 1e-12).astype(np.float32) / BITS
        w_ND = np.rint(weight_ND / scale_N[:, None]).astype(np.int8)
        self.columns, self.bias = w_ND.sum(1, dtype=np.int32).astype(np.float32) * scale_N, bias_N
        try:
            self._packed = torch.ops.onednn.qlinear_prepack(torch.from_numpy(w_ND), [TOKENS, w_ND.shape[1]])
        except (AttributeError, RuntimeError) as e:  # a torch without oneDNN, or without its integer products (not x86)
            raise UsageError(f"this torch has no integer products ({str(e).splitlines()[0][:80]}); use the encoder minilm") from e
        self._scale, self._zero = torch.from_numpy(scale_N), torch.zeros(len(scale_N), dtype=torch.int64)

    def of(self, x: Rows) -> np.ndarray:
        """float32 [T, N], a new array."""
        import torch

        return torch.ops.onednn.qlinear_pointwise(torch.from_numpy(x.q), 1.0, 0, self._packed, self._scale, self._zero, None,
                                                  1.0, 0, torch.float32, "none", [], "").numpy()


class Layer:
    """One layer of BERT; the three projections of attention are one product."""

    def __init__(self, get, at: str):
        parts = [f"{at}attention.self.{n}." for n in ("query", "key", "value")]
        self.qkv = Product(np.concatenate([get(p + "weight") for p in parts]), np.concatenate([get(p + "bias") for p in parts]))
        self.mix, self.up, self.down = (Product(get(at + n + ".weight"), get(at + n + ".bias")) for n in (
            "attention.output.dense", "intermediate.dense", "output.dense"))
        self.norms = [(get(f"{at}{n}.LayerNorm.weight"), get(f"{at}{n}.LayerNorm.bias")) for n in ("attention.output", "output")]

    def forward(self, h_TD: np.ndarray, x: Rows, start_B: np.ndarray, heads: int, eps: np.float32) -> None:
        """The next states, in h and in x (the same in bytes)."""
        a = self.qkv.of(x)
        kernels.finish(a, x.s, x.m, self.qkv.columns, self.qkv.bias)
        kernels.quantise(attend(a, start_B, heads), x.q, x.s, x.m)
        kernels.add_normalise(self.mix.of(x), self.mix.columns, self.mix.bias, *self.norms[0], eps, h_TD, x.s, x.m, x.q)
        a = self.up.of(x)
        y = Rows(*a.shape)
        kernels.gelu(a, x.s, x.m, self.up.columns, self.up.bias, y.q, y.s, y.m)
        kernels.add_normalise(self.down.of(y), self.down.columns, self.down.bias, *self.norms[1], eps, h_TD, y.s, y.m, x.q)
        x.s, x.m = y.s, y.m


def attend(qkv_T3D: np.ndarray, start_B: np.ndarray, heads: int) -> np.ndarray:
    """Attention of every text to itself [T, D], in float32; runs of texts of one length L are one call."""
    import torch

    total, dim = len(qkv_T3D), qkv_T3D.shape[1] // 3
    out_TD = np.empty((total, dim), np.float32)
    all_T3HE, count_B, b = torch.from_numpy(qkv_T3D).view(total, 3, heads, dim // heads), np.diff(start_B), 0
    while b < len(count_B):
        same = b + 1
        while same < len(count_B) and count_B[same] == count_B[b]:
            same += 1
        part = all_T3HE[start_B[b]:start_B[same]].view(same - b, int(count_B[b]), 3, heads, dim // heads)
        q_BHLE, k_BHLE, v_BHLE = part.permute(2, 0, 3, 1, 4)
        found = torch.nn.functional.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE)
        out_TD[start_B[b]:start_B[same]] = found.transpose(1, 2).reshape(-1, dim).numpy()
        b = same
    return out_TD
