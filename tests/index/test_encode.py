"""Encoders: unit vectors, fingerprints of files and not of names, prompts, distillation against one token at a time."""

import json
import shutil

import numpy as np
import pytest

from ralm.errors import UsageError
from ralm.index import encode, static
from ralm.index.encode import Encoder, canonical, encoder
from ralm.index.static import Static, unit

TEXTS = ["The cat sat on the mat.", "a dog", "Paris is the capital of France, and its largest city. " * 60, ""]


def test_minilm_is_the_real_model_and_gives_unit_vectors_of_which_near_ones_mean_the_same():
    mini = encoder("minilm")
    assert isinstance(mini, Encoder) and mini.dim == 384 and mini.name == "minilm"
    x_ND = mini.encode(["A man is eating food.", "A man is eating a meal.", "The stock market fell on Monday.", ""])
    assert x_ND.dtype == np.float32 and x_ND.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(x_ND, axis=1), 1, atol=1e-5)
    # what the model's own documentation pairs up is near, the rest is far
    assert x_ND[0] @ x_ND[1] > 0.8 and x_ND[0] @ x_ND[2] < 0.2
    assert mini.encode([]).shape == (0, 384)


def test_minilm_agrees_with_the_plain_forward_pass_and_cuts_at_its_window():
    import torch
    from transformers import AutoModel, AutoTokenizer

    mini = encoder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(str(mini.folder))
    model = AutoModel.from_pretrained(str(mini.folder)).eval()
    ours = mini.encode(TEXTS)
    for text, mine in zip(TEXTS, ours):
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            theirs = model(**inputs).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(mine, theirs / np.linalg.norm(theirs), atol=2e-5)
    long = "word " * 400
    np.testing.assert_allclose(*mini.encode([long + "one end", long + "another"]), atol=1e-5)


def test_distilled_vectors_are_the_models_for_each_token_alone_reduced_and_weighted(tiny, tmp_path):
    model = encoder(f"st:{tiny}").model
    static.distil(model, tmp_path, dim=16, sif=1e-2)
    tokenizer = model.tokenizer
    alone = []
    for i in range(len(tokenizer)):  # one at a time, through the model's own front door: token ids in, mean of the states out
        import torch

        ids = torch.tensor([[tokenizer.cls_token_id, i, tokenizer.sep_token_id]])
        with torch.inference_mode():
            states = model[0].auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        alone.append(states[0].mean(0).double().numpy())
    x = np.stack(alone) - np.mean(alone, 0)
    rank = np.arange(len(x))
    zipf = (1 / (rank + 2)) / (1 / (rank + 2)).sum()
    weight = 1e-2 / (1e-2 + zipf)
    made = Static("m2v:x", tmp_path)
    assert made.dim == 16
    table = made._stored.astype(np.float64) / weight[:, None]
    # principal components: sixteen orthogonal axes that hold as much variance as any sixteen can
    left = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(table, compute_uv=False), left[:16], rtol=2e-3)
    np.testing.assert_allclose(np.abs(np.corrcoef(table.T) - np.eye(16)).max(), 0, atol=2e-2)
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    np.testing.assert_allclose(made.encode(["the cat"])[0], unit(made._stored[ids].astype(np.float32).mean(0)[None])[0], atol=1e-3)


@pytest.mark.slow
def test_the_static_table_of_minilm_is_made_once_and_agrees_with_minilm_on_what_is_near(monkeypatch, tmp_path, paragraphs):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = encoder("static")
    assert made.dim == 256 and (made.folder / "tokenizer.json").is_file() and made.folder.is_relative_to(tmp_path)
    monkeypatch.setattr(static, "distil", None)  # the second time nothing is distilled
    assert encoder("static").fingerprint == made.fingerprint
    some = paragraphs[:200]
    ours, theirs = (x @ x.T for x in (made.encode(some), encoder("minilm").encode(some)))
    upper = np.triu_indices(200, 1)
    assert np.corrcoef(ours[upper], theirs[upper])[0, 1] > 0.4  # measured 0.48


