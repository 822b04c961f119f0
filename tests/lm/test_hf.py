"""Real architectures, tiny and random, through HF: against transformers' own forward and generate."""

import importlib.util
import json
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from ralm.errors import CapabilityError, RalmError, UsageError  # noqa: E402
from ralm.lm import load  # noqa: E402
from ralm.lm.hf import HF, Past  # noqa: E402
from ralm.testing import check_lm  # noqa: E402
from ralm.types import LanguageModel  # noqa: E402

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

ALL = sorted(tiny.KINDS)
SLIDING = ("mistral", "gemma2", "gemma3_text")
STATEFUL = ("lfm2",)
CLOSE = dict(atol=5e-5, rtol=1e-4)
IDS = torch.randint(1, 290, (3, 20), generator=torch.Generator().manual_seed(1))
_made: dict[str, HF] = {}


def lm_of(kind: str) -> HF:
    if kind not in _made:
        _made[kind] = HF(tiny.make(kind), tiny.tokenizer(), window=64)
    return _made[kind]


def raw(lm: HF, ids: torch.Tensor) -> torch.Tensor:
    """The oracle: transformers alone, no cache, no mask, no padding."""
    return lm.model(input_ids=ids, use_cache=False).logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", ALL)
def test_full_equals_cached_in_unequal_steps(kind):
    lm, whole = lm_of(kind), raw(lm_of(kind), IDS)
    assert isinstance(lm, LanguageModel) and lm.gives == {"text", "logits", "hidden"}
    assert whole.std() > 1 and lm.forward(IDS).logits.dtype == torch.float32
    close(lm.forward(IDS).logits, whole)
    past, parts = None, []
    for a, b in ((0, 9), (9, 10), (10, 17), (17, 20)):
        out = lm.forward(IDS[:, a:b], past=past)
        past, parts = out.past, [*parts, out.logits]
        assert past.length == b
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", ALL)
def test_inputs_matter(kind):
    """Without this the other tests could pass on a model that ignores what it reads."""
    lm, other = lm_of(kind), IDS.clone()
    other[:, 15] = (other[:, 15] + 1) % 289 + 1
    gap = (lm.forward(other).logits - lm.forward(IDS).logits).abs().amax((0, 2))
    assert gap[:15].max() == 0 and gap[15:18].min() > 0.05


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, side):
    """Rows of 20, 13 and 5 tokens in one batch against each row alone; longer than the sliding windows (6)."""
    lm, lengths = lm_of(kind), [20, 13, 5]
    ids, mask = torch.full((3, 20), 7), torch.zeros(3, 20, dtype=torch.long)
    spans = [slice(20 - n, 20) if side == "left" else slice(0, n) for n in lengths]
    for b, (n, span) in enumerate(zip(lengths, spans)):
        ids[b, span], mask[b, span] = IDS[b, :n], 1
    out = lm.forward(ids, mask=mask)
    for b, (n, span) in enumerate(zip(lengths, spans)):
        alone = lm.forward(IDS[b:b + 1, :n])
        close(alone.logits, raw(lm, IDS[b:b + 1, :n]))
        close(out.logits[b, span], alone.logits[0])
        close(out.hidden[b, span], alone.hidden[0])


@pytest.mark.parametrize("kind", [k for k in ALL if k not in ("bloom", *STATEFUL)])
def test_right_padded_rows_continue_where_they_ended(kind):
    """[x x x . .] then y: y stands at position 3. Sliding windows compare places, so there it is refused."""
    lm, mask = lm_of(kind), torch.tensor([[1] * 10, [1] * 7 + [0] * 3])
    past = lm.forward(IDS[:2, :10], mask=mask).past
    if kind in SLIDING:
        with pytest.raises(CapabilityError, match="pad on the left"):
            lm.forward(IDS[:2, 10:14], past=past)
        return
    rest = lm.forward(IDS[:2, 10:14], past=past).logits  # the past remembers its mask
    same = lm.forward(IDS[:2, 10:14], past=past, mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)).logits
    close(rest, same)
    close(rest[:1], raw(lm, IDS[:1, :14])[:, 10:])
    close(rest[1:], raw(lm, torch.cat([IDS[1:2, :7], IDS[1:2, 10:14]], 1))[:, 7:])


