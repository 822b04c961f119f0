"""A whole decoder in one file: RMSNorm before each block, rotary positions, normed queries and keys, SwiGLU, tied embeddings.

    lm = load("base")                       # the model the project trained itself; or load(folder)
    out = lm.forward(ids_BT)                # logits [B, T, V], hidden [B, T, D], past
    out = lm.forward(more_BT, past=out.past)

The arithmetic is that of Qwen3 in transformers (Llama with normed queries and keys), so that an independent
implementation can be held against it (tests/lm/test_gpt.py copies the weights across). Shapes: B batch, T new tokens,
L = past + new tokens, H heads, E width of a head, D = H x E width, F width of the MLP, V vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ralm.errors import CapabilityError, RalmError, StoreError, UsageError, need
from ralm.lm.keys import check_key
from ralm.types import LMOut

END = "<|end|>"  # ends a document and stands before the first token


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, and how it was made (`trained`, kept verbatim)."""

    vocab: int = 8192
    width: int = 256
    layers: int = 5
    heads: int = 4
    mlp: int = 704
    window: int = 512
    theta: float = 10000.0  # base of the rotary frequencies
    eps: float = 1e-6
    end: int = 0  # id of END
    trained: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise UsageError(f"width {self.width} does not split into {self.heads} heads of an even size; "
                             f"use a multiple of {2 * self.heads}")

    @staticmethod
    def of(values: dict[str, Any], where: str) -> GPTConfig:
        """The config a JSON object holds. Raises StoreError for keys it does not know."""
        known = {f.name for f in fields(GPTConfig)}
        if odd := sorted(values.keys() - known):
            raise StoreError(f"{where} has {', '.join(odd)}, which no GPTConfig has; it is no model of ralm, "
                             "or of a newer release (for models of transformers use hf:FOLDER)")
        return GPTConfig(**values)


