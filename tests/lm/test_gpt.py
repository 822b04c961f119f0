"""The bundled decoder: against transformers' Qwen3 with the same weights, against itself in pieces, and as trained."""

import functools
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from ralm.errors import CapabilityError, RalmError, StoreError, UsageError  # noqa: E402
from ralm.lm.bundled import bundled  # noqa: E402
from ralm.lm.gpt import BPE, END, GPT, Decoder, GPTConfig, load, save  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.testing import check_lm  # noqa: E402
from ralm.train.tokenizer import train_bpe  # noqa: E402
from ralm.types import LanguageModel  # noqa: E402

TEXT = ("Retrieval reads what others wrote. The language model reads the passage, then the question, then it answers. "
        "A passage stands before the text; the text never moves. In 1999 there were 42 of them, and 7 were naïve.\n\n") * 4
CONFIG = GPTConfig(vocab=300, width=32, layers=3, heads=2, mlp=48, window=64)
IDS = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(1))
CLOSE = dict(atol=5e-5, rtol=1e-4)


@functools.cache
def bpe() -> BPE:
    return train_bpe([TEXT], 300)


@functools.cache
def lm() -> GPT:
    """Random weights under which every input matters: nothing at zero, norms near one."""
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.05)
    return GPT(model.requires_grad_(False), bpe(), "gpt:tiny")


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, **CLOSE)


# ---- the arithmetic -----------------------------------------------------------------------------------------------------


@functools.cache
def oracle():
    """Qwen3ForCausalLM of transformers with our weights."""
    transformers = pytest.importorskip("transformers")
    c = CONFIG
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=c.vocab, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.heads, head_dim=c.width // c.heads, intermediate_size=c.mlp, max_position_embeddings=c.window,
        rope_theta=c.theta, rms_norm_eps=c.eps, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)).eval()
    names = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm", "norm1": "input_layernorm",
             "norm2": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    names |= {f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    state = {}
    for name, value in lm().model.state_dict().items():
        if name.startswith("blocks."):
            _, n, rest = name.split(".", 2)
            state[f"model.layers.{n}.{names[rest.removesuffix('.weight')]}.weight"] = value
        else:
            state[{"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}[name]] = value
    missing, odd = theirs.load_state_dict(state, strict=False)
    assert set(missing) == {"lm_head.weight"} and not odd
    theirs.tie_weights()
    return theirs


def test_logits_and_hidden_are_those_of_transformers():
    with torch.no_grad():
        theirs = oracle()(input_ids=IDS, output_hidden_states=True)
    ours = lm().forward(IDS)
    assert theirs.logits.std() > 1
    close(ours.logits, theirs.logits)
    close(ours.hidden, theirs.hidden_states[-1])


def test_padding_and_cache_are_those_of_transformers():
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :6] = mask[1, :1] = 0
    with torch.no_grad():
        theirs = oracle()(input_ids=IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    past, parts = None, []
    for a, b in ((0, 9), (9, 10), (10, 20)):
        out = lm().forward(IDS[:, a:b], past=past, mask=mask[:, :b])
        past, parts = out.past, [*parts, out.logits]
    for ours in (lm().forward(IDS, mask=mask).logits, torch.cat(parts, 1)):
        assert torch.isfinite(ours).all()
        close(ours[mask.bool()], theirs[mask.bool()])


# ---- the contract -------------------------------------------------------------------------------------------------------


def test_keeps_the_contract():
    assert isinstance(lm(), LanguageModel) and lm().gives == {"text", "logits", "hidden"}
    assert lm().bos == lm().eos == 0 and lm().window == 64 and lm().vocab == 300
    check_lm(lm(), IDS[0].tolist(), tolerance=1e-4)


def test_inputs_matter_and_only_later():
    other = IDS.clone()
    other[:, 15] = (other[:, 15] + 1) % 299 + 1
    gap = (lm().forward(other).logits - lm().forward(IDS).logits).abs().amax((0, 2))
    assert gap[:15].max() == 0 and gap[15:18].min() > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    lengths = [20, 13, 5]
    ids, mask = torch.full((3, 20), 7), torch.zeros(3, 20, dtype=torch.long)
    spans = [slice(20 - n, 20) if side == "left" else slice(0, n) for n in lengths]
    for b, (n, span) in enumerate(zip(lengths, spans)):
        ids[b, span], mask[b, span] = IDS[b, :n], 1
    out = lm().forward(ids, mask=mask)
    for b, (n, span) in enumerate(zip(lengths, spans)):
        alone = lm().forward(IDS[b:b + 1, :n])
        close(out.logits[b, span], alone.logits[0])
        close(out.hidden[b, span], alone.hidden[0])


def test_right_padded_rows_continue_where_they_ended():
    mask = torch.tensor([[1] * 10, [1] * 7 + [0] * 3])
    past = lm().forward(IDS[:2, :10], mask=mask).past
    rest = lm().forward(IDS[:2, 10:14], past=past).logits  # the past remembers its mask
    close(rest, lm().forward(IDS[:2, 10:14], past=past, mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)).logits)
    close(rest[:1], lm().forward(IDS[:1, :14]).logits[:, 10:])
    close(rest[1:], lm().forward(torch.cat([IDS[1:2, :7], IDS[1:2, 10:14]], 1)).logits[:, 7:])


def test_crop_reorder_and_a_past_that_is_not_changed():
    past = lm().forward(IDS[:, :18]).past
    first = lm().forward(IDS[:, 18:], past=past).logits
    lm().forward(IDS.flip(1)[:, :5], past=past)
    assert past.length == 18 and torch.equal(lm().forward(IDS[:, 18:], past=past).logits, first)
    index = torch.tensor([2, 0, 0, 1])
    moved = lm().forward(IDS[:, :18]).past.reorder(index)
    close(lm().forward(IDS[index, 18:], past=moved).logits, first[index])
    assert past.crop(18) is past and past.crop(8).length == 8
    other = IDS.flip(1)[:, :7]
    close(lm().forward(other, past=past).logits, lm().forward(torch.cat([IDS[:, :8], other], 1)).logits[:, 8:])
    close(lm().forward(IDS[:, :5], past=past.crop(0)).logits, lm().forward(IDS[:, :5]).logits)
    with pytest.raises(UsageError, match="cannot crop"):
        past.crop(9)


def test_reorder_and_crop_take_the_mask_along():
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10])
    past = lm().forward(IDS[:2, :10], mask=mask).past.reorder(torch.tensor([1, 0])).crop(9)
    assert past.mask.tolist() == [[True] * 9, [False] * 4 + [True] * 5]
    close(lm().forward(IDS[:2, 10:12], past=past).logits[1:],
          lm().forward(torch.cat([IDS[:1, 4:9], IDS[1:2, 10:12]], 1)).logits[:, 5:])


