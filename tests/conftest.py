"""What several folders of tests share: a real store in a temporary folder, tiny real models, one thread per process.

The models are tiny, and threads that wait for each other cost more than they save."""

import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples in every run, so that a change that breaks something is told from luck; `make check-all` draws new ones
settings.register_profile("same", derandomize=True)
settings.register_profile("new")
settings.load_profile(os.environ.get("RALM_EXAMPLES", "same"))

TEXTS = [
    "The lighthouse of Brennick was built in 1873 by Maria Holt. It stands on a reef of granite.",
    "A granite reef is hard to build on. Maria Holt drilled for two summers before the first stone was laid.",
    "Mitochondria produce most of the chemical energy of a cell. Albert von Kölliker described them in 1857.",
    "The cell was named by Robert Hooke, who saw small rooms in cork.",
    "Retrieval reads what others wrote. The passage stands before the text; the text never moves.",
    "The language model reads the passage, then the question, then it answers.",
    "Mount Teide is the highest mountain of Spain. Snow lies on it in winter, and the sea is near.",
    "Snow melts in spring. The river then carries stones from the mountain to the sea.",
    "A candle burns nearly 7 grams of wax an hour. The lamp of the tower burned 12 litres of oil a night.",
    "Sailors called the tower the white candle. In 1999 there were 42 of them, and 7 were naïve.",
]
GONE = ["The lighthouse of Brennick was built in 1873 by nobody: this text must never be read again after it is removed.",
        "Mitochondria, granite, snow, the passage, the question and the tower are all in this removed text."]


def module(path: Path):
    """Load a helper beside the tests (they are no package)."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def tiny():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return module(Path(__file__).parent / "lm" / "tiny.py")


@pytest.fixture(scope="session")
def lm(tiny):
    """A tiny random Llama whose distribution depends on everything it reads."""
    from ralm.lm.hf import HF

    return HF(tiny.make("llama"), tiny.tokenizer(), window=64)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A datastore of ten documents; two more were removed, so rows that are not alive stand between the others."""
    from ralm.types import Document
    from ralm.what.datastore import Datastore

    documents = [Document(f"d{i}", t, title=f"T{i}" if i % 2 else "", metadata={"even": i % 2 == 0}) for i, t in enumerate(TEXTS)]
    gone = [Document(f"gone{i}", t) for i, t in enumerate(GONE)]
    made = Datastore.build(tmp_path_factory.mktemp("store") / "kb.ralm", [*documents[:4], *gone, *documents[4:]], split="words:20")
    made.remove([d.id for d in gone])
    return made


@pytest.fixture(scope="session")
def bm25(store):
    from ralm.index import retriever

    return retriever("bm25", store)


@pytest.fixture(scope="session")
def retro(tiny):
    """A tiny Llama that reads neighbours of chunks of 6 tokens, with random weights under which each of them matters."""
    from ralm.lm.hf import HF
    from ralm.lm.retro import Retro, RetroConfig

    made = module(Path(__file__).parent / "lm" / "tiny_retro.py")
    shape = made.SHAPE | dict(m=6, layers=(1, 2))
    lm = Retro(HF(tiny.make("llama"), tiny.tokenizer(), window=64), RetroConfig(gate="none", **shape))
    made.loud(lm.adapter, 1)
    lm.model.requires_grad_(False)
    return lm


@pytest.fixture(scope="session")
def neighbours(store, retro):
    """The chunks of the ten documents, found by their words; those of the two that were removed stand between."""
    from ralm.what.neighbours import NeighbourStore

    return NeighbourStore.build(store, retro, retriever="bm25")
