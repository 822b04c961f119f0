"""A tiny sentence-transformers model, and pairs that it can learn: a passage names somebody, a query asks for the name."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

ANSWERS = ("cat", "dog", "the cat", "the dog", "sat cat")


def beside(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """A random BERT of two layers, 32 wide, as sentence-transformers saves it; without dropout, with prompts."""
    pytest.importorskip("sentence_transformers")
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules

    index = beside(Path(__file__).parents[1] / "index" / "conftest.py")
    base, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("sentences")
    index.tiny_bert(base, "BertModel", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    parts = [modules.Transformer(str(base)), modules.Pooling(32, "mean")]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu",
                                                      prompts={"query": "query: ", "document": "passage: "})
    model.save(str(folder), create_model_card=False)
    return folder


def people(count: int, seed: int) -> dict:
    """SQuAD's form: one paragraph and two questions a person."""
    rng = random.Random(seed)
    paragraphs = []
    for n in range(count):
        name = "".join(rng.sample("abcdefghij", 4))
        answer = f"{ANSWERS[n % len(ANSWERS)]} {n}"
        asked = [{"id": f"{seed}-{n}-{word}", "question": f"{word} {name}", "answers": [answer]} for word in ("who", "where")]
        paragraphs.append({"context": f"{name} sat the {answer} here", "qas": asked})
    return {"version": "1.1", "data": [{"title": "people_of", "paragraphs": paragraphs}]}


@pytest.fixture(scope="session")
def people_data(tmp_path_factory) -> Path:
    """A data folder with train.json and dev.json."""
    folder = tmp_path_factory.mktemp("people")
    (folder / "train.json").write_text(json.dumps(people(40, 1)))
    (folder / "dev.json").write_text(json.dumps(people(12, 2)))
    return folder
