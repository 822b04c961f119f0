"""The integer encoder: near to float32, exact integers on any x86, and vectors that do not depend on their company."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ralm.errors import FingerprintError, UsageError
from ralm.index import int8, int8_kernels
from ralm.index.dense import Dense
from ralm.index.encode import Encoder, encoder
from ralm.types import Document
from ralm.what.datastore import Datastore

# the largest bytes and weights there are: where a processor adds two products in 16 bits, anything larger would saturate
EXACT = """
import numpy as np
from ralm.index.int8 import BITS, Product, Rows
rng = np.random.default_rng(0)
for rows, k, n in ((1, 384, 384), (37, 1536, 384), (300, 384, 1152)):
    w = np.where(rng.random((n, k)) < 0.5, 1, -1).astype(np.float32) * BITS
    w[rng.random((n, k)) < 0.3] = BITS
    x = Rows(rows, k)
    x.q[:] = np.where(rng.random((rows, k)) < 0.8, 255, rng.integers(0, 256, (rows, k)))
    product = Product(w, np.zeros(n, np.float32))
    assert (product.of(x) == x.q.astype(np.int64) @ w.T.astype(np.int64)).all(), (rows, k, n)
    assert (product.columns == w.sum(1)).all()
"""


@pytest.fixture(scope="module")
def mixed(paragraphs):
    """Texts of one word to more than the window."""
    return ["", "cat", *paragraphs[:60], " ".join(paragraphs[60:64]), " ".join(paragraphs[70:90]), "㍿"]


def test_vectors_are_near_those_of_float32_and_a_texts_own(mixed):
    model = encoder("minilm-int8")
    assert isinstance(model, Encoder) and model.dim == 384 and model.name == "minilm-int8"
    ours, right = model.encode(mixed), encoder("minilm").encode(mixed)
    assert ours.dtype == np.float32 and ours.shape == right.shape
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    cosine = (ours * right).sum(1)
    assert cosine.mean() > 0.996 and cosine[1:].min() > 0.99 and cosine[0] > 0.985, cosine  # the first has no word
    alone = np.concatenate([model.encode([t]) for t in mixed])
    assert (alone == ours).all() and (model.encode(mixed[::-1])[::-1] == ours).all()  # bit for bit
    assert model.encode([]).shape == (0, 384)


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "ALL"])
def test_products_are_those_of_integers_on_older_processors_too(isa):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", EXACT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gelu_and_normalisation_are_what_they_are_called():
    x = np.linspace(-9, 9, 4001, dtype=np.float32)
    np.testing.assert_allclose([int8_kernels.erf(v) for v in x], [math.erf(v) for v in x], atol=1e-6)
    rng = np.random.default_rng(1)
    a, one, none = rng.standard_normal((5, 64)).astype(np.float32), np.ones(5, np.float32), np.zeros(5, np.float32)
    h, c, b = rng.standard_normal((5, 64)).astype(np.float32), np.zeros(64, np.float32), rng.standard_normal(64).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 64)).astype(np.float32)
    q, s, m = np.empty((5, 64), np.uint8), one.copy(), none.copy()
    x = (h + a + b).astype(np.float64)
    right = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12) * gamma + beta
    int8_kernels.add_normalise(a, c, b, gamma, beta, np.float32(1e-12), h, s, m, q)
    np.testing.assert_allclose(h, right, atol=1e-5)
    np.testing.assert_allclose(s[:, None] * q + m[:, None], h, atol=s.max() * 0.501)
    right = [[v * (1 + math.erf(v / 2 ** 0.5)) / 2 for v in row] for row in (a + b).astype(np.float64)]
    int8_kernels.gelu(a, one, none, c, b, q, s, m)
    np.testing.assert_allclose(s[:, None] * q + m[:, None], right, atol=s.max() * 0.501)
    flat = np.full((1, 64), 3.5, np.float32)
    int8_kernels.quantise(flat, q[:1], s[:1], m[:1])
    assert (q[0] == 0).all() and s[0] == 0 and m[0] == 3.5


def test_the_number_of_threads_is_what_it_was(mixed):
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = encoder("minilm-int8").encode(mixed)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert (encoder("minilm-int8").encode(mixed) == two).all()
    finally:
        torch.set_num_threads(before)


def test_a_model_of_another_kind_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(Path(encoder("minilm").folder), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(UsageError, match="no BERT with GELU"):
        int8.Int8("x", folder, "f" * 32).encode(["a"])


def test_a_store_says_which_of_the_two_it_was_made_with(tmp_path):
    documents = [Document("a", "A feline rested upon the rug."), Document("b", "Interest rates rose.")]
    store = Datastore.build(tmp_path / "kb", documents, split="none")
    found = Dense(store, "minilm-int8")
    ids = found.search(["Where did the cat sit?", "monetary policy"], 1).ids[:, 0].tolist()
    assert store.document_ids(ids) == ["a", "b"] and "minilm-int8" in repr(Dense(store))
    with pytest.raises(FingerprintError, match="minilm-int8"):
        Dense(store, "minilm")
    assert encoder("minilm").fingerprint != encoder("minilm-int8").fingerprint
