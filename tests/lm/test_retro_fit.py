"""RETRO-fit of real architectures: step 0, where the contributions enter, decoding, and training."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from ralm.lm.gpt import GPT, Decoder, GPTConfig  # noqa: E402
from ralm.lm.hf import HF  # noqa: E402
from ralm.lm.retro import BETWEEN, Neighbours, Retro, RetroConfig  # noqa: E402

_spec = importlib.util.spec_from_file_location("tiny_retro", Path(__file__).parent / "tiny_retro.py")
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)
M, V, SHAPE, tiny, ARCHITECTURES, Words = small.M, small.V, small.SHAPE, small.tiny, small.ARCHITECTURES, small.Words
text, close, retro, hf, loud, in_pieces = small.text, small.close, small.retro, small.hf, small.loud, small.in_pieces


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("gate", ["tanh", "zero"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_step_zero_is_the_base_model_bit_for_bit(kind, gate, no_grad):
    lm = hf(kind, gate, noise=False)
    ids, n = text(14)
    base = lm.base.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(lm.base.forward(ids).logits, lm.forward(ids, neighbours=n).logits)
    close(lm.forward(ids, neighbours=n).logits, base)
    for cross in lm.adapter.cross.values():  # and the way is open: the first step of training moves it
        w = cross.gate if gate == "tanh" else cross.attention.o.weight
        w.add_(0.3 if gate == "tanh" else torch.randn(w.shape) * 0.3)
    assert (lm.forward(ids, neighbours=n).logits - base)[:, M - 1:].abs().amax(-1)[0].min() > 1e-4
    assert torch.equal(lm.forward(ids).logits, lm.base.forward(ids).logits)  # RETRO[OFF] stays the base model


def test_step_zero_of_our_decoder(no_grad):
    net = loud(Decoder(GPTConfig(vocab=V, width=16, layers=4, heads=2, mlp=24, window=64)))
    ids, n = text(14)
    alone = GPT(net, Words(), "gpt:tiny").forward(ids).logits
    for gate in ("tanh", "zero"):
        lm = Retro(GPT(net, Words(), "gpt:tiny"), RetroConfig(gate=gate, **SHAPE))
        assert torch.equal(lm.forward(ids, neighbours=n).logits, alone)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_retrofit_enters_the_stream_before_the_feed_forward_network(kind, no_grad, monkeypatch):
    """The same contributions put in by other means: added to what attention writes to the stream, in the base model alone."""
    lm = hf(kind)
    ids, n = text(14)
    added, at = {}, type(lm._reading(ids, None, None, n)).at

    def record(self, p, x):
        added[p] = at(self, p, x)
        return added[p]

    monkeypatch.setattr(type(lm._reading(ids, None, None, n)), "at", record)
    ours = lm.forward(ids, neighbours=n).logits
    monkeypatch.undo()
    blocks = lm.base.model.get_submodule(BETWEEN[lm.base.config.model_type][0])
    hooks = []
    for p, c in added.items():
        block = blocks[p - 1]
        if kind == "gpt_neox":  # side by side: the FFN must be told itself
            hooks.append(block.post_attention_layernorm.register_forward_pre_hook(lambda _, args, c=c: (args[0] + c,)))
            writes = block.attention
        else:
            writes = block.attn if kind == "gpt2" else block.post_attention_layernorm if "gemma" in kind else block.self_attn
        hooks.append(writes.register_forward_hook(
            lambda _, args, out, c=c: (out[0] + c, *out[1:]) if isinstance(out, tuple) else out + c))
    theirs = lm.base.model(input_ids=ids, use_cache=False).logits
    for h in hooks:
        h.remove()
    close(ours, theirs)
    assert set(added) == set(lm.layers) and (ours - lm.base.forward(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_retrofits_decode_as_they_read(kind, no_grad):
    lm = hf(kind)
    ids, n = text(3 * M + 2, seed=4)
    whole = lm.forward(ids, neighbours=n).logits
    torch.testing.assert_close(in_pieces(lm, ids, n, range(1, 3 * M + 2)), whole, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(in_pieces(lm, ids, n, (5, 6, 11)), whole, atol=5e-5, rtol=1e-4)


def test_training_the_new_weights_alone():
    lm = hf("llama", "tanh")
    ids, n = text(9)
    weights = lm.trainable("new")
    assert {id(w) for w in weights} == {id(w) for w in lm.adapter.parameters()}
    lm.forward(ids, neighbours=n).logits.square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in weights)
    assert all(p.grad is None for p in lm.base.model.parameters())
    assert len(lm.trainable("all")) == len(list(lm.model.parameters()))
    lm.forward(ids, neighbours=n).logits.square().sum().backward()
    assert all(p.grad is not None for p in lm.base.model.parameters())
    lm.model.zero_grad()
    lm.model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_gradient_checkpointing_reads_the_same_neighbours_again(kind):
    """Two forwards before one backward, so that what is read again must be each one's own."""
    lm = hf(kind)
    lm.base.model.train()
    for module in lm.base.model.modules():
        module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    weights, texts = lm.trainable("all"), [text(9, seed=1), text(9, seed=2)]

    def grads():
        loss = sum(lm.forward(ids, neighbours=n).logits.sin().sum() for ids, n in texts)
        return torch.autograd.grad(loss, weights)

    try:
        plain, runs = grads(), []
        handle = lm.adapter.encoder.register_forward_hook(lambda *_: runs.append(1))
        lm.base.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lm.again})
        for a, b in zip(plain, grads()):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert len(runs) == 4  # each text's encoder, and once more
        handle.remove()
    finally:
        lm.base.model.gradient_checkpointing_disable()
        lm.base.model.eval()
        lm.model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lower_precision(kind, no_grad):
    """A decoder in bfloat16 under new weights in float32: step 0 is the decoder still; under autocast numbers stay close."""
    ids, n = text(11)
    lm = Retro(HF(tiny.make(kind), tiny.tokenizer(), window=64, dtype="bf16"), RetroConfig(**(SHAPE | dict(layers=(1, 2)))))
    assert torch.equal(lm.forward(ids, neighbours=n).logits, lm.base.forward(ids).logits)
    loud(lm.adapter, 1)
    assert torch.isfinite(lm.forward(ids, neighbours=n).logits).all() and next(lm.adapter.parameters()).dtype == torch.float32
    torch.testing.assert_close(in_pieces(lm, ids, n, range(1, 11)), lm.forward(ids, neighbours=n).logits, atol=0.5, rtol=0.1)
    lm = retro("none")
    with torch.autocast("cpu", torch.bfloat16):
        rough = lm.forward(ids, neighbours=n).logits
    torch.testing.assert_close(rough, lm.forward(ids, neighbours=n).logits, atol=0.3, rtol=0.1)