def test_padding_without_positions_is_refused_where_it_would_move_tokens():
    mask = torch.tensor([[1] * 7 + [0] * 3 + [1] * 4])
    with pytest.raises(CapabilityError, match="pad on the left"):
        lm_of("bloom").forward(IDS[:1, :14], mask=mask)


@pytest.mark.parametrize("kind", ALL)
def test_crop_then_continue(kind):
    lm = lm_of(kind)
    past = lm.forward(IDS[:, :18]).past
    if kind in STATEFUL:
        with pytest.raises(CapabilityError, match="cannot be cropped"):
            past.crop(8)
        return
    assert past.crop(18) is past and past.crop(8).length == 8
    other = IDS.flip(1)[:, :7]
    close(lm.forward(other, past=past).logits, raw(lm, torch.cat([IDS[:, :8], other], 1))[:, 8:])
    close(lm.forward(IDS[:, :5], past=past.crop(0)).logits, raw(lm, IDS[:, :5]))
    with pytest.raises(UsageError, match="cannot crop"):
        past.crop(9)


@pytest.mark.parametrize("kind", ALL)
def test_a_past_is_not_changed_by_being_continued(kind):
    lm = lm_of(kind)
    past = lm.forward(IDS[:, :8]).past
    first = lm.forward(IDS[:, 8:], past=past).logits
    lm.forward(IDS.flip(1)[:, :5], past=past)
    assert past.length == 8
    assert torch.equal(lm.forward(IDS[:, 8:], past=past).logits, first)


@pytest.mark.parametrize("kind", ALL)
def test_reorder_rows(kind):
    lm, index = lm_of(kind), torch.tensor([2, 0, 0, 1])
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [0] + [1] * 7])
    past = lm.forward(IDS[:, :8], mask=mask).past.reorder(index)
    got = lm.forward(IDS[[2, 0, 0, 1], 8:12], past=past).logits
    for row, b in zip(got, index.tolist()):
        close(row, raw(lm, IDS[b:b + 1, 8 - int(mask[b].sum()):12])[0, -4:])


@pytest.mark.parametrize("kind", ALL)
def test_keep_and_hidden(kind):
    """hidden is what the head reads: head(hidden) is the logits, up to soft-capping; keep cuts both alike."""
    lm, out = lm_of(kind), lm_of(kind).forward(IDS)
    made, cap = lm._head(out.hidden), tiny.CAPPED.get(kind)
    close(torch.tanh(made / cap) * cap if cap else made, out.logits)
    close(out.hidden, lm.model(input_ids=IDS, output_hidden_states=True).hidden_states[-1])
    for keep, where in ((1, slice(-1, None)), (4, slice(-4, None)), (99, slice(None)),
                        (torch.tensor([0, 7, 19]), [0, 7, 19])):
        kept = lm.forward(IDS, keep=keep)
        close(kept.logits, out.logits[:, where])
        close(kept.hidden, out.hidden[:, where])


@pytest.mark.parametrize("kind", ALL)
def test_greedy_equals_generate(kind):
    """A left-padded batch decoded token by token through our cache, against transformers' generate."""
    lm = lm_of(kind)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 1 + [1] * 8])
    ids, real = IDS[:, :9].masked_fill(mask == 0, 7), mask
    theirs = lm.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12,
                               eos_token_id=None, pad_token_id=7)[:, 9:]
    out, ours = lm.forward(ids, mask=mask, keep=1), []
    for _ in range(12):
        ours.append(out.logits[:, -1].argmax(-1, keepdim=True))
        real = torch.cat([real, torch.ones(3, 1, dtype=torch.long)], 1)
        out = lm.forward(ours[-1], past=out.past, mask=real)
    assert torch.equal(torch.cat(ours, 1), theirs)
    assert len(set(theirs.flatten().tolist())) > 3  # no model stuck on one token


