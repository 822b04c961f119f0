"""Small RETROs for tests: random weights under which every input matters, texts and their neighbours."""

import functools
import importlib.util
import itertools
from pathlib import Path

import torch

from ralm.lm.gpt import GPT, Decoder, GPTConfig
from ralm.lm.hf import HF
from ralm.lm.retro import Neighbours, Retro, RetroConfig

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

M, V, K, R = 4, 60, 2, 6  # tokens of a chunk, vocabulary, neighbours, tokens of each
SHAPE = dict(m=M, layers=(2, 3), width=12, depth=2, heads=2, mlp=16, cross_heads=3, cross_size=6)
ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox")
CLOSE = dict(atol=2e-5, rtol=1e-4)


class Words:
    """A tokenizer for models that are never asked for text."""

    def __len__(self):
        return V


def loud(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights under which every input matters: nothing at zero, gates open, norms near one."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3) if p.dim() > 1 else p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return module


@functools.cache
def retro(gate: str = "none", bias: bool = False, embed: str = "base", enc_layers: tuple = (1,)) -> Retro:
    net = loud(Decoder(GPTConfig(vocab=V, width=16, layers=4, heads=2, mlp=24, window=64)))
    lm = Retro(GPT(net, Words(), "gpt:tiny"), RetroConfig(gate=gate, bias=bias, embed=embed, enc_layers=enc_layers, **SHAPE))
    loud(lm.adapter, 1)
    return lm


def text(n: int, rows: int = 2, seed: int = 0, k: int = K, r: int = R) -> tuple[torch.Tensor, Neighbours]:
    """Ids and the neighbours of every complete chunk: short ones, missing ones, and (in several rows) chunks without any."""
    g = torch.Generator().manual_seed(seed)
    L = n // M
    tokens, mask = torch.randint(0, V, (rows, L, k, r), generator=g), torch.ones(rows, L, k, r, dtype=torch.bool)
    if L:
        mask[0, 0, -1, r // 2:] = False
        mask[-1, -1, 0] = False
    if L > 1 and rows > 1:
        mask[-1, 0] = False
        mask[0, 1] = False  # in the middle: what was read before must not be read on
    return torch.randint(0, V, (rows, n), generator=g), Neighbours(tokens, mask)


def some(n: Neighbours, rows=slice(None), chunks=slice(None)) -> Neighbours:
    return Neighbours(n.tokens[rows, chunks], n.mask[rows, chunks])


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, **CLOSE)


def in_pieces(lm: Retro, ids, neighbours: Neighbours, cuts) -> torch.Tensor:
    """The same text piece by piece, each with the neighbours of the chunks it completes."""
    past, out = None, []
    for a, b in itertools.pairwise([0, *cuts, ids.shape[1]]):
        piece = some(neighbours, chunks=slice(a // lm.m, b // lm.m)) if b // lm.m > a // lm.m else None
        given = lm.forward(ids[:, a:b], past=past, neighbours=piece)
        past, out = given.past, [*out, given.logits]
        assert past.length == b
    return torch.cat(out, 1)


@functools.cache
def hf(kind: str, gate: str = "none", noise: bool = True) -> Retro:
    base = HF(tiny.make(kind), tiny.tokenizer(), window=64)
    lm = Retro(base, RetroConfig(gate=gate, **(SHAPE | dict(layers=(1, 2)))))
    if noise:
        loud(lm.adapter, 1)
    return lm
