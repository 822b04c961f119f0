"""RETRO on disk: what is read back is what was written, around the decoder it was made with and no other."""

import importlib.util
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from ralm.errors import FingerprintError, RalmError, StoreError, UsageError  # noqa: E402
from ralm.lm import keys, load, retro_files  # noqa: E402
from ralm.lm.gpt import GPT, Decoder, GPTConfig  # noqa: E402
from ralm.lm.hf import HF  # noqa: E402
from ralm.lm.retro import Neighbours, Retro, RetroConfig  # noqa: E402
from ralm.lm.retro_files import Base, save  # noqa: E402
from ralm.train.tokenizer import train_bpe  # noqa: E402

_spec = importlib.util.spec_from_file_location("tiny_retro", Path(__file__).parent / "tiny_retro.py")
small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(small)
tiny, loud, text, SHAPE = small.tiny, small.loud, small.text, small.SHAPE


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def halved(module):
    """The same weights as half precision holds them."""
    for p in module.parameters():
        p.copy_(p.half())


def same(a, b):
    ids, n = text(14)
    assert torch.equal(a.forward(ids, neighbours=n).logits, b.forward(ids, neighbours=n).logits)
    assert torch.equal(a.forward(ids).logits, b.forward(ids).logits)
    assert (a.forward(ids, neighbours=n).logits - a.forward(ids).logits).abs().max() > 1e-3
    assert a.config == b.config and a.layers == b.layers and a.tokenizer.encode("as it was") == b.tokenizer.encode("as it was")


def fitted(spec, kind="llama"):
    lm = Retro(load(spec), RetroConfig(gate="tanh", **(SHAPE | dict(layers=(1, 2)))))
    loud(lm.adapter, 1)
    return lm


@pytest.fixture(params=["llama", "gpt2"])
def hf(request, tmp_path):
    """The spec of a model of transformers on disk; GPT-2 ties its output layer to its embedding."""
    folder = tmp_path / "decoder"
    tiny.make(request.param, tie_word_embeddings=request.param == "gpt2").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return f"hf:{folder}"


def scratch():
    bpe = train_bpe([tiny.TEXT], 290)
    net = loud(Decoder(GPTConfig(vocab=290, width=16, layers=4, heads=2, mlp=24, window=64)))
    lm = Retro(GPT(net, bpe, "gpt:new"), RetroConfig(gate="none", embed="own", bias=True, **SHAPE))
    loud(lm.adapter, 1)
    return lm


def test_new_weights_alone_bit_for_bit(hf, tmp_path):
    lm = fitted(hf)
    save(lm, tmp_path / "a", Base.of(lm, hf), {"steps": 3})
    assert not (tmp_path / "a" / "base.safetensors").exists()
    halved(lm.adapter)
    again = load(f"retro:{tmp_path / 'a'}")
    same(lm, again)
    assert again.name == f"retro:{tmp_path / 'a'}" and not any(p.requires_grad for p in again.model.parameters())
    assert retro_files.described(tmp_path / "a")["trained"] == {"steps": 3}
    assert keys.fingerprint(again) == keys.fingerprint(load(hf))  # a token store of the decoder fits


def test_a_trained_decoder_goes_with_them(hf, tmp_path):
    lm = fitted(hf)
    base = Base.of(lm, trained=True)
    assert base.spec == hf
    loud(lm.base.model, 2)
    save(lm, tmp_path / "a", base)
    halved(lm.model)
    again = load(f"retro:{tmp_path / 'a'}")
    same(lm, again)
    assert keys.fingerprint(again) != base.fingerprint
    given = load(hf)
    keys.fingerprint(given)
    same(lm, retro_files.load(tmp_path / "a", base=given))
    assert keys.fingerprint(given) == keys.fingerprint(again)


def test_written_again_without_the_decoder_its_old_weights_are_gone(hf, tmp_path):
    lm = fitted(hf)
    save(lm, tmp_path / "a", Base.of(lm, trained=True))
    save(lm, tmp_path / "a", Base.of(lm))
    assert not (tmp_path / "a" / "base.safetensors").exists()
    load(f"retro:{tmp_path / 'a'}")


