"""RETRO against retro-pytorch (Wang 2022) and labml's teaching code: python benchmarks/retro_peer.py PEER [PART ...] [--labml FILE]

PEER is a checkout of github.com/lucidrains/RETRO-pytorch; only its model file is run, and it needs einops. Parts:

oracle     logits and gradients on shared weights, at many lengths, with padded neighbours
labml      our cross-attentions against those of labml's model.py (--labml), which has no positions
generate   greedy tokens one after the other: ours with its caches, the peer's own loop (a whole forward per token)
train      forward, loss and backward; and what is saved for backward
encoder    the encoder's cross-attention, neighbours folded into the query axis against chunks repeated per neighbour

Two statements of the peer are changed before it runs (`source`): the shift of query positions, which sets 63 of 64 positions to 0,
and the learned null key, which ours does not have (a chunk without neighbours adds nothing). Neither changes what the peer costs.
The decoder around our adapter is made of the peer's weights too (`Around`): its norms, its GELU networks, its biases.

Seconds are processor seconds of one thread, the least of --repeat, ours and the peer's in turn."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ralm.lm import retro_net
from ralm.lm.chunks import Layout
from ralm.lm.gpt import Past, rotate
from ralm.lm.retro import Neighbours, Retro, RetroConfig
from ralm.types import LMOut

SIZE = 32  # of a head: with it the peer turns whole heads, as we do
HEADS = 8  # the peer has always eight, whatever it is told


# ---- the peer, and ours made of its weights ------------------------------------------------------------------------------------


def source(folder: Path) -> str:
    """The peer's model file without its retrieval (which imports FAISS and autofaiss) and with the two statements changed."""
    text = (folder / "retro_pytorch" / "retro_pytorch.py").read_text()
    for old, new in (("from retro_pytorch.retrieval import BERT_VOCAB_SIZE", "BERT_VOCAB_SIZE = 28996"),
                     ("q_pos_emb = F.pad(q_pos_emb, (0, 0, -causal_padding, causal_padding), value = 0.)", "pass"),
                     ("mask = F.pad(mask, (1, 0), value = True)", "mask = F.pad(mask, (1, 0), value = False)")):
        if text.count(old) != 1:
            sys.exit(f"the peer's model file has '{old}' {text.count(old)} times; this script knows commit d086613")
        text = text.replace(old, new)
    return text


def peer(folder: Path, seed: int = 0, **shape) -> nn.Module:
    module = types.ModuleType("retro_pytorch_model")
    exec(compile(source(folder), "retro_pytorch.py", "exec"), module.__dict__)
    torch.manual_seed(seed)
    net = module.RETRO(dim_head=SIZE, enc_cross_attn_layers=(1,), pad_id=0, **shape)
    with torch.no_grad():  # biases and gains that would show if they were lost
        for p in net.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return net.eval()


def norm(theirs: nn.Module) -> nn.RMSNorm:
    ours = nn.RMSNorm(len(theirs.gamma), 1e-16)
    ours.weight = theirs.gamma
    return ours


class AroundBlock(nn.Module):
    """A layer of the peer's decoder without its cross-attention, on the fused kernel and with a cache."""

    def __init__(self, attention: nn.Module, ff: nn.Module):
        super().__init__()
        self.norm1, self.a, self.norm2 = norm(attention.norm), attention.fn, norm(ff.norm)
        self.up, self.down = ff.fn.ff[0], ff.fn.ff[3]

    def forward(self, x_BTD: Tensor, rotary, past) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, _ = x_BTD.shape
        h = self.norm1(x_BTD)
        q, k, v = (f(h).view(B, T, HEADS, SIZE).transpose(1, 2) for f in (self.a.to_q, self.a.to_k, self.a.to_v))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x_BTD = x_BTD + self.a.to_out(y.transpose(1, 2).reshape(B, T, -1))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD)))), (k, v)