@pytest.mark.parametrize("kind", ALL)
def test_bf16_is_near_fp32(kind):
    lm = HF(tiny.make(kind), tiny.tokenizer(), dtype="bf16", window=64)
    assert lm.model.dtype == torch.bfloat16
    out, full = lm.forward(IDS), raw(lm_of(kind), IDS)
    assert out.logits.dtype == out.hidden.dtype == torch.float32
    assert 0 < (out.logits - full).abs().mean() < 0.03 * full.std()  # bfloat16 keeps 8 bits; measured 0.007 to 0.017
    half = lm.forward(IDS[:, 9:], past=lm.forward(IDS[:, :9]).past).logits
    assert (half - out.logits[:, 9:]).abs().mean() < 0.03 * full.std()


@pytest.mark.parametrize("kind", ALL)
def test_the_shipped_law(kind):
    check_lm(lm_of(kind), IDS[0, :12].tolist())


def test_scores_of_the_engine_are_those_of_transformers():
    from ralm.model import RALM

    lm = lm_of("llama")
    ids = lm.tokenizer.encode("The language model reads the passage.")
    scored = RALM(lm).score("The language model reads the passage.")
    logp = raw(lm, torch.tensor([[lm.bos, *ids]])).log_softmax(-1)[0, :-1].gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scored.logp).float(), logp, **CLOSE)


# ---- tokenizer, facts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " a", "a  , b n't .", "naïve 日本語 \U0001f600", "\x00\r\n\t ",
                                  "end<|end|>of prompt"])
def test_tokenizer_is_lossless_and_adds_nothing(text):
    t = lm_of("gpt2").tokenizer
    assert t.decode(t.encode(text)) == text
    assert 0 not in t.encode(text)  # text that spells a special token stays text


