"""The parts RETRO adds to a decoder: an encoder of neighbours and chunked cross-attention (Borgeaud et al. 2022, section 2).

RMSNorm before each block and SwiGLU as in gpt.py. Relative positions by rotation: queries and keys are turned by their positions
in chunks.py, so that an attention logit knows their difference and nothing else; positions begin anew with every neighbour, so the
order of neighbours means nothing.

Shapes: N pairs of a chunk and its neighbours, m tokens of a chunk, K neighbours, R tokens of each, S = K x R, H heads, E width of a
head, C width of the encoder, D width of the decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ralm.errors import UsageError, unknown
from ralm.lm.chunks import cross_positions, encoder_positions
from ralm.lm.gpt import rotate

GATES = ("tanh", "zero", "none")
EMBEDS = ("own", "base")


@dataclass(frozen=True)
class RetroConfig:
    """What is added to a decoder, and where. Layers count from 1, as in the paper.

    m: tokens of a chunk. layers: P, the decoder layers with cross-attention (empty: `every_third`). width, depth, heads, mlp:
    C and the shape of the encoder; enc_layers: P_enc, its layers that look at the chunk. cross_heads, cross_size: H and E of
    chunked cross-attention (their product need not be D). embed: the encoder's tokens by an embedding of its own, or by the
    decoder's and a projection. gate: what a layer's contribution is multiplied with: `tanh` of a number that begins at 0, `zero`
    nothing, but the output projection begins at 0, `none` nothing. With the first two a new model is the decoder, bit for bit.
    Not in the paper, both off by default: beside, an encoder's token begins with the tokens before and behind it too; scaled, a
    layer's contribution is also multiplied with a number that `Retro.begin` sets to the size of the stream it is added to."""

    m: int = 64
    layers: tuple[int, ...] = ()
    width: int = 256
    depth: int = 2
    heads: int = 4
    mlp: int = 704
    enc_layers: tuple[int, ...] = (1,)
    cross_heads: int = 4
    cross_size: int = 64
    embed: str = "base"
    gate: str = "tanh"
    theta: float = 10000.0
    eps: float = 1e-6
    bias: bool = False  # of the output projections
    beside: bool = False
    scaled: bool = False

    def __post_init__(self):
        for name in ("m", "width", "depth", "heads", "mlp", "cross_heads", "cross_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} makes no RETRO; use at least 1")
        if self.width % (2 * self.heads):
            raise UsageError(f"the encoder's width {self.width} does not split into {self.heads} heads of an even size; "
                             f"use a multiple of {2 * self.heads}")
        if self.cross_size % 2:
            raise UsageError(f"cross_size={self.cross_size} cannot be turned in pairs; use an even number")
        if self.gate not in GATES:
            raise unknown("gate", str(self.gate), GATES)
        if self.embed not in EMBEDS:
            raise unknown("embed", str(self.embed), EMBEDS)
        if odd := [p for p in self.enc_layers if not 1 <= p <= self.depth]:
            raise UsageError(f"the encoder has no layer {odd[0]}; its layers are 1 to {self.depth}")

    def placed(self, depth: int) -> tuple[int, ...]:
        """P for a decoder of so many layers, ascending. Raises UsageError for layers that it does not have."""
        layers = tuple(sorted(set(self.layers))) or every_third(depth)
        if odd := [p for p in layers if not 1 <= p <= depth]:
            raise UsageError(f"the decoder has no layer {odd[0]}; its layers are 1 to {depth}")
        return layers


def every_third(depth: int) -> tuple[int, ...]:
    """The published P: every third layer from 6, from 9 in deep models; from the middle in decoders too shallow for that."""
    first = 9 if depth > 15 else 6 if depth >= 6 else (depth + 1) // 2
    return tuple(range(first, depth + 1, 3))


@dataclass(frozen=True)
class Neighbours:
    """What was retrieved for chunks: tokens int64 [B, L, K, R] and mask bool, True for real tokens (None: all of them).

    Of a chunk without neighbours, of a missing neighbour and behind the end of a short one the mask is False; ids there are not
    read. In a forward [b, u] belongs to the u-th chunk that row b completes by the ids of that call; rows that complete fewer
    than others have False there."""

    tokens: Tensor
    mask: Tensor | None = None

    @staticmethod
    def of(tokens: Tensor, none: int = -1) -> Neighbours:
        """From one tensor in which `none` stands for no token."""
        return Neighbours(tokens.clamp(min=0), tokens != none)