class Around(nn.Module):
    """The peer's decoder as a LanguageModel that Retro can wrap. No padding; a past is continued token by token."""

    name, tokenizer, bos, eos, config = "peer", None, 0, None, types.SimpleNamespace()

    def __init__(self, theirs: nn.Module):
        super().__init__()
        self.model, self.window, self.vocab = nn.Module(), theirs.seq_len, theirs.token_emb.num_embeddings
        self.model.embed, self.model.pos, self.model.to_d = theirs.token_emb, theirs.pos_emb, theirs.to_decoder_model_dim
        self.model.blocks = nn.ModuleList(AroundBlock(attn, ff) for attn, _, ff in theirs.decoder.layers)
        self.model.norm, self.model.logits = norm(theirs.decoder.norm_out), theirs.to_logits

    def forward(self, ids_BT: Tensor, *, past=None, mask=None, keep=None, neighbours=None, key=None) -> LMOut:
        at = past.length if past is not None else 0
        x = self.model.to_d(self.model.embed(ids_BT) + self.model.pos.weight[at:at + ids_BT.shape[1]])
        rotary, kept = retro_net.turns(range(at, at + ids_BT.shape[1]), SIZE, 10000.0, x.device), []
        for n, block in enumerate(self.model.blocks):
            x, kv = block(x, rotary, None if past is None else past.layers[n])
            kept.append(kv)
        hidden = self.model.norm(x if keep is None else x[:, -keep:])
        return LMOut(self.model.logits(hidden), hidden, Past(kept, None))


def take(ours: retro_net.Attention, theirs: nn.Module) -> None:
    ours.q, ours.k, ours.v, ours.o = theirs.to_q, theirs.to_k, theirs.to_v, theirs.to_out


def wrapped(theirs: nn.Module) -> Retro:
    """Our RETRO with the very parameters of the peer (not copies: a gradient of one is a gradient of the other)."""
    layers = tuple(p for p, (_, cross, _) in enumerate(theirs.decoder.layers, 1) if cross is not None)
    width = theirs.token_emb.embedding_dim
    lm = Retro(Around(theirs), RetroConfig(m=theirs.chunk_size, layers=layers, width=width, depth=len(theirs.encoder.layers),
                                           heads=width // SIZE, mlp=1, cross_heads=HEADS, cross_size=SIZE, embed="own", gate="none",
                                           bias=True))
    lm.adapter.embed, encoder = theirs.token_emb, lm.adapter.encoder
    encoder.chunk, encoder.out = nn.Identity(), nn.Sequential(norm(theirs.encoder.norm_out), theirs.encoder.project_out)
    for ours, (attention, cross, ff) in zip(encoder.blocks, theirs.encoder.layers):
        ours.norm1, ours.norm2, ours.mlp = norm(attention.norm), norm(ff.norm), ff.fn.ff
        take(ours.attention, attention.fn)
        if cross is not None:
            ours.norm_cross = norm(cross.norm)
            take(ours.cross, cross.fn)
    for p in layers:
        cross, ours = theirs.decoder.layers[p - 1][1], lm.adapter.cross[str(p)]
        ours.norm = norm(cross.norm)
        take(ours.attention, cross.fn.cross_attn)
    return lm


