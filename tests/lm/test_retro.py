"""RETRO: against the definition token by token, and against itself in pieces."""

import importlib.util
import itertools
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from ralm.errors import CapabilityError, UsageError  # noqa: E402
from ralm.how.rows import PrefixCache, logp_rows  # noqa: E402
from ralm.lm.gpt import rotate  # noqa: E402
from ralm.lm.hf import HF  # noqa: E402
from ralm.lm.retro import Neighbours, Retro, RetroConfig  # noqa: E402
from ralm.lm.retro_net import every_third, turns  # noqa: E402
from ralm.testing import check_lm  # noqa: E402
from ralm.types import LanguageModel  # noqa: E402

_spec = importlib.util.spec_from_file_location("tiny_retro", Path(__file__).parent / "tiny_retro.py")
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)
M, V, K, R, SHAPE, tiny = small.M, small.V, small.K, small.R, small.SHAPE, small.tiny
text, some, close, retro, hf, loud, in_pieces = (
    small.text, small.some, small.close, small.retro, small.hf, small.loud, small.in_pieces)

# ---- the definition --------------------------------------------------------------------------------------------------------


def read_one(q_X, context_SC, positions, attention, theta):
    """One query over tokens at the distances given, head by head: what every attention here must equal."""
    heads, size = attention.heads, attention.size
    k, v = attention.k(context_SC).view(-1, heads, size), attention.v(context_SC).view(-1, heads, size)
    out = []
    for h in range(heads):
        logits = []
        for s, d in enumerate(positions):  # the query turned by the distance, the key as it is
            cos, sin = (x.to(q_X.dtype) for x in turns(range(abs(d), abs(d) + 1), size, theta, q_X.device))
            turned = rotate(q_X.view(heads, size)[h][None], (cos, sin if d >= 0 else -sin))[0]
            logits.append(turned @ k[s, h] / size ** 0.5)
        out.append(torch.stack(logits).softmax(0) @ v[:, h])
    return attention.o(torch.cat(out))


def encode_one(lm: Retro, tokens_R, h_mD):
    """One neighbour, without padding, given its chunk."""
    c, encoder = lm.config, lm.adapter.encoder
    e, h = lm._embed(tokens_R), encoder.chunk(h_mD)
    n = range(len(tokens_R))
    for p, block in enumerate(encoder.blocks, 1):
        x = block.norm1(e)
        e = e + torch.stack([read_one(block.attention.q(x[i]), x, [i - j for j in n], block.attention, c.theta) for i in n])
        if p in c.enc_layers:
            x = block.norm_cross(e)
            e = e + torch.stack([read_one(block.cross.q(x[i]), h, [i - j for j in range(c.m)], block.cross, c.theta) for i in n])
        e = e + block.mlp(block.norm2(e))
    return encoder.out(e)