def test_keep():
    whole = lm().forward(IDS)
    for keep, index in ((2, [18, 19]), (torch.tensor([0, 7]), [0, 7]), (50, list(range(20)))):
        out = lm().forward(IDS, keep=keep)
        close(out.logits, whole.logits[:, index])
        close(out.hidden, whole.hidden[:, index])
        assert out.past.length == 20


@pytest.mark.parametrize(("call", "error", "says"), [
    (lambda m: m.forward(IDS[0]), UsageError, "shape"),
    (lambda m: m.forward(IDS[:, :0]), UsageError, "shape"),
    (lambda m: m.forward(IDS + 200), UsageError, "token id"),
    (lambda m: m.forward(IDS, mask=torch.ones(3, 19)), UsageError, "mask has shape"),
    (lambda m: m.forward(IDS, mask=torch.zeros(3, 20)), UsageError, "without any real token"),
    (lambda m: m.forward(IDS, keep=0), UsageError, "keep=0"),
    (lambda m: m.forward(IDS, keep=torch.zeros(0)), RalmError, "keep has shape"),
    (lambda m: m.forward(IDS, neighbours=1), CapabilityError, "neighbours"),
    (lambda m: m.forward(torch.ones(1, 65, dtype=torch.long)), UsageError, "65 tokens do not fit"),
    (lambda m: GPTConfig(width=30, heads=4), UsageError, "heads"),
])
def test_mistakes_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call(lm())


def test_padding_does_not_use_up_the_window():
    ids, mask = torch.ones(1, 80, dtype=torch.long), torch.tensor([[0] * 30 + [1] * 50])
    close(lm().forward(ids, mask=mask).logits[:, 30:], lm().forward(ids[:, 30:]).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_a_gpu_serves_ids_of_the_cpu():
    """As the engine asks: ids, masks and pasts come and go, the model stays where it is."""
    from copy import deepcopy

    far = GPT(deepcopy(lm().model).cuda(), bpe(), "far")
    mask = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [1] * 10])
    for m in (None, mask):
        here, there = lm().forward(IDS[:, :10], mask=m), far.forward(IDS[:, :10], mask=m)
        torch.testing.assert_close(there.logits, here.logits, atol=1e-3, rtol=1e-3)
        more = far.forward(IDS[:, 10:], past=there.past, keep=torch.tensor([0, 3]))
        torch.testing.assert_close(more.logits, lm().forward(IDS[:, 10:], past=here.past).logits[:, [0, 3]], atol=1e-3, rtol=1e-3)