def test_static_tables_are_unit_or_zero_and_cut_nothing(table):
    model = encoder(table)
    x_ND = model.encode([*TEXTS[:3], "", "㍿㍿"])
    np.testing.assert_allclose(np.linalg.norm(x_ND, axis=1), [1, 1, 1, 0, 0], atol=1e-5)
    assert np.isfinite(x_ND).all()
    ids = model._model.tokenizer.encode("the cat sat", add_special_tokens=False).ids
    np.testing.assert_allclose(model.encode(["the cat sat"])[0], unit(model._stored[ids].mean(0)[None])[0], atol=1e-6)
    long = "word " * 4000
    assert model.encode([long])[0] @ model.encode([long + "paris " * 3000])[0] < 0.99
    some = [*TEXTS, *(f"{t} {i} {'of the cat ' * (i % 40)}" for i, t in enumerate(TEXTS * 40))]  # many of the same length
    assert (model.encode(some) == np.concatenate([model.encode([t]) for t in some])).all()  # batches change nothing
    assert (model.encode(some) == model.encode(some, batch=7)).all()


def test_a_saved_table_is_the_same_encoder_and_the_name_does_not_matter(table, tmp_path):
    first = encoder(table)
    first.save(tmp_path / "copy")
    again = encoder(str(tmp_path / "copy"))
    assert again.name == f"m2v:{tmp_path / 'copy'}" and again.fingerprint == first.fingerprint
    assert (again.encode(TEXTS) == first.encode(TEXTS)).all()


def test_fingerprints_are_of_weights_and_tokenizer(tiny, table, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny, moved)
    print_of = encoder(f"st:{tiny}").fingerprint
    assert encoder(str(moved)).fingerprint == print_of
    weights = next(moved.rglob("model.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert encoder(str(moved)).fingerprint != print_of
    copy = tmp_path / "table"
    shutil.copytree(table.removeprefix("m2v:"), copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert encoder(str(copy)).fingerprint != encoder(table).fingerprint


def test_prompts_of_the_model_are_used_for_queries_and_passages(tiny):
    model = encoder(str(tiny))
    assert model.name == f"st:{tiny}"
    plain = model.model.encode(["query: cat", "passage: cat"])
    np.testing.assert_allclose(model.encode(["cat"], role="query")[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(model.encode(["cat"])[0], plain[1], atol=1e-5)


def test_int8_tables_of_others_load(data, tmp_path):
    source = data / "weights" / "potion-base-4M-int8"
    if not source.is_dir():
        pytest.skip(f"{source} is not there (set RALM_DATA)")
    import zstandard

    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path)
    packed = (source / "tokenizer.json.zst").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(zstandard.ZstdDecompressor().stream_reader(packed).read())
    model = encoder(str(tmp_path))
    assert model.dim == 128
    a, b, c = model.encode(["a cat sat on the mat", "the kitten was sitting on a rug", "stock prices fell sharply"])
    assert a @ b > a @ c + 0.2


@pytest.mark.parametrize("spec", ["", "st:", "m2v:", "./missing", "/no/such/folder", "a/b/c"])
def test_what_is_not_there_is_one_clear_line(spec):
    with pytest.raises(UsageError) as e:
        encoder(spec)
    assert "\n" not in str(e.value) and "folder" in str(e.value)


def test_a_folder_that_is_no_model_and_pickled_weights_are_refused(tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot be read as a sentence-transformers model"):
        encoder(str(tmp_path / "empty")).encode(["x"])
    with pytest.raises(UsageError, match="model2vec folder"):
        encoder(f"m2v:{tmp_path / 'empty'}").encode(["x"])
    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    weights = next(folder.rglob("model.safetensors"))
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UsageError, match="safetensors"):
        encoder(str(folder)).encode(["x"])


def test_names_as_they_are_recorded(table, tiny):
    names = ["minilm", "static", "st:x/y", "m2v:z", "x/y"]
    assert [canonical(n) for n in names] == [*names[:4], "st:x/y"]
    assert canonical(table.removeprefix("m2v:")) == table
    assert canonical(str(tiny)) == f"st:{tiny}"


def test_encoders_may_be_used_by_several_threads(table):
    from concurrent.futures import ThreadPoolExecutor

    for spec in (table, "minilm"):
        model = encoder(spec)
        texts = [f"text number {i} about cats" for i in range(24)]
        alone = [model.encode([t])[0] for t in texts]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda t, model=model: model.encode([t], role="query")[0], texts))
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_loaded_model_is_shared():
    assert encoder("minilm").model is encoder("minilm").model
    assert encode._minilm() is encode._minilm()