# ---- attention ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def turns(positions: range, size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [len(positions), E] for `rotate`."""
    with torch.inference_mode(False):  # kept for later calls, which may be a training's
        frequency_E = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.outer(torch.tensor(positions, dtype=torch.float64), frequency_E).repeat(1, 2)
        return angle.cos().float().to(device), angle.sin().float().to(device)


class Attention(nn.Module):
    """Heads that read `context` from `width`; keys and values are made once and may be read many times."""

    def __init__(self, width: int, context: int, heads: int, size: int, bias: bool = False):
        super().__init__()
        self.heads, self.size = heads, size
        self.q = nn.Linear(width, heads * size, bias=False)
        self.k, self.v = (nn.Linear(context, heads * size, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * size, width, bias=bias)

    def keys(self, context_NKRC: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values of K runs of R tokens, each [N, H, K x R, E]; rotary [R, E] is the same for every run."""
        N, K, R, _ = context_NKRC.shape
        k_NHKRE = self.k(context_NKRC).view(N, K, R, self.heads, self.size).permute(0, 3, 1, 2, 4)
        v_NHKRE = self.v(context_NKRC).view(N, K, R, self.heads, self.size).permute(0, 3, 1, 2, 4)
        return rotate(k_NHKRE, rotary).flatten(2, 3), v_NHKRE.flatten(2, 3)

    def read(self, q_NKTX: Tensor, rotary: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], visible_NS: Tensor | None) -> Tensor:
        """What K runs of T queries (X = H x E, projected) read from the same keys, [N, K, T, width]. All of them in one go: the
        runs are laid along the query axis, so keys are neither copied nor projected per run."""
        N, K, T, _ = q_NKTX.shape
        q_NHKTE = rotate(q_NKTX.view(N, K, T, self.heads, self.size).permute(0, 3, 1, 2, 4), rotary)
        mask = None if visible_NS is None else visible_NS[:, None, None, :]
        y_NHQE = F.scaled_dot_product_attention(q_NHKTE.flatten(2, 3), *kv, attn_mask=mask)
        return self.o(y_NHQE.transpose(1, 2).reshape(N, K, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# ---- the encoder -----------------------------------------------------------------------------------------------------------


class EncoderBlock(nn.Module):
    """Attention within a neighbour (both ways), to the chunk where `looks`, feed-forward."""

    def __init__(self, c: RetroConfig, decoder: int, looks: bool):
        super().__init__()
        size = c.width // c.heads
        self.norm1, self.attention = nn.RMSNorm(c.width, c.eps), Attention(c.width, c.width, c.heads, size, c.bias)
        self.norm_cross = nn.RMSNorm(c.width, c.eps) if looks else None
        self.cross = Attention(c.width, decoder, c.heads, size, c.bias) if looks else None
        self.norm2, self.mlp = nn.RMSNorm(c.width, c.eps), SwiGLU(c.width, c.mlp)

    def forward(self, e_NKRC: Tensor, h_NmD: Tensor, own: tuple, theirs: tuple, visible_NKR: Tensor | None) -> Tensor:
        """own: turns of the R tokens; theirs: of the m tokens of the chunk."""
        runs = self.norm1(e_NKRC).flatten(0, 1)[:, None]  # every neighbour alone: [N x K, 1, R, C]
        visible = None if visible_NKR is None else visible_NKR.flatten(0, 1)
        y = self.attention.read(self.attention.q(runs), own, self.attention.keys(runs, own), visible)
        e_NKRC = e_NKRC + y.view(e_NKRC.shape)
        if self.cross is not None:
            kv = self.cross.keys(h_NmD[:, None], theirs)
            e_NKRC = e_NKRC + self.cross.read(self.cross.q(self.norm_cross(e_NKRC)), own, kv, None)
        return e_NKRC + self.mlp(self.norm2(e_NKRC))


class Encoder(nn.Module):
    """E_u^j = ENCODER(RET(C_u)^j, H_u) for all pairs of chunk u and neighbour j at once."""

    def __init__(self, c: RetroConfig, decoder: int):
        super().__init__()
        self.config = c
        self.before, self.behind = (nn.Linear(c.width, c.width, bias=False) if c.beside else None for _ in range(2))
        self.chunk = nn.RMSNorm(decoder, c.eps)  # H_u grows with depth, and with the model it comes from
        self.blocks = nn.ModuleList(EncoderBlock(c, decoder, p in c.enc_layers) for p in range(1, c.depth + 1))
        self.out = nn.RMSNorm(c.width, c.eps)

    def forward(self, e_NKRC: Tensor, h_NmD: Tensor, mask_NKR: Tensor | None) -> Tensor:
        """Encoded neighbours [N, K, R, C]. What stands at masked tokens means nothing."""
        c = self.config
        tokens, chunk = encoder_positions(e_NKRC.shape[2], c.m)
        own, theirs = (turns(p, c.width // c.heads, c.theta, e_NKRC.device) for p in (tokens, chunk))
        if mask_NKR is not None:  # a neighbour that is not there looks at itself: a softmax over nothing may be nan
            there_NKR, mask_NKR = mask_NKR, mask_NKR | ~mask_NKR.any(-1, keepdim=True)
        if self.before is not None:
            e_NKRC = self.beside(e_NKRC if mask_NKR is None else e_NKRC * there_NKR[..., None])
        h_NmD = self.chunk(h_NmD)
        for block in self.blocks:
            e_NKRC = block(e_NKRC, h_NmD, own, theirs, mask_NKR)
        return self.out(e_NKRC)

    def beside(self, e_NKRC: Tensor) -> Tensor:
        """Each token with what stands before and behind it in the same neighbour. An attention that finds a token then finds what
        followed it there in the same place: one step of copying instead of two (the smeared keys of Olsson et al. 2022)."""
        before, behind = F.pad(e_NKRC[..., :-1, :], (0, 0, 1, 0)), F.pad(e_NKRC[..., 1:, :], (0, 0, 0, 1))
        return e_NKRC + self.before(before) + self.behind(behind)


# ---- chunked cross-attention ---------------------------------------------------------------------------------------------


class ChunkedCrossAttention(nn.Module):
    """What a decoder layer reads from encoded neighbours: K and V once per chunk, softmax over all K x R tokens at once."""

    def __init__(self, c: RetroConfig, decoder: int):
        super().__init__()
        self.config = c
        self.norm = nn.RMSNorm(decoder, c.eps)
        self.attention = Attention(decoder, c.width, c.cross_heads, c.cross_size, c.bias)
        self.gate = nn.Parameter(torch.zeros(())) if c.gate == "tanh" else None
        self.scale = nn.Parameter(torch.ones(())) if c.scaled else None

    def keys(self, e_NKRC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunk's neighbours, each [N, H, S, E]."""
        return self.attention.keys(e_NKRC, self._turns(1, e_NKRC.shape[2], e_NKRC.device))

    def queries(self, x_BTD: Tensor) -> Tensor:
        """[B, T, X], not yet turned: a token's row depends on where its chunk begins."""
        return self.attention.q(self.norm(x_BTD))

    def read(self, q_NTX: Tensor, rows_NT: Tensor | None, kv: tuple[Tensor, Tensor], visible_NS: Tensor | None) -> Tensor:
        """What queries add to the stream, [N, T, D]: of all rows 0 to m-1 in order, or of the rows given."""
        cos_mE, sin_mE = self._turns(0, 0, q_NTX.device)
        rotary = (cos_mE, sin_mE) if rows_NT is None else (cos_mE[rows_NT][:, None, None], sin_mE[rows_NT][:, None, None])
        y_NTD = self.attention.read(q_NTX[:, None], rotary, kv, visible_NS)[:, 0]
        y_NTD = y_NTD if self.gate is None else y_NTD * self.gate.tanh()
        return y_NTD if self.scale is None else y_NTD * self.scale

    def _turns(self, side: int, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return turns(cross_positions(self.config.m, r)[side], self.config.cross_size, self.config.theta, device)


# ---- both -------------------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """All that is new: encoder, cross-attention of each layer in P (`cross`, by layer), and the encoder's own embedding or the
    projection of the decoder's."""

    def __init__(self, c: RetroConfig, decoder: int, layers: Iterable[int], vocab: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, c.width) if c.embed == "own" else nn.Linear(decoder, c.width, bias=False)
        self.encoder = Encoder(c, decoder)
        self.cross = nn.ModuleDict({str(p): ChunkedCrossAttention(c, decoder) for p in layers})
        self.apply(self._init)
        for block in self.encoder.blocks:  # each begins as the identity
            for part in (block.attention.o, block.mlp.down, *(() if block.cross is None else (block.cross.o,))):
                nn.init.zeros_(part.weight)
        if c.gate == "zero":
            for cross in self.cross.values():
                nn.init.zeros_(cross.attention.o.weight)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