# ---- and it learns --------------------------------------------------------------------------------------------------------


def test_it_learns_to_read_its_neighbours_and_believes_another_store():
    """Random text, which nothing predicts but the neighbour's continuation. Afterwards other neighbours make it say their words."""
    torch.manual_seed(0)
    net = Decoder(GPTConfig(vocab=V, width=32, layers=2, heads=2, mlp=64, window=64))
    lm = Retro(GPT(net, Words(), "gpt:tiny"), RetroConfig(m=M, layers=(2,), width=32, depth=1, heads=2, mlp=64, cross_heads=2,
                                                          cross_size=16, gate="zero"))
    optimizer, n = torch.optim.Adam(lm.trainable("all"), 0.01), 5 * M

    def neighbour(ids):
        """[N, F] for all chunks but the last: the chunk as a store would hold it, and what followed there."""
        found = [ids[:, u * M:(u + 2) * M] for u in range(n // M - 1)] + [torch.full((len(ids), 2 * M), -1)]
        return Neighbours.of(torch.stack(found, 1)[:, :, None])

    def loss(ids, neighbours):
        logits = lm.forward(ids, neighbours=neighbours).logits[:, M - 1:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, M:].flatten())

    for step in range(80):
        ids = torch.randint(0, V, (8, n))
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1, (step + 1) / 10)
        optimizer.zero_grad()
        loss(ids, neighbour(ids)).backward()
        optimizer.step()
    with torch.no_grad():
        ids, other = torch.randint(0, V, (8, n)), torch.randint(0, V, (8, n))
        on, off = float(loss(ids, neighbour(ids))), float(loss(ids, None))
        assert on < 0.2 and off > 3, (on, off)
        swapped = torch.cat([ids[:, :M], other[:, M:]], 1)  # a store in which the same first chunk goes on differently
        said = lm.forward(ids, neighbours=neighbour(swapped)).logits.argmax(-1)[:, M - 1:2 * M - 1]
        assert (said == other[:, M:2 * M]).float().mean() > 0.9