# ---- the network --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.heads, self.size = c.heads, c.width // c.heads
        self.q, self.k, self.v, self.o = (nn.Linear(c.width, c.width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(self.size, c.eps), nn.RMSNorm(self.size, c.eps)
        self.attend = F.scaled_dot_product_attention  # a trainer may know a faster one for its own case

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None,
                mask: Tensor | None, causal: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, D = x_BTD.shape
        split = (B, T, self.heads, self.size)
        q_BHTE = rotate(normed(self.q_norm, self.q(x_BTD).view(split)).transpose(1, 2), rotary)
        k_BHLE = rotate(normed(self.k_norm, self.k(x_BTD).view(split)).transpose(1, 2), rotary)
        v_BHLE = self.v(x_BTD).view(split).transpose(1, 2)
        if past is not None:  # new tensors: whoever holds the old past may continue it again
            k_BHLE, v_BHLE = torch.cat([past[0], k_BHLE], 2), torch.cat([past[1], v_BHLE], 2)
        y_BHTE = self.attend(q_BHTE, k_BHLE, v_BHLE, attn_mask=mask, is_causal=causal)
        return self.o(y_BHTE.transpose(1, 2).reshape(B, T, D)), (k_BHLE, v_BHLE)


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.RMSNorm(c.width, c.eps), Attention(c), nn.RMSNorm(c.width, c.eps)
        self.gate, self.up = nn.Linear(c.width, c.mlp, bias=False), nn.Linear(c.width, c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.width, bias=False)

    def look(self, x_BTD: Tensor, *context) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The first half, attention: the stream, what the MLP reads (the key ffn_in), keys and values."""
        y_BTD, kv = self.attention(self.norm1(x_BTD), *context)
        x_BTD = x_BTD + y_BTD
        return x_BTD, self.norm2(x_BTD), kv

    def think(self, h_BTD: Tensor) -> Tensor:
        """The second half, the MLP: what it adds to the stream."""
        return self.down(F.silu(self.gate(h_BTD)) * self.up(h_BTD))

    def both(self, x_BTD: Tensor, *context) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The stream after both halves, and the rest of `look`."""
        x_BTD, h_BTD, kv = self.look(x_BTD, *context)
        return x_BTD + self.think(h_BTD), h_BTD, kv


class Decoder(nn.Module):
    """The network: token ids to final normed hidden states. Logits are `hidden @ embed.weight.T` (tied)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.config = c
        self.embed = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.eps)
        size = c.width // c.heads
        angle = torch.outer(torch.arange(c.window).float(), c.theta ** (-torch.arange(0, size, 2).float() / size))
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)  # [window, E]
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)
        self.again = None  # training: `context_fn` of torch.utils.checkpoint; blocks are then run again in backward
        self.apply(self._init)
        for b in self.blocks:  # every block begins as the identity
            nn.init.zeros_(b.attention.o.weight)
            nn.init.zeros_(b.down.weight)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None, past: Sequence[tuple[Tensor, Tensor]] | None = None,
                mask: Tensor | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden states [B, T, D] and per layer keys and values [B, H, L, E]. Without positions: 0, 1, ... and causal.

        mask: bool [B or 1, 1, T, L], True where a query may look; None: causal without a past, everything with one."""
        hidden_BTD, _, kept = self.states(ids_BT, positions_BT, past, mask)
        return hidden_BTD, kept

    def states(self, ids_BT: Tensor, positions_BT: Tensor | None = None, past=None, mask: Tensor | None = None,
               rest: bool = True) -> tuple[Tensor | None, Tensor, list[tuple[Tensor, Tensor]]]:
        """As forward, and what the last MLP reads [B, T, D] between the two; with rest=False nothing after it is computed."""
        T = ids_BT.shape[1]
        rotary = (self.cos[:T], self.sin[:T]) if positions_BT is None else (
            self.cos[positions_BT][:, None], self.sin[positions_BT][:, None])
        x_BTD, kept = self.embed(ids_BT), []
        for n, block in enumerate(self.blocks):
            context = rotary, past[n] if past else None, mask, mask is None and past is None
            if block is self.blocks[-1]:
                x_BTD, h_BTD, kv = block.look(x_BTD, *context)
            elif self.again is not None and torch.is_grad_enabled():
                x_BTD, h_BTD, kv = checkpoint(block.both, x_BTD, *context, use_reentrant=False, context_fn=self.again)
            else:
                x_BTD, h_BTD, kv = block.both(x_BTD, *context)
            kept.append(kv)
        return self.norm(x_BTD + self.blocks[-1].think(h_BTD)) if rest else None, h_BTD, kept


def normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """The norm in the type of x: under autocast the weight is wider, and a mixed norm is several times slower."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def rotate(x_BHTE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: turns the pairs (x_i, x_{i + E/2}) by angle position x frequency_i."""
    a, b = x_BHTE.chunk(2, -1)
    return x_BHTE * rotary[0].to(x_BHTE.dtype) + torch.cat([-b, a], -1) * rotary[1].to(x_BHTE.dtype)


# ---- the contract -------------------------------------------------------------------------------------------------------


class Past:
    """Keys and values [B, H, L, E] per layer of the tokens seen so far. `length` counts places, padding included."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], mask_BL: Tensor | None):
        self.layers, self.mask = layers, mask_BL

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    def crop(self, n: int) -> Past:
        """Keep the first n places; returns itself."""
        if not 0 <= n <= self.length:
            raise UsageError(f"cannot crop a past of {self.length} tokens to {n}; use 0 to {self.length}")
        self.layers = [(k[:, :, :n], v[:, :, :n]) for k, v in self.layers]
        self.mask = None if self.mask is None else self.mask[:, :n]
        return self

    def reorder(self, index_B: Tensor) -> Past:
        """Row b becomes what row index_B[b] was; returns itself. The batch may grow or shrink."""
        self.layers = [(k[index_B], v[index_B]) for k, v in self.layers]
        self.mask = None if self.mask is None else self.mask[index_B]
        return self


class GPT:
    """A Decoder with its tokenizer as a LanguageModel. gives text, logits and hidden."""

    gives = frozenset({"text", "logits", "hidden"})

    def __init__(self, model: Decoder, tokenizer: BPE, name: str = "gpt"):
        if len(tokenizer) > model.config.vocab:
            raise UsageError(f"'{name}' has {model.config.vocab} embeddings, its tokenizer {len(tokenizer)} tokens; "
                             "use the tokenizer it was trained with")
        self.model, self.config, self.tokenizer, self.name = model.eval(), model.config, tokenizer, name
        self.window, self.vocab = self.config.window, self.config.vocab
        self.bos = self.eos = self.config.end

    def __repr__(self) -> str:
        return f"GPT({self.name!r}, {self.parameters / 1e6:.1f}M parameters, window={self.window}, vocab={self.vocab})"

    @property
    def parameters(self) -> int:
        """How many numbers it has, embeddings included (counted once: they are tied)."""
        return sum(p.numel() for p in self.model.parameters())

    def forward(self, ids_BT: Tensor, *, past: Past | None = None, mask: Tensor | None = None,
                keep: int | Tensor | None = None, neighbours: Any = None, key: str | None = None) -> LMOut:
        """Logits [B, T', V] after each of ids_BT, the hidden state [B, T', D] they were made from, and the past; with `key` also
        that state (lm/keys.py).

        As LanguageModel.forward; float32, on the device of ids_BT. `past` is not changed: it may be continued again, or
        cropped and continued. Without a mask, new tokens are real and old ones what they were. Raises UsageError for ids,
        masks or lengths that do not fit, CapabilityError for `neighbours`."""
        if neighbours is not None:
            raise CapabilityError(f"'{self.name}' cannot read neighbours; use a model that attends to them (RETRO)")
        self._check_ids(ids_BT)
        length = past.length if past is not None else 0
        mask_BL = self._mask(ids_BT, past, mask)
        positions_BT = self._positions(ids_BT, length, mask_BL)
        home, there = ids_BT.device, self.model.embed.weight.device
        hidden_BTD, ffn_BTD, layers = self.model.states(ids_BT.to(there), positions_BT.to(there), past.layers if length else None,
                                                        _looks(ids_BT.shape[1], length, mask_BL, there))
        if keep is not None:
            hidden_BTD, ffn_BTD = hidden_BTD[:, _kept(keep)], ffn_BTD[:, _kept(keep)]
        logits_BTV = F.linear(hidden_BTD, self.model.embed.weight)
        state = None if key is None else (ffn_BTD if check_key(key) == "ffn_in" else hidden_BTD).float().to(home)
        return LMOut(logits_BTV.float().to(home), hidden_BTD.float().to(home), Past(layers, mask_BL), state)

    def keys(self, ids_BT: Tensor, key: str = "ffn_in") -> Tensor:
        """The state `key` [B, T, D] at each of ids_BT, nothing after it computed: what a token store is made of.

        Without padding's mask: pad on the right, a decoder does not look there."""
        self._check_ids(ids_BT)
        hidden_BTD, ffn_BTD, _ = self.model.states(ids_BT.to(self.model.embed.weight.device), rest=check_key(key) == "hidden")
        return (ffn_BTD if key == "ffn_in" else hidden_BTD).float()

    def key_width(self, key: str = "ffn_in") -> int:
        check_key(key)
        return self.config.width

    def _check_ids(self, ids_BT: Tensor) -> None:
        if ids_BT.dim() != 2 or ids_BT.numel() == 0:
            raise UsageError(f"ids have shape {tuple(ids_BT.shape)}; '{self.name}' reads [batch, tokens]")
        low, high = int(ids_BT.min()), int(ids_BT.max())
        if low < 0 or high >= self.vocab:
            raise UsageError(f"token id {low if low < 0 else high} is not one of '{self.name}', which reads 0 to "
                             f"{self.vocab - 1}; use the tokenizer that belongs to it")

    def _mask(self, ids_BT: Tensor, past: Past | None, mask: Tensor | None) -> Tensor | None:
        """The mask over past and new tokens, bool [B, L]; None where nothing is padded."""
        batch, length = ids_BT.shape[0], (past.length if past is not None else 0) + ids_BT.shape[1]
        if mask is None and past is not None and past.mask is not None:
            mask = torch.cat([past.mask, past.mask.new_ones(len(past.mask), ids_BT.shape[1])], 1)
        if mask is None:
            return None
        if tuple(mask.shape) != (batch, length):
            raise UsageError(f"mask has shape {tuple(mask.shape)}, past and ids make {(batch, length)}; "
                             "it covers the past too")
        mask_BL = mask.to(ids_BT.device).bool()
        if not bool(mask_BL.any(-1).all()):
            raise UsageError("mask has a row without any real token; leave that row out of the batch")
        return None if bool(mask_BL.all()) else mask_BL

    def _positions(self, ids_BT: Tensor, length: int, mask_BL: Tensor | None) -> Tensor:
        """Positions [B, T] that count real tokens only, from 0; padding in front shares position 0."""
        if mask_BL is None:
            positions_BT = torch.arange(length, length + ids_BT.shape[1], device=ids_BT.device)[None]
        else:
            positions_BT = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)[:, length:]
        if (most := int(positions_BT.max()) + 1) > self.window:
            raise UsageError(f"{most} tokens do not fit the window of '{self.name}', which is {self.window}; "
                             "shorten the text or crop the past")
        return positions_BT


def _looks(new: int, past: int, mask_BL: Tensor | None, device: torch.device) -> Tensor | None:
    """Which places each new token looks at, bool [B or 1, 1, T, L]; None where the Decoder needs no mask."""
    if mask_BL is None and (past == 0 or new == 1):
        return None
    at = torch.arange(past, past + new, device=device)[:, None]
    to = torch.arange(past + new, device=device)[None]
    causal_TL = to <= at
    if mask_BL is None:
        return causal_TL[None, None]
    mask_BL = mask_BL.to(device)
    # Padding looks at itself: a softmax over nothing is nan, and nan would spread to the next layer's keys.
    return (causal_TL & mask_BL[:, None, :] | (to == at))[:, None]


def _kept(keep: int | Tensor) -> slice | Tensor:
    if isinstance(keep, int):
        if keep < 1:
            raise UsageError(f"keep={keep} asks for no logits; use at least 1, or none for all positions")
        return slice(-keep, None)
    if keep.dim() != 1 or keep.numel() == 0:
        raise RalmError(f"keep has shape {tuple(keep.shape)}; give positions as one row [T']")
    return keep.long()


# ---- text and files -------------------------------------------------------------------------------------------------------


class BPE:
    """Byte-level BPE without any normalisation: decode(encode(s)) == s for every s that UTF-8 can write.

    Adds no special tokens; text that spells END is plain text (a document must not be able to end the prompt)."""

    def __init__(self, inner: Any):
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner

    def __len__(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._encoded(text).ids

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """What `encode` gives, and the characters [start, end) each token stands at."""
        found = self._encoded(text)
        return found.ids, found.offsets

    def _encoded(self, text: str) -> Any:
        try:
            return self.inner.encode(text, add_special_tokens=False)
        except TypeError as e:
            raise UsageError("the text holds half of a surrogate pair, which UTF-8 cannot write; "
                             "read it with the right encoding") from e

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)


def load(source: str | Path, device: str = "cpu") -> GPT:
    """The bundled model `base`, or the model in a folder that `save` wrote; float32.

    Raises StoreError where files are missing or do not fit together, MissingDependency without tokenizers, safetensors."""
    need("tokenizers", "a local language model", "lm")
    need("safetensors", "a local language model", "lm")
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    from ralm.lm.bundled import bundled

    folder = bundled(str(source)) if str(source) == "base" else Path(source)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise StoreError(f"'{folder}' has no {name}, so no model of ralm is there; give the folder of a checkpoint "
                             "(config.json, model.safetensors, tokenizer.json), or hf:NAME for one of transformers")
    config = GPTConfig.of(json.loads((folder / "config.json").read_text()), str(folder / "config.json"))
    model = Decoder(config)
    try:
        model.load_state_dict({n: t.float() for n, t in load_file(folder / "model.safetensors").items()})
    except RuntimeError as e:
        raise StoreError(f"weights and config of '{folder}' disagree: {' '.join(str(e).split())[:300]}; "
                         "use files that were written together") from e
    tokenizer = BPE(Tokenizer.from_file(str(folder / "tokenizer.json")))
    return GPT(model.to(device).requires_grad_(False), tokenizer, "bundled:base" if str(source) == "base" else f"gpt:{folder}")


def save(folder: Path, model: Decoder, tokenizer: BPE, config: GPTConfig) -> None:
    """Write a checkpoint (float16 weights). Every file is replaced atomically: whoever loads it meanwhile gets a whole one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".part"
    tokenizer.inner.save(str(part))
    part.replace(folder / "tokenizer.json")
    part.write_text(json.dumps(asdict(config), indent=1) + "\n")
    part.replace(folder / "config.json")
    save_file({n: p.detach().half().contiguous() for n, p in model.state_dict().items()}, part)
    part.chmod(0o644)  # safetensors writes for the owner alone
    part.replace(folder / "model.safetensors")