def test_facts_come_from_config_then_tokenizer():
    lm = HF(tiny.make("gpt2"), tiny.tokenizer())
    assert (lm.window, lm.vocab, lm.bos, lm.eos) == (64, 290, 0, 0) and lm.name == "hf:gpt2"
    bare = tiny.tokenizer().__class__(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    far = tiny.make("llama", bos_token_id=50256, eos_token_id=[50256, 3])  # a default of another vocabulary
    with pytest.raises(UsageError, match="pass bos=ID"):
        HF(far, bare)
    assert HF(far, bare, bos=5).bos == 5
    named = HF(tiny.make("llama", bos_token_id=5, eos_token_id=[7, 3]), bare)
    assert (named.bos, named.eos) == (5, 7) and HF(tiny.make("llama", bos_token_id=None, eos_token_id=7), bare).bos == 7
    with pytest.raises(UsageError, match="pass window=N"):
        HF(tiny.make("bloom"), bare, bos=0)
    with pytest.raises(UsageError, match="window=65"):
        HF(tiny.make("gpt2"), tiny.tokenizer(), window=65)
    assert HF(tiny.make("qwen2", vocab_size=320), tiny.tokenizer()).vocab == 320  # rows beyond the tokenizer's


def test_loading_says_nothing_and_leaves_the_users_bars(tmp_path, capfd):
    from transformers.utils import logging

    tiny.make("gpt2").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    logging.enable_progress_bar()
    capfd.readouterr()
    load(f"hf:{tmp_path}")
    assert capfd.readouterr().err == "" and logging.is_progress_bar_enabled()


def test_a_model_that_was_being_trained_scores_the_same_twice():
    """Dropout would make every score a different one."""
    training = tiny.make("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    lm = HF(training, tiny.tokenizer())
    assert torch.equal(lm.forward(IDS).logits, lm.forward(IDS).logits)
    close(lm.forward(IDS).logits, lm_of("gpt2").forward(IDS).logits)


def test_the_window_is_used_to_its_last_token_and_not_beyond():
    lm, row = lm_of("llama"), torch.ones(1, 65, dtype=torch.long)
    past = lm.forward(row[:, :63]).past
    assert lm.forward(row[:, :64]).logits.shape == (1, 64, 290) and lm.forward(row[:, :1], past=past).past.length == 64
    for call in (lambda: lm.forward(row), lambda: lm.forward(row[:, :2], past=past)):
        with pytest.raises(UsageError, match="65 tokens do not fit"):
            call()


def test_wrong_calls_are_one_clear_line():
    lm = lm_of("llama")
    past = lm.forward(IDS[:1, :8]).past
    assert isinstance(past, Past)
    for call, words in (
            (lambda: lm.forward(torch.tensor([[290]])), "id 290"),
            (lambda: lm.forward(torch.tensor([[-1]])), "id -1"),
            (lambda: lm.forward(torch.zeros(1, 0, dtype=torch.long)), "shape"),
            (lambda: lm.forward(IDS, keep=0), "keep=0"),
            (lambda: lm.forward(IDS, keep=torch.ones(1, 1)), "keep has shape"),
            (lambda: lm.forward(IDS.repeat(1, 4)), "80 tokens do not fit"),
            (lambda: lm.forward(IDS[:1, :1], past=past, mask=torch.zeros(1, 1)), "covers the past"),
            (lambda: lm.forward(IDS, mask=torch.zeros(3, 20)), "without any real token"),
            (lambda: lm.forward(IDS, neighbours=1), "neighbours"), (lambda: HF(lm.model), "tokenizer"),
            (lambda: HF(lm.model, tiny.tokenizer(), dtype="fp8"), "dtype"),
            (lambda: HF(lm.model, tiny.tokenizer(), device="nowhere"), "device 'nowhere'")):
        with pytest.raises(RalmError, match=words) as e:
            call()
        assert "\n" not in str(e.value)


# ---- folders and names ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.make("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def test_a_saved_folder_loads_by_spec(folder):
    lm = load(f"hf:{folder}")
    assert lm.name == f"hf:{folder}" and lm.model.dtype == torch.float32 and lm.window == 64
    close(lm.forward(IDS).logits, raw(lm_of("llama"), IDS))
    assert lm.tokenizer.decode(lm.tokenizer.encode("naïve  <|end|> x")) == "naïve  <|end|> x"
    half = load(f"hf:{folder},dtype=bf16,window=32")
    assert half.model.dtype == torch.bfloat16 and half.window == 32


def test_specs_that_do_not_load(folder):
    for spec, words in (("hug:gpt2", "unknown language model"), ("bundled:bse", "Did you mean 'base'"),
                        ("bundled", "unknown bundled model"), ("remote:http://127.0.0.1:9", "remote:http"),
                        (f"hf:{folder},dtyp=bf16", "Did you mean 'dtype'"), ("hf", "hf:NAME"),
                        ("hf:./nowhere", "not a folder"), ("hf:a/b/c", "not a folder"),
                        (f"hf:{folder.parent}", "config.json")):
        with pytest.raises(UsageError, match=words) as e:
            load(spec)
        assert "\n" not in str(e.value)


def test_pickled_weights_are_refused(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UsageError, match="holds no weights"):
        HF(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UsageError, match=r"pickle.*save_pretrained"):
        HF(tmp_path)


def test_damaged_and_foreign_folders(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    for change, error, words in (
            (dict(num_hidden_layers=3), UsageError, "lack"),
            (dict(hidden_size=64), UsageError, "another shape|cannot be read"),
            (dict(model_type="no-such-thing"), UsageError, "config of"),
            (dict(model_type="mystery", auto_map={"AutoConfig": "evil.Config"}), CapabilityError, "never runs"),
            (dict(model_type="bert"), CapabilityError, "masked"),
            (dict(model_type="t5"), CapabilityError, "encoder-decoder"),
            (dict(model_type="vit"), CapabilityError, "no language model"),
            (dict(model_type="gemma3_text", use_bidirectional_attention=True), CapabilityError, "masked")):
        (copy / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(error, match=words) as e:
            HF(copy)
        assert "\n" not in str(e.value)
    (copy / "config.json").write_text(json.dumps(config))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="weights of"):
        HF(copy)


def test_a_hub_name_without_a_network_fails_at_once(monkeypatch):
    """No retries, no half minute: the cache, then one question (here to a port where nobody listens)."""
    import huggingface_hub.hf_api as hub

    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(UsageError, match="not in the local cache and the hub cannot be reached") as e:
        load("hf:no-such-owner/no-such-model")
    assert time.perf_counter() - began < 3 and "\n" not in str(e.value)
