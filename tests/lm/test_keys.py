"""The state that token stores keep: the same by `forward` and by `keys`, in every architecture, padded or not."""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from ralm.errors import CapabilityError, UsageError  # noqa: E402
from ralm.lm.hf import HF  # noqa: E402
from ralm.lm.keys import FEED_FORWARD, fingerprint  # noqa: E402

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

KNOWN = sorted(k for k in tiny.KINDS if k.partition("-")[0] in FEED_FORWARD)


@pytest.fixture(scope="module")
def models():
    found = {}

    def get(kind):
        if kind not in found:
            found[kind] = HF(tiny.make(kind), tiny.tokenizer())
        return found[kind]
    return get


@pytest.mark.parametrize("key", ["ffn_in", "hidden"])
@pytest.mark.parametrize("kind", KNOWN)
def test_keys_are_the_states_of_forward(models, kind, key):
    lm = models(kind)
    ids = torch.randint(1, 290, (2, 20), generator=torch.Generator().manual_seed(0))
    out = lm.forward(ids, key=key)
    alone = lm.keys(ids, key)
    assert alone.shape == (2, 20, lm.key_width(key))
    assert torch.allclose(out.key, alone, atol=1e-5)
    assert torch.allclose(lm.forward(ids, key=key, keep=3).key, out.key[:, -3:], atol=1e-5)
    assert torch.allclose(lm.keys(torch.cat([ids, ids * 0 + 1], 1)[:, :27], key)[:, :20], alone, atol=1e-4)  # padded on the right
    assert lm.forward(ids).key is None


@pytest.mark.parametrize("kind", KNOWN)
def test_ffn_in_is_what_the_last_block_feeds_forward(models, kind):
    """Against the module itself: running it by hand on the key, and comparing with what it gave inside the model."""
    lm = models(kind)
    ids = torch.randint(1, 290, (1, 9), generator=torch.Generator().manual_seed(1))
    path, name = FEED_FORWARD[lm.config.model_type]
    block = lm.model
    for part in path.split("."):
        block = getattr(block, part)
    seen = []
    handle = getattr(block[-1], name).register_forward_hook(lambda module, args, out: seen.append(out))
    key = lm.forward(ids, key="ffn_in").key
    handle.remove()
    assert torch.allclose(getattr(block[-1], name)(key).reshape(-1), seen[0].reshape(-1), atol=1e-4)


def test_a_model_of_ours_agrees_with_its_oracle():
    from ralm.lm.gpt import load

    lm = load("base")
    ids = torch.tensor([lm.tokenizer.encode("The lighthouse stands on granite, and nobody knows why.")])
    for key in ("ffn_in", "hidden"):
        out = lm.forward(ids, key=key)
        assert torch.allclose(out.key, lm.keys(ids, key), atol=1e-5)
        first = lm.forward(ids[:, :5])
        assert torch.allclose(lm.forward(ids[:, 5:], past=first.past, key=key).key, out.key[:, 5:], atol=1e-4)
    block = lm.model.blocks[-1]
    ffn = lm.keys(ids, "ffn_in")
    x, _, _ = block.look(_before(lm, ids), (lm.model.cos[:ids.shape[1]], lm.model.sin[:ids.shape[1]]), None, None, True)
    assert torch.allclose(block.norm2(x), ffn, atol=1e-5)
    assert torch.allclose(lm.model.norm(x + block.think(ffn)), lm.forward(ids).hidden, atol=1e-4)


def _before(lm, ids):
    x, rotary = lm.model.embed(ids), (lm.model.cos[:ids.shape[1]], lm.model.sin[:ids.shape[1]])
    for block in lm.model.blocks[:-1]:
        x, h, _ = block.look(x, rotary, None, None, True)
        x = x + block.think(h)
    return x


def test_an_unknown_architecture_is_told_of_hidden():
    lm = HF(tiny.make("bloom"), tiny.tokenizer(), window=64)
    with pytest.raises(CapabilityError, match="key=hidden"):
        lm.keys(torch.ones(1, 3, dtype=torch.long), "ffn_in")
    with pytest.raises(CapabilityError, match="key=hidden"):
        lm.forward(torch.ones(1, 3, dtype=torch.long), key="ffn_in")
    assert lm.keys(torch.ones(1, 3, dtype=torch.long), "hidden").shape == (1, 3, 32)
    with pytest.raises(UsageError, match="ffn_in"):
        lm.keys(torch.ones(1, 3, dtype=torch.long), "last")


def test_fingerprints_tell_weights_and_types_apart():
    one, same = HF(tiny.make("gpt2"), tiny.tokenizer()), HF(tiny.make("gpt2"), tiny.tokenizer())
    other, narrow = HF(tiny.make("gpt2", seed=1), tiny.tokenizer()), HF(tiny.make("gpt2"), tiny.tokenizer(), dtype="bf16")
    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(x) for x in (one, other, narrow)}) == 3