def retrieved(rows: int, n: int, m: int, k: int, vocab: int, holes: bool = False) -> tuple[Tensor, Neighbours]:
    """Ids [B, L, K, 2m] for the peer (0 is padding) and the same for us."""
    ids = torch.randint(1, vocab, (rows, n // m, k, 2 * m))
    if holes:
        ids[:, ::2, -1, m:] = 0
    return ids, Neighbours(ids, ids != 0)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def turns_of(repeat: int, **runs: Callable[[], object]) -> dict[str, float]:
    """The least seconds of each, run in turn."""
    best: dict[str, float] = {}
    for _ in range(repeat):
        for name, run in runs.items():
            best[name] = min(best.get(name, float("inf")), seconds(run))
    return best


# ---- parts -------------------------------------------------------------------------------------------------------------------


def oracle(folder: Path, args) -> None:
    m = 8
    theirs = peer(folder, num_tokens=97, max_seq_len=64, enc_dim=HEADS * SIZE, enc_depth=2, dec_dim=96, dec_depth=4,
                  dec_cross_attn_layers=(2, 4), chunk_size=m)
    ours, worst, slope = wrapped(theirs), 0.0, 0.0
    for n in range(m, 3 * m + 3):
        seq, (ids, neighbours) = torch.randint(1, 97, (2, n)), retrieved(2, n, m, 2, 97, holes=True)
        with torch.no_grad():
            worst = max(worst, float((theirs(seq, ids) - ours.forward(seq, neighbours=neighbours).logits).abs().max()))
            off = float((theirs(seq) - ours.forward(seq).logits).abs().max())
        target = torch.randn(2, n, 97) / n
        weights = [p for name, p in theirs.named_parameters() if "null_" not in name]
        a = torch.autograd.grad((theirs(seq, ids) * target).sum(), weights, allow_unused=True)
        b = torch.autograd.grad((ours.forward(seq, neighbours=neighbours).logits * target).sum(), weights, allow_unused=True)
        assert [x is None for x in a] == [x is None for x in b]
        slope = max(slope, *(float((x - y).abs().max()) for x, y in zip(a, b) if x is not None))
    size = max(float(x.abs().max()) for x in a if x is not None)
    print(f"oracle    lengths {m} to {3 * m + 2}: logits within {worst:.1e}, retrieval off {off:.1e}, "
          f"gradients within {slope:.1e} (largest {size:.2g})")
    assert worst < 1e-5 and off < 1e-5 and slope < 1e-6 * max(1.0, size)


def labml(folder: Path, args) -> None:
    if args.labml is None:
        print("labml     not compared: give --labml FILE")
        return
    logger = types.ModuleType("labml.logger")
    logger.inspect = print
    sys.modules |= {"labml": types.ModuleType("labml"), "labml.logger": logger}
    spec = importlib.util.spec_from_file_location("labml_retro", args.labml)
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    D, H, E, m, worst = 32, 4, 8, 5, 0.0
    still = (torch.ones(1, E), torch.zeros(1, E))  # labml's cross-attentions know no positions

    def same(ours: retro_net.Attention, theirs: nn.Module) -> retro_net.Attention:
        ours.q, ours.k, ours.v, ours.o = theirs.query, theirs.key, theirs.value, theirs.output
        return ours

    with torch.no_grad():
        for n in range(m, 4 * m):
            h, e = torch.randn(2, n, D), torch.randn(2, n // m, 3, 7, D)
            theirs = model.ChunkedCrossAttention(D, H, E, m)
            ours, layout = same(retro_net.Attention(D, D, H, E, True), theirs), Layout.of(m, [0, 0], n)
            q = layout.groups(ours.q(theirs.norm(h)))[:, 1:].flatten(0, 1)
            y = ours.read(q[:, None], still, ours.keys(e.flatten(0, 1), still), None)[:, 0].view(2, n // m, m, D)
            added = layout.places(F.pad(y, (0, 0, 0, 0, 1, 0)))
            worst = max(worst, float((h + added - theirs(h, e)).abs().max()))
            theirs, h = model.CrossAttention(D, H, E), torch.randn(2, n // m, m, D)
            ours = same(retro_net.Attention(D, D, H, E, True), theirs)
            y = ours.read(ours.q(theirs.norm(e)).flatten(0, 1), still, ours.keys(h.flatten(0, 1)[:, None], still), None)
            worst = max(worst, float((e + y.view(e.shape) - theirs(e, h)).abs().max()))
    print(f"labml     both cross-attentions at lengths {m} to {4 * m - 1}: within {worst:.1e}")
    assert worst < 1e-5


def sized(folder: Path, args, width: int = 256, depth: int = 6) -> tuple[nn.Module, Retro]:
    theirs = peer(folder, num_tokens=8192, max_seq_len=1024, enc_dim=256, enc_depth=2, dec_dim=width, dec_depth=depth,
                  dec_cross_attn_layers=(2, 4, 6), chunk_size=64)
    return theirs, wrapped(theirs)


def generate(folder: Path, args) -> None:
    theirs, ours = sized(folder, args)
    total, m, first = args.tokens, 64, torch.randint(1, 8192, (1, 1))
    ids, neighbours = retrieved(1, total + m, m, 2, 8192)
    said: dict[str, list[int]] = {}
    marks: dict[str, list[float]] = {"peer": [], "ours": []}

    def their_way() -> None:  # TrainingWrapper.generate without its retriever
        out, start = first, time.process_time()
        marks["peer"].clear()
        for i in range(total):
            c = out.shape[1] // m
            out = torch.cat((out, theirs(out, retrieved=ids[:, :c] if c else None)[:, -1].argmax(-1, keepdim=True)), 1)
            if (i + 1) % 64 == 0:
                marks["peer"].append(time.process_time() - start)
        said["peer"] = out[0].tolist()

    def our_way() -> None:
        out, past, new, start = first[0].tolist(), None, first, time.process_time()
        marks["ours"].clear()
        for i in range(total):
            u = len(out) // m - 1
            now = None if len(out) % m else Neighbours(neighbours.tokens[:, u:u + 1])
            given = ours.forward(new, past=past, neighbours=now, keep=1)
            past, new = given.past, given.logits[:, -1].argmax(-1, keepdim=True)
            out.append(int(new))
            if (i + 1) % 64 == 0:
                marks["ours"].append(time.process_time() - start)
        said["ours"] = out

    with torch.inference_mode():
        best = turns_of(args.repeat, ours=our_way, peer=their_way)
    last = [marks[x][-1] - (marks[x][-2] if len(marks[x]) > 1 else 0) for x in ("peer", "ours")]
    equal = sum(a == b for a, b in zip(said["ours"], said["peer"], strict=True))
    print(f"generate  {total} tokens: ours {best['ours']:.2f} s, peer {best['peer']:.2f} s, {best['peer'] / best['ours']:.1f}x; "
          f"last 64: {last[0] / last[1]:.1f}x; {equal} of {total + 1} tokens the same, {len(set(said['ours']))} different ones")
    print(f"          every 64: ours {[round(x, 2) for x in marks['ours']]}, peer {[round(x, 1) for x in marks['peer']]}")


def saved(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the storages that a forward keeps for backward, weights left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run()
    del loss
    return sum(kept.values())


def train(folder: Path, args) -> None:
    theirs, ours = sized(folder, args)
    ours.trainable("all")
    theirs.train()  # no dropout is set; its loss asks for it
    for n in args.lengths:
        seq, (ids, neighbours) = torch.randint(1, 8192, (1, n + 1)), retrieved(1, n, 64, 2, 8192)
        neighbours = Neighbours(ids)

        def ours_loss(seq=seq, neighbours=neighbours) -> Tensor:
            return F.cross_entropy(ours.forward(seq[:, :-1], neighbours=neighbours).logits.flatten(0, 1), seq[:, 1:].flatten())

        def their_loss(seq=seq, ids=ids) -> Tensor:
            return theirs(seq, ids, return_loss=True)

        gap = abs(ours_loss().item() - their_loss().item())
        best = turns_of(args.repeat, ours=lambda f=ours_loss: f().backward(), peer=lambda f=their_loss: f().backward())
        mine, other = saved(ours_loss, theirs) / 2 ** 20, saved(their_loss, theirs) / 2 ** 20
        print(f"train     {n} tokens: ours {best['ours']:.2f} s, peer {best['peer']:.2f} s, {best['peer'] / best['ours']:.2f}x; "
              f"saved for backward {mine:.0f} and {other:.0f} MiB, {1 - mine / other:.0%} less; losses differ by {gap:.1e}")


def encoder(folder: Path, args) -> None:
    """Forward, and forward with backward; a decoder as wide as the encoder, and one four times as wide (the published ones are up
    to 4.6 times): the peer projects the chunk's keys and values once per neighbour."""
    own, chunk = (retro_net.turns(range(n), SIZE, 10000.0, torch.device("cpu")) for n in (128, 64))
    for width, k in ((256, 2), (256, 4), (1024, 2), (1024, 4)):
        theirs, ours = sized(folder, args, width, 2)
        block, cross = ours.adapter.encoder.blocks[0], theirs.encoder.layers[0][1]
        e, h = torch.randn(16, k, 128, 256, requires_grad=True), torch.randn(16, 64, width, requires_grad=True)

        def folded(e=e, h=h, block=block) -> Tensor:
            return e + block.cross.read(block.cross.q(block.norm_cross(e)), own, block.cross.keys(h[:, None], chunk), None)

        def repeated(e=e, h=h, k=k, cross=cross, theirs=theirs) -> Tensor:
            pos = tuple(theirs.encoder.rotary_pos_emb(n, device=e.device) for n in (128, 64))
            return cross(e.flatten(0, 1), context=h.repeat_interleave(k, 0), pos_emb=pos)

        with torch.no_grad():
            gap = float((folded().flatten(0, 1) - repeated()).abs().max())
            read = turns_of(5 * args.repeat, ours=folded, peer=repeated)
        step = turns_of(3 * args.repeat, ours=lambda f=folded: f().sum().backward(), peer=lambda f=repeated: f().sum().backward())
        print(f"encoder   cross-attention of 16 chunks, {k} neighbours, to a decoder of width {width}: "
              + ", ".join(f"{name} {x['ours'] * 1e3:.0f} ms, peer {x['peer'] * 1e3:.0f} ms, {x['peer'] / x['ours']:.2f}x"
                          for name, x in (("forward", read), ("with backward", step))) + f"; outputs within {gap:.1e}")


PARTS = {"oracle": oracle, "labml": labml, "generate": generate, "train": train, "encoder": encoder}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", type=Path)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--labml", type=Path, help="labml_nn/transformers/retro/model.py")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for part in args.parts or PARTS:
        PARTS[part](args.peer, args)
