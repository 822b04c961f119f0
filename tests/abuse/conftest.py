"""What the tests of abuse share: a tiny encoder on disk, and small datastores with both kinds of index."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> str:
    """A model2vec folder of 300 random word vectors, as a spec."""
    pytest.importorskip("model2vec")
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("table")
    words = {"[UNK]": 0, "[PAD]": 1} | {f"w{i}": i + 2 for i in range(300)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({"embeddings": np.random.default_rng(0).standard_normal((302, 16)).astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    return f"m2v:{folder}"