def by_definition(lm: Retro, ids_T, neighbours: Neighbours):
    """Logits [T, V] of one row by algorithm 1, every token and neighbour by itself."""
    net, m = lm.base.model, lm.m
    rotary = net.cos[:len(ids_T)].to(net.embed.weight.dtype), net.sin[:len(ids_T)].to(net.embed.weight.dtype)
    x, encoded = net.embed(ids_T)[None], {}
    for p, block in enumerate(net.blocks, 1):
        x = x + block.attention(block.norm1(x), rotary, None, None, True)[0]
        if p == lm.layers[0]:
            for u in range(len(ids_T) // m):
                found = [(tokens[mask], r) for tokens, mask in zip(neighbours.tokens[0, u], neighbours.mask[0, u])
                         if (r := int(mask.sum()))]
                encoded[u] = [(encode_one(lm, tokens, x[0, u * m:(u + 1) * m]), r) for tokens, r in found]
        if p in lm.layers:
            cross, added = lm.adapter.cross[str(p)], torch.zeros_like(x[0])
            for t in range(len(ids_T)):
                u, i = (t + 1) // m - 1, (t + 1) % m
                if encoded.get(u):
                    e = torch.cat([e for e, _ in encoded[u]])
                    d = [i - j + m - 1 for _, r in encoded[u] for j in range(r)]
                    y = read_one(cross.attention.q(cross.norm(x[0, t])), e, d, cross.attention, lm.config.theta)
                    added[t] = y if cross.gate is None else y * cross.gate.tanh()
            x = x + added
        x = x + block.think(block.norm2(x))
    return (net.norm(x) @ net.embed.weight.T)[0]


@pytest.mark.parametrize("kind", [dict(), dict(gate="tanh", bias=True), dict(embed="own", enc_layers=(1, 2)), dict(enc_layers=())])
def test_every_token_is_what_the_paper_says(kind):
    lm = retro(**kind)
    with torch.no_grad():
        for n in (3, 4, 9):
            ids, neighbours = text(n)
            ours = lm.forward(ids, neighbours=neighbours).logits
            for b in range(2):
                close(ours[b], by_definition(lm, ids[b], some(neighbours, slice(b, b + 1))))


def test_gradients_are_those_of_the_definition_and_of_differences():
    """Every weight, in float64: against autograd through the definition, and against finite differences of the loss."""
    lm = retro("tanh", True)
    lm.model.double()
    try:
        ids, neighbours = text(9)
        weights = lm.trainable("all")
        target = torch.randn(2, 9, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

        def loss():
            with lm._during(lm._reading(ids, None, None, neighbours)):  # the decoder's own forward: `forward` rounds to float32
                hidden_BTD, _ = lm.base.model(ids)
            return ((hidden_BTD @ lm.base.model.embed.weight.T) * target).sum()

        ours = torch.autograd.grad(loss(), weights)
        theirs = torch.autograd.grad(sum((by_definition(lm, ids[b], some(neighbours, slice(b, b + 1))) * target[b]).sum()
                                         for b in range(2)), weights)
        for w, a, b in zip(weights, ours, theirs):
            assert a.abs().max() > 1e-6, f"a weight of shape {tuple(w.shape)} takes no part"
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        for w, a in zip(weights, ours):
            direction = torch.randn(w.shape, dtype=w.dtype, generator=torch.Generator().manual_seed(5))
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    w.add_(direction, alpha=step)
                    values.append(float(loss()))
                    w.sub_(direction, alpha=step)
            slope = float((a * direction).sum())
            assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-5 * max(1, abs(slope)), tuple(w.shape)
    finally:
        lm.model.float().requires_grad_(False)


# ---- what must not matter, and what must ------------------------------------------------------------------------------------


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def test_order_of_neighbours_repetition_and_padding(no_grad):
    lm = retro("none")
    ids, n = text(14, k=3)
    n = Neighbours(n.tokens, n.mask)
    whole = lm.forward(ids, neighbours=n).logits
    for order in itertools.permutations(range(3)):
        close(lm.forward(ids, neighbours=Neighbours(n.tokens[:, :, order], n.mask[:, :, order])).logits, whole)
    one = Neighbours(n.tokens[:, :, :1])
    close(lm.forward(ids, neighbours=Neighbours(n.tokens[:, :, [0, 0, 0]])).logits, lm.forward(ids, neighbours=one).logits)
    wide = Neighbours(torch.full((2, 3, 5, 9), 7), torch.zeros(2, 3, 5, 9, dtype=torch.bool))
    wide.tokens[:, :, 1:4, :R], wide.mask[:, :, 1:4, :R] = n.tokens, n.mask
    close(lm.forward(ids, neighbours=wide).logits, whole)
    other = Neighbours(torch.where(n.mask, n.tokens, (n.tokens + 11) % V), n.mask)
    assert torch.equal(lm.forward(ids, neighbours=other).logits, whole)  # ids under the mask are not read
    none = Neighbours.of(torch.where(n.mask, n.tokens, -1))
    assert torch.equal(lm.forward(ids, neighbours=none).logits, whole)


@pytest.mark.parametrize("bias", [False, True])
def test_a_chunk_without_neighbours_adds_exactly_nothing(bias, no_grad):
    lm = retro("none", bias)
    ids, n = text(14)
    off = lm.forward(ids).logits
    nothing = Neighbours(n.tokens, torch.zeros_like(n.mask))
    assert torch.equal(lm.forward(ids, neighbours=nothing).logits, off)
    assert torch.equal(lm.forward(ids).logits, lm.base.forward(ids).logits)
    late = Neighbours(n.tokens, torch.zeros_like(n.mask))
    late.mask[0, 2] = True  # one chunk of one row alone: read from token 3 m - 1 on
    moved = (lm.forward(ids, neighbours=late).logits - off).abs().amax(-1)
    assert moved[1].max() == 0 and moved[0, :3 * M - 1].max() == 0 and moved[0, 3 * M - 1:].min() > 1e-3


def test_causal_at_every_position_and_length(no_grad):
    """Other tokens from t on, other neighbours of every chunk that is not complete before t: nothing before t moves, t does."""
    lm = retro("none")
    for n in range(1, 3 * M + 3):
        ids, neighbours = text(n, rows=1, seed=n)
        whole = lm.forward(ids, neighbours=neighbours).logits
        assert lm.forward(ids, neighbours=neighbours).logits.shape == (1, n, V)
        for t in range(n):
            other, tokens = ids.clone(), neighbours.tokens.clone()
            other[:, t:] = (other[:, t:] + 1 + t) % V
            tokens[:, (t // M):] = (tokens[:, (t // M):] + 7) % V  # chunks 0 .. t//m - 1 are complete before t
            gap = (lm.forward(other, neighbours=Neighbours(tokens, neighbours.mask)).logits - whole).abs().amax((0, 2))
            assert t == 0 or gap[:t].max() < 1e-5, f"other tokens from {t} of {n} on move an earlier one by {gap[:t].max()}"
            assert gap[t] > 1e-4


def test_neighbours_are_read_from_the_last_token_of_their_chunk_on(no_grad):
    lm = retro("none")
    ids, n = text(3 * M + 2, rows=1)
    n = Neighbours(n.tokens)
    whole = lm.forward(ids, neighbours=n).logits
    for u in range(3):
        other = n.tokens.clone()
        other[:, u] = (other[:, u] + 7) % V
        gap = (lm.forward(ids, neighbours=Neighbours(other)).logits - whole).abs().amax((0, 2))
        assert gap[:(u + 1) * M - 1].max() < 1e-5 and gap[(u + 1) * M - 1:].min() > 1e-4


# ---- in pieces ------------------------------------------------------------------------------------------------------------


def test_token_by_token_at_every_length(no_grad):
    lm = retro("tanh", True)  # with biases: a row without neighbours beside one that has some must not get them
    for n in range(1, 3 * M + 3):
        ids, neighbours = text(n, seed=n)
        close(in_pieces(lm, ids, neighbours, range(1, n)), lm.forward(ids, neighbours=neighbours).logits)


def test_every_way_to_cut_in_two_and_some_in_three(no_grad):
    lm = retro("tanh", True)
    ids, neighbours = text(3 * M + 2)
    whole = lm.forward(ids, neighbours=neighbours).logits
    for a in range(1, 3 * M + 2):
        close(in_pieces(lm, ids, neighbours, (a,)), whole)
        if a > 3:
            close(in_pieces(lm, ids, neighbours, (a - 3, a)), whole)


def test_a_past_can_be_continued_twice_reordered_and_cropped(no_grad):
    lm = retro("none")
    ids, neighbours = text(2 * M + 3)
    whole = lm.forward(ids, neighbours=neighbours).logits
    first = lm.forward(ids[:, :2 * M + 1], neighbours=neighbours)
    for _ in range(2):
        close(lm.forward(ids[:, 2 * M + 1:], past=first.past).logits, whole[:, 2 * M + 1:])
    turned = lm.forward(ids[:, :2 * M + 1], neighbours=neighbours).past.reorder(torch.tensor([1, 0, 1]))
    close(lm.forward(ids[[1, 0, 1], 2 * M + 1:], past=turned).logits, whole[[1, 0, 1], 2 * M + 1:])
    past = lm.forward(ids, neighbours=neighbours).past
    assert not past.croppable and past.crop(2 * M + 3) is past
    close(lm.forward(ids[:, 2 * M + 1:], past=past.crop(2 * M + 1)).logits, whole[:, 2 * M + 1:])
    with pytest.raises(CapabilityError, match="newest chunk of 4 tokens"):
        past.crop(2 * M - 1)
    with pytest.raises(UsageError, match="0 to 9"):
        past.crop(10)
    close(lm.forward(ids, past=past.crop(0), neighbours=neighbours).logits, whole)


# ---- rows of unequal length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt", "llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_at_different_phases(kind, side, no_grad):
    """Rows of 11, 6 and 3 tokens in one batch, continued by 4 tokens at once and 6 one by one, against each row alone."""
    lm = retro("none") if kind == "gpt" else hf(kind)
    lengths, more, m, rows = [11, 6, 3], 10, lm.m, 3
    ids, neighbours = text(11 + more, rows=rows, seed=2)
    alone = [lm.forward(torch.cat([ids[b:b + 1, :n], ids[b:b + 1, 11:]], 1),
                        neighbours=some(neighbours, slice(b, b + 1), slice((n + more) // m))).logits[0]
             for b, n in enumerate(lengths)]
    place = [slice(11 - n, 11) if side == "left" else slice(0, n) for n in lengths]
    padded, mask = torch.full((rows, 11), 7), torch.zeros(rows, 11, dtype=torch.long)
    for b, n in enumerate(lengths):
        padded[b, place[b]], mask[b, place[b]] = ids[b, :n], 1
    seen, past, at = [0] * rows, None, 0
    for width in (11, 4, *[1] * 6):
        new = padded if past is None else ids[:, 11 + at:11 + at + width]
        if past is not None:
            mask = torch.cat([mask, torch.ones(rows, width, dtype=torch.long)], 1)
            at += width
        now = [n + at for n in lengths]
        most = max(b // m - a // m for a, b in zip(seen, now))
        piece = Neighbours(torch.zeros(rows, most, K, R, dtype=torch.long), torch.zeros(rows, most, K, R, dtype=torch.bool))
        for b, (old, to) in enumerate(zip(seen, now)):
            piece.tokens[b, :to // m - old // m] = neighbours.tokens[b, old // m:to // m]
            piece.mask[b, :to // m - old // m] = neighbours.mask[b, old // m:to // m]
        first, out = past is None, lm.forward(new, past=past, mask=mask, neighbours=piece)
        for b in range(rows):
            close(out.logits[b, place[b]] if first else out.logits[b], alone[b][seen[b]:now[b]])
        past, seen = out.past, now


def test_laws_and_prefixes(no_grad):
    """The contract's own check, and rows through the cache of the engine, evidence or not."""
    lm = retro("none")
    assert isinstance(lm, LanguageModel) and lm.gives == {"text", "logits", "hidden", "neighbours"}
    ids = text(13, rows=1)[0][0].tolist()
    check_lm(lm, ids)
    cache = PrefixCache(lm)
    for n in range(2, 14):
        close(cache.logp_rows([ids[:n]], [n])[0], logp_rows(lm, [ids[:n]], [n])[0])
    assert cache.prefills == 1 and cache.steps == 11


def test_keys_and_states_see_the_neighbours(no_grad):
    lm = retro("none")
    ids, n = text(9)
    for key in ("ffn_in", "hidden"):
        out = lm.forward(ids, neighbours=n, key=key)
        close(out.key, lm.keys(ids, key, neighbours=n))
        assert not torch.equal(out.key[:, M:], lm.keys(ids, key)[:, M:]) and out.key.shape[-1] == lm.key_width(key)
        assert torch.equal(lm.keys(ids, key), lm.base.keys(ids, key))
    close(lm.forward(ids, neighbours=n, keep=2).logits, lm.forward(ids, neighbours=n).logits[:, -2:])


def test_the_base_model_by_itself_is_untouched(no_grad):
    lm = retro("none")
    ids, n = text(9)
    before = lm.base.forward(ids).logits
    with pytest.raises(UsageError):
        lm.forward(torch.full((2, 9), V), neighbours=n)  # fails inside the decoder's forward
    assert torch.equal(lm.base.forward(ids).logits, before)
    with pytest.raises(CapabilityError, match="cannot read neighbours"):
        lm.base.forward(ids, neighbours=n)


# ---- shapes and bad input ---------------------------------------------------------------------------------------------------


def test_published_layers():
    assert every_third(12) == (6, 9, 12) and every_third(24) == (9, 12, 15, 18, 21, 24) and every_third(32)[-1] == 30
    assert [every_third(n) for n in (1, 2, 3, 5)] == [(1,), (1,), (2,), (3,)]


BAD = [
    (dict(ids=text(9)[0], neighbours=text(9)[1].tokens), "pass ralm.lm.retro.Neighbours"),
    (dict(ids=text(9)[0], neighbours=text(7)[1]), r"\(2, 1, 2, 6\), these ids are 2 rows that complete up to 2"),
    (dict(ids=text(9)[0], neighbours=Neighbours(text(9)[1].tokens[:1])), "these ids are 2 rows"),
    (dict(ids=text(9)[0], neighbours=Neighbours(text(9)[1].tokens, torch.ones(2, 2, 2, 5))), "pass bool"),
    (dict(ids=text(7)[0], neighbours=Neighbours(text(9)[1].tokens)), "for chunk 1 of row 0, which completes 1"),
    (dict(ids=text(9)[0], neighbours=Neighbours(text(9)[1].tokens + V)), "use the tokenizer that belongs to it"),
    (dict(ids=text(9)[0][0]), r"reads \[batch, tokens\]"),
    (dict(ids=text(9)[0], mask=torch.ones(2, 8)), "mask has shape"),
    (dict(ids=text(9)[0], past=object()), "that of another model"),
]


@pytest.mark.parametrize("call,said", BAD)
def test_bad_input(call, said, no_grad):
    with pytest.raises(UsageError, match=said):
        retro("none").forward(call.pop("ids"), **call)


def test_bad_pasts_and_shapes(no_grad):
    lm = retro("none")
    past = lm.forward(text(5)[0]).past
    with pytest.raises(UsageError, match="has 2 rows, the ids 1"):
        lm.forward(text(2, rows=1)[0], past=past)
    mask = torch.ones(2, 7)
    mask[0, 0] = 0
    with pytest.raises(UsageError, match="other tokens of the past real"):
        lm.forward(text(2)[0], past=past, mask=mask)
    for wrong, said in ((dict(m=0), "m=0"), (dict(width=10, heads=4), "multiple of 8"), (dict(cross_size=5), "even number"),
                        (dict(gate="tan"), "Did you mean 'tanh'"), (dict(enc_layers=(3,)), "layers are 1 to 2"),
                        (dict(embed="mine"), "unknown embed")):
        with pytest.raises(UsageError, match=said):
            RetroConfig(**wrong)
    with pytest.raises(UsageError, match="no layer 5; its layers are 1 to 4"):
        Retro(lm.base, RetroConfig(layers=(5,)))
    with pytest.raises(CapabilityError, match="it knows gemma"):
        Retro(HF(tiny.make("bloom"), tiny.tokenizer(), window=64))
    with pytest.raises(UsageError, match="unknown part to train"):
        lm.trainable("none")
