"""Training the bundled LM: the pieces against plain torch, and a tiny run that learns, is killed and goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
zstandard = pytest.importorskip("zstandard")

from ralm.errors import UsageError  # noqa: E402
from ralm.lm.gpt import Decoder, GPTConfig, load  # noqa: E402
from ralm.model import RALM  # noqa: E402
from ralm.train import gpt, gpt_card, gpt_eval  # noqa: E402
from ralm.train.gpt import Run, rate  # noqa: E402
from ralm.train.gpt_data import Rows, Stream, documents, spaced  # noqa: E402
from ralm.train.kernels import causal_attention, head_loss  # noqa: E402
from ralm.train.muon import Muon, orthogonal  # noqa: E402
from ralm.train.tokenizer import train_bpe  # noqa: E402

TEXT = "The lighthouse stood on a narrow point of rock at the mouth of the river, and its keeper wrote down the weather.\n"


def written(path: Path, records: list[dict]) -> Path:
    path.write_bytes(zstandard.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    return path


# ---- pieces -------------------------------------------------------------------------------------------------------------


def test_head_loss_is_cross_entropy():
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 12, requires_grad=True), torch.randn(40, 12, requires_grad=True)
    targets = torch.randint(0, 40, (700,))
    (3 * head_loss(hidden, weight, targets)).backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    (3 * plain).backward()
    torch.testing.assert_close(head_loss(hidden, weight, targets), plain)
    torch.testing.assert_close(ours[0], hidden.grad)
    torch.testing.assert_close(ours[1], weight.grad)


@pytest.mark.parametrize("length", [5, 128, 300])
def test_causal_attention_is_that_of_torch(length):
    qkv = [torch.randn(2, 3, length, 8, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(3)]
    ours, theirs = causal_attention(*qkv), torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), qkv) for y in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError):
        causal_attention(*qkv, attn_mask=torch.ones(length, length))


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 40, 16), (3, 16, 40)])
def test_orthogonal_keeps_directions_and_levels_their_size(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    ours = orthogonal(g)
    inner = u.mT @ ours @ vt.mT  # near diagonal, values near one, but those of the smallest singular values
    size = inner.diagonal(dim1=-2, dim2=-1)
    big = s > 0.1 * s[:, :1]
    assert size[big].min() > 0.5 and size.max() < 1.4
    assert (inner - torch.diag_embed(size)).abs().max() < 0.15


def test_muon_moves_every_direction_equally_and_decays():
    p = torch.nn.Parameter(torch.full((8, 8), 2.0))
    grad = torch.diag(torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 10]))
    p.grad = grad
    Muon([p], lr=0.1, weight_decay=0.5).step()
    moved = p.detach() - 2 * (1 - 0.05)
    assert moved.diagonal().min() > -0.13 and moved.diagonal().max() < -0.03
    assert (moved - torch.diag(moved.diagonal())).abs().max() < 0.01


def test_rate_goes_up_stays_and_ends_at_zero():
    assert [round(rate(x, 0.1, 0.5), 3) for x in (0, 0.05, 0.1, 0.5, 0.75, 1, 1.2)] == [0, 0.5, 1, 1, 0.5, 0, 0]


# ---- data ---------------------------------------------------------------------------------------------------------------


def test_documents_are_tidied(tmp_path):
    path = written(tmp_path / "a.zst", [{"file": "A_B.txt", "text": "Title: A_B\nOne.\r\n\r\n\r\n\r\nTwo. \n"},
                                        {"path": "x/The Book.md", "text": "# Title: The Book\n\nText"}])
    assert list(documents(path)) == [("A B", "A B\nOne.\n\nTwo."), ("The Book", "# Title: The Book\n\nText")]


def test_spaced_writes_as_wikitext_does():
    text = 'Tin\nHistory\nIt cost 1,250.5 pounds, well-known by A. B. Low (the maker\'s son) in "1862".'
    assert spaced("Tin", text) == (' \n = Tin = \n \n = = History = = \n \n It cost 1 @,@ 250 @.@ 5 pounds , well @-@ known by '
                                   'A. B. Low ( the maker \'s son ) in " 1862 " . \n')


def rows(evidence: float, length: int = 64, most: int = 24, copies: float = 0) -> Rows:
    bpe = train_bpe([TEXT], 290)
    texts = [(f"Tale {i}", " ".join(f"t{i}x{n}" for n in range(400))) for i in range(4)]
    stream = Stream.make("tales", texts, bpe, 0)
    assert stream.ids[stream.starts[1:] - 1].tolist() == [0] * 4 and (stream.ids == 0).sum() == 4
    r = Rows([stream, stream], [3, 1], length, 0, bpe.encode("\n"), 290, evidence, most, seed=1, copies=copies)
    r.bpe = bpe
    return r


def test_rows_are_the_text_without_repetition_within_an_epoch():
    r = rows(0)
    stream, pieces = r.streams[0], (len(r.streams[0].ids) - 64) // 64
    rng = np.random.default_rng(0)
    seen = [r.row(stream, 0, n, rng) for n in range(pieces)]
    cut = {tuple(w): i for i, w in enumerate(np.lib.stride_tricks.sliding_window_view(stream.ids, 64).tolist())}
    assert all(row[0] == 0 and len(row) == 65 for row in seen)
    starts = [cut[tuple(row[1:].tolist())] for row in seen]
    assert len({s // 64 for s in sorted(starts)}) >= pieces - 1 and np.diff(sorted(starts)).min() >= 64
    assert not np.array_equal(r.row(stream, 0, 0, rng), r.row(stream, 0, pieces, rng))  # the next epoch cuts elsewhere


def test_batches_depend_on_step_and_counter_only():
    r, dealt, again = rows(0.5), [0, 0], [0, 0]
    a, b = r.batch(0, 32, dealt), r.batch(1, 32, dealt)
    r.batch(0, 32, again)
    assert np.array_equal(r.batch(1, 32, again), b) and not np.array_equal(a, b) and dealt == again
    assert sum(dealt) == 64 and dealt[0] > dealt[1] > 0


def test_evidence_is_from_elsewhere_in_the_same_document():
    r = rows(1.0, length=200, most=120)
    stream, rng = r.streams[0], np.random.default_rng(0)
    with_evidence = 0
    for n in range(20):
        decoded = r.bpe.decode(r.row(stream, 0, n, rng)[1:].tolist())
        if decoded.startswith("Tale "):
            with_evidence += 1
            title, passage, text = decoded.split("\n", 2)
            inner, after = passage.split()[1:-1], text.split()[1:-1]  # the first and the last may be cut
            assert inner and {w.split("x")[0] for w in inner + after} == {f"t{title[-1]}"}
            places = [[int(w.split("x")[1]) for w in words] for words in (inner, after)]
            assert max(places[0]) < min(places[1]) or min(places[0]) > max(places[1])  # it does not touch the text
    assert with_evidence > 10


def test_a_copy_is_a_piece_of_the_text_that_follows():
    r = rows(1.0, length=200, most=80, copies=1.0)
    for n in range(20):
        row = r.row(r.streams[0], 0, n, np.random.default_rng(n))
        title, passage, text = r.bpe.decode(row[1:].tolist()).split("\n", 2)
        assert title.startswith("Tale ") and len(passage) > 5 and passage in text and len(row) == 201


# ---- a tiny run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    written(tmp_path / "t.zst", [{"file": f"{i}.txt", "text": f"Title: Tale_{i}\n{TEXT * 12}"} for i in range(3)])
    (tmp_path / "held.txt.zst").write_bytes(zstandard.compress((TEXT * 3).encode()))
    return {"model": dict(vocab=300, width=32, layers=2, heads=2, mlp=64, window=32),
            "data": dict(held_out="held.txt.zst", tokenizer_most=2000, evidence=0.25, copies=0.1, evidence_most=12,
                         source=[dict(name="tales", file="t.zst", share=1.0)]),
            "train": dict(seed=0, threads=1, dtype="float32", batch=8, micro=4, lr=0.03, momentum=0.9, weight_decay=0.0,
                          adam_lr=0.01, warmup=0.05, hold=0.5, steps=40, minutes=1, first_minutes=100, evaluate_minutes=100,
                          save_minutes=100, sample=200, out=str(tmp_path / "out"))}


def test_it_learns_and_leaves_a_checkpoint(recipe, tmp_path):
    run = Run(recipe, tmp_path, tmp_path / "state")
    run.fit()
    lm = load(tmp_path / "out")
    bits = RALM(lm).score(TEXT * 2).bits_per_byte()
    assert bits < 0.5, bits  # one sentence, learnt by heart
    untrained = Decoder(run.config).requires_grad_(False)
    assert RALM(replace_model(lm, untrained)).score(TEXT).bits_per_byte() > 2
    trained = lm.config.trained
    assert trained["steps"] == 40 and trained["finished"] and trained["tokens"] == 40 * 8 * 32
    assert trained["parameters"] == lm.parameters
    said = (tmp_path / "out" / "README.md").read_text()
    gpt_card.main([str(tmp_path / "out")])
    assert (tmp_path / "out" / "README.md").read_text() == said and load(tmp_path / "out").config == lm.config
    assert f"**{trained['scored']['bits_per_byte']:.4f} bits per byte**" in said and "still runs" not in said


def replace_model(lm, model):
    return type(lm)(model, lm.tokenizer, lm.name)


def test_interrupted_equals_uninterrupted(recipe, tmp_path):
    whole = Run(recipe, tmp_path, tmp_path / "a")
    whole.fit(until=12)
    Run(recipe, tmp_path, tmp_path / "b").fit(until=5)
    torch.manual_seed(99)  # nothing may hang on the generator of the process
    rest = Run(recipe, tmp_path, tmp_path / "b")
    assert rest.state.steps == 5
    rest.fit(until=12)
    assert rest.state.dealt == whole.state.dealt
    for (name, a), (_, b) in zip(whole.model.named_parameters(), rest.model.named_parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)
    moments = whole._moments()
    assert len(moments) == 2 * 7 + 3 * (2 * 4 + 2) and moments.keys() == rest._moments().keys()


def test_bfloat16_trains_too(recipe, tmp_path):
    recipe["train"] |= dict(dtype="bfloat16")
    run = Run(recipe, tmp_path, tmp_path / "state")
    losses = [run.step() for _ in range(25)]
    assert losses[-1] < losses[0] - 2 and all(p.dtype == torch.float32 for p in run.model.parameters())


def test_the_recipe_in_the_checkout_makes_the_promised_size():
    import tomllib

    path = Path(__file__).parents[2] / "recipes" / "base.toml"
    if not path.is_file():
        pytest.skip(f"no {path}")
    config = GPTConfig(**tomllib.loads(path.read_text())["model"])
    assert 5e6 <= sum(p.numel() for p in Decoder(replace(config, window=512)).parameters()) <= 10e6 and config.window >= 512


def test_usage_is_one_line():
    for main in (gpt_eval.main, gpt.main, gpt_card.main):
        with pytest.raises(UsageError, match="usage: python -m ralm"):
            main([])
