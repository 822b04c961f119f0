"""A datastore of a stranger runs no code: nothing on the way from opening to answering can load a pickle, and planted ones do
not fire."""

import ast
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import ralm
from ralm.index import retriever
from ralm.types import Document
from ralm.what.datastore import Datastore

PACKAGE = Path(ralm.__file__).parent
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}  # their loads run code
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"read_pickle", "load_module", "exec_module", "run_path", "run_module", "from_pretrained_pickle"}


def dangers(source: str) -> list[str]:
    """What in a module could run code out of a file."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            out += [f"{node.lineno}: imports {n}" for n in names if n.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        said = ast.unparse(node)
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if (isinstance(node.func, ast.Name) and name in CALLS) or name in METHODS:
            out.append(f"{node.lineno}: {said[:80]}")
        if name == "load" and said.startswith("torch.") and options.get("weights_only") != "True":
            out.append(f"{node.lineno}: {said[:80]} without weights_only")
        if name == "load" and said.startswith(("np.", "numpy.")) and options.get("allow_pickle", "False") != "False":
            out.append(f"{node.lineno}: {said[:80]}")
        if options.get("trust_remote_code", "False") not in ("False",):
            out.append(f"{node.lineno}: {said[:80]}")
        if options.get("shell", "False") != "False" or (name == "system" and said.startswith("os.")):
            out.append(f"{node.lineno}: {said[:80]}")
    return out


def test_the_check_finds_what_it_looks_for():
    for bad in ("import pickle", "from joblib import load", "torch.load(f)", "np.load(f, allow_pickle=True)", "eval(x)", "exec(x)",
                "A.from_pretrained(x, trust_remote_code=True)", "os.system(x)", "subprocess.run(x, shell=True)"):
        assert dangers(bad), bad
    for good in ("torch.load(f, weights_only=True)", "np.load(f)", "model.eval()", "re.compile(x)", "json.load(f)"):
        assert not dangers(good), good


def test_no_module_of_ours_can_run_a_file():
    found = {str(f.relative_to(PACKAGE)): d for f in sorted(PACKAGE.rglob("*.py")) if (d := dangers(f.read_text(encoding="utf-8")))}
    assert not found


LOADED = """
import sys
from ralm.what.datastore import Datastore
from ralm.index import retriever
def use():
    store = Datastore.open(sys.argv[1])
    for spec in ("bm25", "dense"):
        hits = retriever(spec, store).search(["w1 w2", "w7"], 3)
        store.chunks(hits.ids[0].tolist())
    list(store.documents()), store.history(), store.allow("number > 3")
use()  # numba loads its machine code, pickled in the user's own cache
calls = []
sys.addaudithook(lambda event, args: calls.append((event, *map(str, args[:2])))
                 if event in ("pickle.find_class", "marshal.load", "marshal.loads") else None)
use()
print(calls)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, table) -> Path:
    documents = [Document(f"d{i}", f"w{i} w{i + 1} w1 w2", metadata={"number": i}) for i in range(450)]
    store = Datastore.build(tmp_path_factory.mktemp("base") / "kb", documents, split="none")
    retriever("bm25", store), retriever(f"dense:{table},index=hnsw", store)
    return store.path


def test_opening_and_searching_unpickles_nothing(base):
    """Of the libraries below us too: an audit hook hears every class that any unpickler looks up. (The first search of a
    process loads numba's machine code, which lies in the user's cache, not in the datastore.)"""
    done = subprocess.run([sys.executable, "-c", LOADED, str(base)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


class Canary:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def weights(canary: Canary) -> bytes:
    """A pytorch_model.bin as torch.save writes it, around the canary."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(canary, 2))
        z.writestr("archive/version", "3\n")
    return out.getvalue()


def array(canary: Canary) -> bytes:
    """A .npy file of objects, which are pickled."""
    out = io.BytesIO()
    np.save(out, np.array([canary], object), allow_pickle=True)
    return out.getvalue()


USE = """
import sys
from ralm.app import cli
for argv in (["doctor", KB], ["search", KB, "w1 w2", "--retriever", "bm25"], ["search", KB, "w1 w2", "--retriever", "dense"],
             ["show", KB], ["show", KB, "--id", "d7"], ["history", KB], ["add", KB, FILE],
             ["remove", KB, "--id", "d8"], ["compact", KB]):
    code = cli.main([*argv, "--quiet"])
    assert code in (0, 1, 2), code
"""


def used(path: Path, folder: Path) -> None:
    """Every command over a datastore, each allowed to refuse, none to do anything else."""
    file = folder / "new.txt"
    file.write_text("a new text")
    code = f"KB, FILE = {str(path)!r}, {str(file)!r}\n" + USE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "unexpected" not in done.stderr, done.stderr


SUFFIXES = (".npy", ".safetensors", ".faiss", ".json", ".lance", ".manifest", ".txn")


def planted(base: Path, folder: Path, make, reseal: bool) -> None:
    """Pickles in place of the files, and beside them under the names that model libraries look for."""
    fired = folder / "fired"
    data, path = make(Canary(fired)), Path(shutil.copytree(base, folder / "kb"))
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        replaced = file.suffix in SUFFIXES and file.name not in ("store.json", "manifest.json")
        if replaced and ("index" in file.parts or not reseal):
            file.write_bytes(data)
    for part in (path / "index").glob("*/*/"):
        for name in ("pytorch_model.bin", "model.pkl", "embeddings.npy", "modules.json", "modeling.py", "__init__.py"):
            if not (part / name).exists():
                (part / name).write_bytes(data)
    if reseal:  # a stranger can write checksums that fit
        from ralm.index import manifest

        for artifact in (path / "index").iterdir():
            now = manifest.load(artifact)
            parts = tuple(manifest.seal(artifact / p.name, p.first, p.stop, p.rows) if p.files else p for p in now.parts)
            manifest.commit(artifact, manifest.Manifest(**{**vars(now), "parts": parts}))
    used(path, folder)
    assert not fired.exists()


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "fired")))
    assert (tmp_path / "fired").exists()
    np.load(io.BytesIO(array(Canary(tmp_path / "again"))), allow_pickle=True)
    assert (tmp_path / "again").exists()


def test_planted_pickles_do_not_fire(base, tmp_path):
    planted(base, tmp_path, weights, reseal=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [array, weights, lambda canary: pickle.dumps(canary)])
@pytest.mark.parametrize("reseal", [False, True])
def test_planted_pickles_of_every_kind_do_not_fire(base, tmp_path, make, reseal):
    planted(base, tmp_path, make, reseal)
