"""RETRO (Borgeaud et al. 2022): a decoder that reads the neighbours of each chunk of its text, whatever decoder it is.

    lm = Retro(load("base"), RetroConfig(m=64))         # RETRO-fit: this is the decoder, bit for bit, until it is trained
    lm = Retro(GPT(Decoder(config), tokenizer), RetroConfig(gate="none"))   # from scratch
    lm.trainable("new")                                 # or "all"
    out = lm.forward(ids_BT, neighbours=Neighbours(tokens_BLKR, mask_BLKR))
    out = lm.forward(one_B1, past=out.past, neighbours=...)   # neighbours where a chunk ends with these ids, else none

The order is that of algorithm 1: attention, at min(P) the encoder (conditioned on the stream there), chunked cross-attention,
feed-forward. Nothing of the decoder is rewritten. Its own forward runs, caches and masks; in a layer of P a hook on what stands
before its feed-forward network adds the contribution c to what that reads, and a hook on what it writes adds c to the stream:
x + c + FFN(norm(x + c)), exactly what a layer with cross-attention in the middle computes. `BETWEEN` says where that is. Blocks
that compute attention and feed-forward side by side (GPT-NeoX) have no stream in the middle: there x is what enters the layer.

Chunks count the real tokens of a row from its first on (BOS, where there is one). Shapes as in chunks.py and retro_net.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ralm.errors import CapabilityError, UsageError, unknown
from ralm.lm.chunks import Layout
from ralm.lm.retro_net import Adapter, Neighbours, RetroConfig
from ralm.types import LanguageModel, LMOut

__all__ = ["BETWEEN", "Neighbours", "Retro", "RetroConfig"]

# per architecture: where the blocks are, whose input the feed-forward half reads, whose output it adds to the stream
LLAMAS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), ("model.layers", "post_attention_layernorm", "mlp"))
GEMMAS = dict.fromkeys(("gemma2", "gemma3_text"), ("model.layers", "pre_feedforward_layernorm", "post_feedforward_layernorm"))
BETWEEN = LLAMAS | GEMMAS | {
    "gpt": ("blocks", "norm2", "down"), "gpt2": ("transformer.h", "ln_2", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "post_attention_layernorm", "mlp"),
    "olmo2": ("model.layers", "mlp", "post_feedforward_layernorm")}
TRAIN = ("new", "all")


class Retro:
    """A language model with neighbours. gives text, logits, hidden and neighbours; without any it is the decoder.

    base: a GPT (gpt.py) or an HF (hf.py), which stays what it is when used by itself. adapter: new weights by default.
    Raises UsageError for layers the decoder does not have, CapabilityError for an architecture that is not in BETWEEN."""

    gives = frozenset({"text", "logits", "hidden", "neighbours"})

    def __init__(self, base: LanguageModel, config: RetroConfig | None = None, adapter: Adapter | None = None):
        self.base, self.config = base, config or RetroConfig()
        self.name, self.tokenizer, self.window, self.vocab = f"retro({base.name})", base.tokenizer, base.window, base.vocab
        self.bos, self.eos, self.m = base.bos, base.eos, self.config.m
        blocks, reads, writes = self._between()
        self.layers = self.config.placed(len(blocks))
        self._embedding = base.model.embed if hasattr(base.model, "embed") else base.model.get_input_embeddings()
        rows, width = self._embedding.weight.shape
        self.adapter = (adapter or Adapter(self.config, width, self.layers, rows)).to(self._embedding.weight.device)
        self.model = nn.ModuleDict({"base": base.model, "adapter": self.adapter})
        self._here = threading.local()  # .reading: the forward that is under way in this thread
        for p in self.layers:
            getattr(blocks[p - 1], reads).register_forward_pre_hook(partial(self._before, p))
            getattr(blocks[p - 1], writes).register_forward_hook(self._after)

    def __repr__(self) -> str:
        new = sum(p.numel() for p in self.adapter.parameters())
        return f"Retro({self.base!r}, m={self.m}, layers={self.layers}, {new / 1e6:.1f}M new parameters)"

    def _between(self) -> tuple[Any, str, str]:
        """The decoder's blocks, and the names of what to hook in one."""
        kind = getattr(self.base.config, "model_type", "gpt")
        if kind not in BETWEEN:
            raise CapabilityError(f"where the layers of '{self.base.name}' ({kind}) can take cross-attention, ralm does not know; "
                                  f"it knows {', '.join(sorted(BETWEEN))}")
        path, reads, writes = BETWEEN[kind]
        return self.base.model.get_submodule(path), reads, writes

    def trainable(self, which: str) -> list[nn.Parameter]:
        """The weights to train: `new` freezes the decoder, `all` does not. Layers below the first new one then cost no memory."""
        if which not in TRAIN:
            raise unknown("part to train", str(which), TRAIN)
        self.base.model.requires_grad_(which == "all")
        self.adapter.requires_grad_(True)
        return [p for p in self.model.parameters() if p.requires_grad]

    def again(self) -> tuple[Any, Any]:
        """`context_fn` of torch.utils.checkpoint (use_reentrant=False): layers that are run again in backward, in whatever thread,
        read the neighbours they read in this forward. For a model of transformers: gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": lm.again})."""
        return nullcontext(), self._during(getattr(self._here, "reading", None))

    @torch.no_grad()
    def begin(self, ids_BT: Tensor) -> None:
        """Give new weights a start from which they learn soon, measured on some text (a few thousand tokens).

        The encoder's tokens get the size of one, contributions (config.scaled) three tenths of the stream's. And the queries of
        each layer begin as the best linear guess, from the stream, at what the encoder makes of the token just read, seen through
        that layer's own keys: so attention looks for places where the neighbours say the same, which are worth finding. From
        random queries a small model does not find out for hundreds of steps that there are any."""
        if isinstance(self.adapter.embed, nn.Linear):
            self.adapter.embed.weight.div_(self.adapter.embed(self._embedding.weight[:4096].float()).square().mean().sqrt())
        blocks, reads, _ = self._between()
        streams: dict[int, Tensor] = {}

        def seen(p: int, module: nn.Module, args: tuple) -> None:
            streams[p] = args[0]

        hooks = [getattr(blocks[p - 1], reads).register_forward_pre_hook(partial(seen, p)) for p in self.layers]
        try:
            self.base.forward(ids_BT, keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        device, encoder = self._embedding.weight.device, self.adapter.encoder
        e_BTC = self._embed(ids_BT.to(device)[:, None])
        wanted_NC = encoder.out(e_BTC if encoder.before is None else encoder.beside(e_BTC)).flatten(0, 2).float()
        for p, x_BTD in streams.items():
            cross = self.adapter.cross[str(p)]
            if cross.scale is not None:
                cross.scale.fill_(float(x_BTD.float().square().mean().sqrt()) * 0.3)
            x_ND = cross.norm(x_BTD.float()).flatten(0, 1)
            square = x_ND.T @ x_ND + 0.01 * len(x_ND) * torch.eye(x_ND.shape[1], device=device)
            guess_DC = torch.linalg.solve(square, x_ND.T @ wanted_NC)
            cross.attention.q.weight.copy_(1.5 * cross.attention.k.weight @ guess_DC.T)

    # ---- the contract -----------------------------------------------------------------------------------------------

    def forward(self, ids_BT: Tensor, *, past: Past | None = None, mask: Tensor | None = None, keep: int | Tensor | None = None,
                neighbours: Neighbours | None = None, key: str | None = None) -> LMOut:
        """As LanguageModel.forward, with the neighbours of the chunks that become complete by these ids (Neighbours).

        A chunk without any adds nothing to the tokens that would have read them; no neighbours at all is the decoder (RETRO[OFF]).
        Raises UsageError for neighbours, masks or a past that do not fit the ids."""
        if past is not None and not isinstance(past, Past):
            raise UsageError(f"the past is that of another model ({type(past).__module__}); pass the one '{self.name}' gave")
        reading = self._reading(ids_BT, past, mask, neighbours)
        with self._during(reading):
            out = self.base.forward(ids_BT, past=None if past is None else past.base, mask=mask, keep=keep, key=key)
        return out._replace(past=Past(out.past, self.m, reading.seen_B, reading.held, reading.blocks, self.name))

    def keys(self, ids_BT: Tensor, key: str = "ffn_in", neighbours: Neighbours | None = None) -> Tensor:
        """As the decoder's `keys`, under the neighbours given."""
        with self._during(self._reading(ids_BT, None, None, neighbours)):
            return self.base.keys(ids_BT, key)

    def key_width(self, key: str = "ffn_in") -> int:
        return self.base.key_width(key)

    def _reading(self, ids_BT: Tensor, past: Past | None, mask: Tensor | None, neighbours: Neighbours | None) -> _Reading:
        if ids_BT.dim() != 2 or ids_BT.numel() == 0:
            raise UsageError(f"ids have shape {tuple(ids_BT.shape)}; '{self.name}' reads [batch, tokens]")
        B, T = ids_BT.shape
        length, seen_B = (past.length, past.seen_B) if past is not None else (0, torch.zeros(B, dtype=torch.long))
        if mask is not None and tuple(mask.shape) != (B, length + T):
            raise UsageError(f"mask has shape {tuple(mask.shape)}, past and ids make {(B, length + T)}; it covers the past too")
        if len(seen_B) != B:
            raise UsageError(f"the past has {len(seen_B)} rows, the ids {B}; reorder the past")
        if mask is not None and not torch.equal(mask[:, :length].bool().sum(1).cpu(), seen_B):
            raise UsageError("the mask calls other tokens of the past real than it was read with; pass the same mask, grown")
        layout = Layout.of(self.m, seen_B, T, None if mask is None else mask[:, length:].bool())
        if neighbours is not None:
            self._check(neighbours, layout)
        return _Reading(self, layout, neighbours, past, seen_B)

    def _check(self, n: Neighbours, layout: Layout) -> None:
        """Raise UsageError for neighbours that are not those of the chunks which this piece completes."""
        B, done = len(layout.phase_B), layout.done
        if not isinstance(n, Neighbours):
            raise UsageError(f"neighbours are a {type(n).__name__}; pass ralm.lm.retro.Neighbours(tokens, mask)")
        if n.tokens.dim() != 4 or n.tokens.shape[0] != B or n.tokens.shape[1] < done:
            raise UsageError(f"neighbours have shape {tuple(n.tokens.shape)}, these ids are {B} rows that complete up to "
                             f"{done} chunks of {self.m} tokens; pass [{B}, {done}, neighbours, tokens]")
        if n.mask is not None and (n.mask.shape != n.tokens.shape or n.mask.dtype != torch.bool):
            raise UsageError(f"the neighbours' mask is {n.mask.dtype} {tuple(n.mask.shape)}; pass bool {tuple(n.tokens.shape)}")
        extra_BL = torch.arange(n.tokens.shape[1]) >= layout.done_B[:, None]
        given_BL = torch.ones_like(extra_BL) if n.mask is None else n.mask.any(-1).any(-1).cpu()
        if bool((extra_BL & given_BL).any()):
            b, u = (extra_BL & given_BL).nonzero()[0].tolist()
            raise UsageError(f"neighbours are given for chunk {u} of row {b}, which completes {int(layout.done_B[b])} by these "
                             "ids; mask them out")
        real = n.tokens if n.mask is None else n.tokens[n.mask]
        low, high = (int(real.min()), int(real.max())) if real.numel() else (0, 0)
        rows = len(self._embedding.weight)
        if low < 0 or high >= rows:
            raise UsageError(f"neighbours hold ids from {low} to {high}, '{self.name}' reads 0 to {rows - 1}; use the tokenizer "
                             "that belongs to it")

    # ---- inside the decoder's forward ----------------------------------------------------------------------------------

    @contextmanager
    def _during(self, reading: _Reading | None) -> Iterator[None]:
        outer, self._here.reading = getattr(self._here, "reading", None), reading
        try:
            yield
        finally:
            self._here.reading = outer

    def _before(self, p: int, module: nn.Module, args: tuple) -> tuple | None:
        """Layer p between attention and feed-forward: what the latter reads."""
        reading = getattr(self._here, "reading", None)
        if reading is None:
            return None  # the decoder, used by itself
        reading.pending = reading.at(p, args[0])
        return None if reading.pending is None else (args[0] + reading.pending, *args[1:])

    def _after(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """The same layer where feed-forward is added to the stream."""
        reading = getattr(self._here, "reading", None)
        if reading is None or reading.pending is None:
            return out
        out, reading.pending = out + reading.pending, None
        return out

    def _embed(self, tokens_NKR: Tensor) -> Tensor:
        """The encoder's tokens [N, K, R, C]."""
        embed = self.adapter.embed
        if isinstance(embed, nn.Embedding):
            return embed(tokens_NKR)
        e_NKRD = F.embedding(tokens_NKR, self._embedding.weight).to(embed.weight.dtype)
        return embed(e_NKRD).to(embed.weight.dtype)  # the stream is not rounded under autocast


class _Reading:
    """One forward: which pairs of chunk and neighbours it encodes, and who reads which. Pairs are numbered 0 to N-1.

    A layer may be run again, for gradient checkpointing: it finds `before` and `old` as they were, and does the same."""

    def __init__(self, retro: Retro, layout: Layout, neighbours: Neighbours | None, past: Past | None, seen_B: Tensor):
        self.retro, self.layout, self.neighbours = retro, layout, neighbours
        self.seen_B = seen_B + layout.count_B
        self.before, self.old = (past.held, past.blocks) if past is not None else (None, None)
        self.held, self.blocks, self.pending, self.encoded = None, self.old, None, None
        self.found_BL = torch.zeros(len(seen_B), layout.done, dtype=torch.bool)
        if neighbours is not None and layout.done:
            there_BL = torch.arange(layout.done) < layout.done_B[:, None]
            if neighbours.mask is not None:
                there_BL = there_BL & neighbours.mask[:, :layout.done].any(-1).any(-1).cpu()
            self.found_BL = there_BL
        self.every = bool(self.found_BL.all())
        self.b_N, self.u_N = self.found_BL.nonzero(as_tuple=True)

    def at(self, p: int, x_BTD: Tensor) -> Tensor | None:
        """What layer p adds to its stream, None for nothing."""
        if p == self.retro.layers[0]:
            self._encode(x_BTD)
        cross, new = self.retro.adapter.cross[str(p)], None
        if self.encoded is not None:
            new = cross.keys(self.encoded)
        if self.blocks is not None and self.blocks is not self.old:
            olds = (None, None) if self.old is None else self.old.kv[p]
            self.blocks.kv[p] = tuple(map(self._newest, olds, (None, None) if new is None else new))
        if x_BTD.shape[1] == 1:
            added = self._one(p, cross, x_BTD)
        else:
            added = self._many(p, cross, x_BTD, new)
        return None if added is None else added.to(x_BTD.dtype)

    def _encode(self, x_BTD: Tensor) -> None:
        """The pairs, where chunks end in this piece; what is left of the last chunk is kept."""
        layout, device = self.layout, x_BTD.device
        self.held = layout.rest(x_BTD, self.before)
        if len(self.b_N):
            tokens, mask = self.neighbours.tokens.to(device), self.neighbours.mask
            tokens, mask = tokens[self.b_N, self.u_N], None if mask is None else mask.to(device)[self.b_N, self.u_N]
            if mask is not None:
                tokens, mask = tokens.masked_fill(~mask, 0), None if bool(mask.all()) else mask
            h_BLmD = layout.chunks(x_BTD, self.before)
            h_NmD = h_BLmD.flatten(0, 1) if self.every else h_BLmD[self.b_N, self.u_N]
            adapter = self.retro.adapter
            self.encoded = adapter.encoder(self.retro._embed(tokens), h_NmD.to(adapter.encoder.blocks[0].norm1.weight.dtype), mask)
            self.visible_NS = torch.ones_like(tokens, dtype=torch.bool).flatten(1) if mask is None else mask.flatten(1)
            self.all_visible = mask is None
        if bool((layout.done_B > 0).any()):
            self.blocks = self._replaced(device)

    def _replaced(self, device: torch.device) -> Blocks | None:
        """The blocks after this piece (their keys follow layer by layer); None where no row has any."""
        layout = self.layout
        number_BL = torch.full(self.found_BL.shape, -1)
        number_BL[self.b_N, self.u_N] = torch.arange(len(self.b_N))
        ended_B = layout.done_B > 0
        last_B = number_BL.gather(1, (layout.done_B - 1).clamp(min=0)[:, None])[:, 0]
        self.fresh_B, self.last_B = (ended_B & (last_B >= 0)), last_B  # rows whose newest chunk has neighbours, and which pair
        old = None if self.old is None else self.old.visible_BS[..., None] & ~ended_B.to(device)[:, None, None]
        new = None if self.encoded is None else self.visible_NS[..., None]
        if old is None and not bool(self.fresh_B.any()):
            return None
        visible_BS = self._newest(old, new)[..., 0]
        return Blocks(visible_BS) if bool(visible_BS.any()) else None

    def _newest(self, old: Tensor | None, new: Tensor | None) -> Tensor:
        """Rows of old [B, ..., S, W], those whose newest chunk is here from new [N, ..., S', W]; zero behind the shorter."""
        if bool(self.fresh_B.all()):
            return new if torch.equal(self.last_B, torch.arange(len(new))) else new[self.last_B]
        like = new if old is None else old
        size = max(x.shape[-2] for x in (old, new) if x is not None)
        out = like.new_zeros(len(self.fresh_B), *like.shape[1:-2], size, like.shape[-1]) if old is None else _longer(old, size)
        if new is None or not bool(self.fresh_B.any()):
            return out
        rows = self.fresh_B.nonzero()[:, 0].to(like.device)
        return out.index_copy(0, rows, _longer(new, size)[self.last_B[self.fresh_B]].to(out.dtype))

    def _one(self, p: int, cross: Any, x_B1D: Tensor) -> Tensor | None:
        """One token per row: each reads its own block, the newest."""
        if self.blocks is None:
            return None
        rows_B1 = ((self.layout.phase_B + 1) % self.retro.m)[:, None].to(x_B1D.device)
        q_B1X = cross.queries(x_B1D.to(cross.norm.weight.dtype))
        visible = self.blocks.visible_BS
        if self.blocks.full:
            return cross.read(q_B1X, rows_B1, self.blocks.kv[p], None)
        none_B1 = ~visible.any(1, keepdim=True)
        return cross.read(q_B1X, rows_B1, self.blocks.kv[p], visible | none_B1).masked_fill(none_B1[..., None], 0)

    def _many(self, p: int, cross: Any, x_BTD: Tensor, new: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Many tokens per row: in groups that read the same, those that have something to read."""
        if new is None and self.old is None:
            return None
        q_BGmX = self.layout.groups(cross.queries(x_BTD.to(cross.norm.weight.dtype)))
        B, G, m, _ = q_BGmX.shape
        if self.old is None and self.every:
            y_NmD = cross.read(q_BGmX[:, 1:].flatten(0, 1), None, new, None if self.all_visible else self.visible_NS)
            return self.layout.places(F.pad(y_NmD.view(B, G - 1, m, -1), (0, 0, 0, 0, 1, 0)))
        b, g, kv, visible = self.b_N, self.u_N + 1, new, None if new is None else self.visible_NS
        if self.old is not None:
            before = self.old.visible_BS.any(1).nonzero()[:, 0]
            k, v, seen = (x[before] for x in (*self.old.kv[p], self.old.visible_BS[..., None]))
            if new is not None:
                size = max(k.shape[-2], new[0].shape[-2])
                k, v, seen = (torch.cat([_longer(x, size), _longer(y, size)]) for x, y in ((k, new[0]), (v, new[1]),
                                                                                          (seen, visible[..., None])))
            kv, visible = (k, v), seen[..., 0]
            b, g = torch.cat([before.cpu(), b]), torch.cat([torch.zeros(len(before), dtype=torch.long), g])
        y_NmD = cross.read(q_BGmX[b, g], None, kv, visible)
        out_BGmD = y_NmD.new_zeros(B, G, m, y_NmD.shape[-1])
        return self.layout.places(out_BGmD.index_put((b, g), y_NmD))


# ---- what is kept between forwards --------------------------------------------------------------------------------------


@dataclass
class Blocks:
    """The newest complete chunk's neighbours of each row: which of their tokens are there [B, S], keys and values [B, H, S, E] of
    every layer. Its size does not grow with the text."""

    visible_BS: Tensor
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        self.full = bool(self.visible_BS.all())


class Past:
    """The decoder's past; the stream of the incomplete chunk, which its neighbours will be encoded with; the blocks being read."""

    croppable = False  # blocks of earlier chunks are gone: a forward never changes a past, so keep the past itself instead

    def __init__(self, base: Any, m: int, seen_B: Tensor, held: Tensor, blocks: Blocks | None, name: str):
        self.base, self.m, self.seen_B, self.held, self.blocks, self.name = base, m, seen_B, held, blocks, name

    @property
    def length(self) -> int:
        return self.base.length

    def crop(self, n: int) -> Past:
        """Keep the first n places; returns itself. Raises CapabilityError where that would begin an earlier chunk."""
        if not 0 <= n <= self.length:
            raise UsageError(f"cannot crop a past of {self.length} tokens to {n}; use 0 to {self.length}")
        gone_B = torch.full_like(self.seen_B, self.length - n) if self.base.mask is None else self.base.mask[:, n:].sum(1).cpu()
        if n and bool((gone_B > self.seen_B % self.m).any()):
            raise CapabilityError(f"'{self.name}' keeps the neighbours of the newest chunk of {self.m} tokens only: its past "
                                  f"cannot be cropped from {self.length} to {n}; run the first {n} tokens again")
        self.base, self.seen_B = self.base.crop(n), self.seen_B - gone_B
        self.blocks = self.blocks if n else None
        return self

    def reorder(self, index_B: Tensor) -> Past:
        """Row b becomes what row index_B[b] was; returns itself. The batch may grow or shrink."""
        there = index_B.to(self.held.device)
        self.base, self.seen_B, self.held = self.base.reorder(index_B), self.seen_B[index_B.cpu()], self.held[there]
        if self.blocks is not None:
            self.blocks = Blocks(self.blocks.visible_BS[there], {p: (k[there], v[there]) for p, (k, v) in self.blocks.kv.items()})
        return self


def _longer(x: Tensor, size: int) -> Tensor:
    """x [..., S, W] with zeros behind, [..., size, W]."""
    return x if x.shape[-2] == size else F.pad(x, (0, 0, 0, size - x.shape[-2]))