# ---- text and files -----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_decode_gives_back_what_encode_got(text):
    assert bpe().decode(bpe().encode(text)) == text


def test_text_that_spells_the_end_is_text():
    for text in (END, f"a{END}b", f" {END}\n", "e\u0301 \r\n\t  \x00 ﬁ"):
        ids = bpe().encode(text)
        assert 0 not in ids and bpe().decode(ids) == text
    assert bpe().decode([0]) == END and bpe().encode("") == []
    with pytest.raises(UsageError, match="surrogate"):
        bpe().encode("a\ud800")


def test_save_and_load(tmp_path):
    save(tmp_path / "m", lm().model, bpe(), CONFIG)
    back = load(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert back.config == CONFIG and back.tokenizer.encode(TEXT) == bpe().encode(TEXT)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in back.model.parameters())
    torch.testing.assert_close(back.forward(IDS).logits, lm().forward(IDS).logits, atol=0.05, rtol=0.01)  # float16 on disk


def test_loading_what_is_no_model_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"no config\.json"):
        load(tmp_path)
    save(tmp_path, lm().model, bpe(), CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIG) | {"mlp": 40}))
    with pytest.raises(StoreError, match="disagree"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(StoreError, match="model_type"):
        load(tmp_path)
    with pytest.raises(UsageError, match="tokenizer"):
        GPT(Decoder(GPTConfig(vocab=290, width=8, layers=1, heads=1, mlp=8)), bpe())


# ---- as shipped -----------------------------------------------------------------------------------------------------------

ENGLISH = ("The lighthouse stood on a narrow point of rock at the mouth of the river. For more than a hundred years its keepers "
           "had written down the weather every morning, and when the last of them left in 1974 the books were given to the "
           "town museum. Historians have since used them to show how the winters on this part of the coast became milder "
           "during the twentieth century.")


@functools.cache
def base() -> GPT:
    try:
        lm = load("base")
    except StoreError as e:
        pytest.skip(str(e))
    if not lm.config.trained["finished"]:
        pytest.skip(f"checkpoint 'base' is a snapshot of a training that still runs ({lm.config.trained['minutes']} minutes)")
    return lm


def test_shipped_model_keeps_the_contract_and_fits():
    check_lm(base(), base().tokenizer.encode(ENGLISH))
    folder = bundled("base")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 40e6
    assert 5e6 <= base().parameters <= 10e6 and base().name == "bundled:base" and base().window >= 512
    assert f"{base().parameters / 1e6:.2f} M" in (folder / "README.md").read_text()


def test_shipped_model_reads_english():
    """A passage written for this test: far better than the 8 bits of bytes and the 4.4 of single letters, and order matters."""
    words = ENGLISH.split()
    shuffled = " ".join(words[i] for i in torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist())
    real, mixed = RALM(base()).score(ENGLISH), RALM(base()).score(shuffled)
    assert real.bits_per_byte() < 2.2, real.bits_per_byte()
    assert mixed.bits_per_byte() > real.bits_per_byte() + 0.3, (mixed.bits_per_byte(), real.bits_per_byte())


def test_shipped_model_uses_a_passage_in_front():
    """The reason it is trained on passages: names that stand in the evidence become cheap."""
    fact = "The Harrow Point lighthouse was designed by Edvard Mellin and completed in 1862."
    prompt, answer = "Harrow Point\n", "The Harrow Point lighthouse was designed by Edvard Mellin"
    with_it = RALM(base()).score(answer, prompt=f"Harrow Point\n{fact}\n").nats
    assert with_it < RALM(base()).score(answer, prompt=prompt).nats - 5


def test_shipped_model_on_wikitext():
    path = Path(os.environ.get("RALM_DATA", "../shared/data")) / "lm" / "wikitext.valid.raw.txt.zst"
    if not path.is_file():
        pytest.skip(f"no {path}")
    from ralm.train.gpt_eval import bits_per_byte

    scored = bits_per_byte(base(), path, sample=20000)
    assert (scored["window"], scored["stride"]) == (512, 256) and scored["bytes"] > 20000
    assert scored["bits_per_byte"] < 2.2, scored