def test_from_scratch(tmp_path):
    lm = scratch()
    save(lm, tmp_path / "a", Base.of(lm, ""))
    halved(lm.model)
    (tmp_path / "a").rename(tmp_path / "b")  # nothing in it says where it is
    same(lm, load(f"retro:{tmp_path / 'b'}"))


def test_another_decoder_is_refused(hf, tmp_path):
    lm = fitted(hf)
    save(lm, tmp_path / "a", Base.of(lm))
    other = HF(tiny.make(load(hf).config.model_type, seed=1), tiny.tokenizer(), window=64)
    with pytest.raises(FingerprintError, match=r"was made around .* give the decoder it was trained with"):
        retro_files.load(tmp_path / "a", base=other)
    with pytest.raises(FingerprintError, match="in the same precision"):
        retro_files.load(tmp_path / "a", base=HF(hf.removeprefix("hf:"), dtype="bf16"))
    net = tiny.make(load(hf).config.model_type, seed=2)
    net.save_pretrained(hf.removeprefix("hf:"))  # retrained under the same name
    with pytest.raises(FingerprintError):
        load(f"retro:{tmp_path / 'a'}")


def test_a_saved_decoder_that_was_trained_and_not_written_is_refused(hf, tmp_path):
    lm = fitted(hf)
    loud(lm.base.model, 2)
    save(lm, tmp_path / "a", Base.of(lm))
    with pytest.raises(FingerprintError):
        load(f"retro:{tmp_path / 'a'}")


def damaged(folder, name, change):
    path = folder / name
    if name.endswith(".json"):
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name, change, says", [
    ("config.json", lambda v: v.pop("base"), "describes no RETRO"),
    ("config.json", lambda v: v["retro"].update(speed=1), "retro.speed, which this release does not know"),
    ("config.json", lambda v: v["retro"].update(width=16), "weights and config of .* disagree"),
    ("config.json", lambda v: v["retro"].update(layers=[1]), "weights and config of .* disagree"),
    ("adapter.safetensors", lambda b: b[:-100], "adapter.safetensors cannot be read"),
])
def test_damage_is_told(tmp_path, name, change, says):
    lm = scratch()
    save(lm, tmp_path, Base.of(lm, ""))
    damaged(tmp_path, name, change)
    with pytest.raises(StoreError, match=says):
        load(f"retro:{tmp_path}")


def test_mistakes_are_told(tmp_path):
    lm = scratch()
    with pytest.raises(UsageError, match="no spec that loads a decoder"):
        Base.of(lm, "gpt2")
    with pytest.raises(StoreError, match=r"has no config.json, so no RETRO is there"):
        load(f"retro:{tmp_path}")
    with pytest.raises(UsageError, match="write retro:FOLDER"):
        load("retro")
    with pytest.raises(UsageError, match="save_pretrained"):
        save(small.hf("llama"), tmp_path, Base(""))
    next(lm.adapter.parameters()).fill_(1e6)
    with pytest.raises(RalmError, match="float16 cannot write"):
        save(lm, tmp_path, Base.of(lm, ""))


def test_the_bundled_one_is_there():
    """Around bundled:base, with its tokenizer, within twenty megabytes; neighbours change what it says."""
    from ralm.lm.bundled import bundled

    lm = load("bundled:retro")
    text = "The keeper of the lighthouse wrote down the weather. " * 12
    ids = torch.tensor([[lm.bos, *lm.tokenizer.encode(text)]])[:, :lm.m + 20]
    n = Neighbours(ids[:, :lm.m].view(1, 1, 1, lm.m))
    on, off = lm.forward(ids, neighbours=n).logits, lm.forward(ids).logits
    assert lm.name == "bundled:retro" and torch.equal(on[:, :lm.m - 1], off[:, :lm.m - 1])
    assert (on[:, lm.m:] - off[:, lm.m:]).abs().max() > 0.5
    assert sum(f.stat().st_size for f in bundled("retro").iterdir()) < 20e6
