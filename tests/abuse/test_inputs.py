"""Thousands of broken, hostile and odd files: no exception that is not ours, no file that takes for ever or all the memory, nothing
written outside the datastore, nothing read in from outside the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from ralm.what import stream
from ralm.what.read import read

CHILD = Path(__file__).with_name("read_child.py")


def run(folder: Path, first: int, stop: int, seconds: float) -> dict:
    """Generated inputs first to stop, in a process of its own; the summary. Any broken promise fails."""
    done = subprocess.run([sys.executable, "-W", "ignore", str(CHILD), str(folder), str(first), str(stop)],
                          capture_output=True, text=True, timeout=seconds,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"})
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, lines[-3:], done.stderr[-2000:])  # a crash of a parser would end it
    broken = [line for line in lines if "seed" in line]
    assert not broken, broken[:5]
    assert lines[-1]["inputs"] == stop - first and not lines[-1]["wrong"]
    return lines[-1]


def test_a_hundred_inputs(tmp_path):
    assert run(tmp_path / "run", 0, 100, 200)["documents"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_inputs(tmp_path, part):
    told = run(tmp_path / "run", 2500 * part, 2500 * (part + 1), 3000)
    print(told)
    assert told["documents"] > 2500


# ---- drawn by hypothesis -----------------------------------------------------------------------------------------------


NAMES = st.sampled_from(["id", "text", "title", "metadata", "meta", "data", "paragraphs", "context", ""]) | st.text(max_size=3)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda v: st.lists(v, max_size=4) | st.dictionaries(NAMES, v, max_size=4), max_leaves=12)
ROWS = st.lists(JSON.map(json.dumps) | st.text(max_size=30), max_size=6).map("\n".join)
CELL = st.text(max_size=8) | st.sampled_from(['"', "text", "id", "\t", "1", "\r"])
CELLS = st.lists(st.lists(CELL, max_size=5).map(",".join), max_size=6)
TAGS = "<p> </p> <div> <a <!-- --> <script> </script> <![CDATA[ &amp; &#0; <table> <td> <svg> <title>".split()
MARKUP = st.lists(st.sampled_from(TAGS) | st.text(max_size=9), max_size=40).map("".join)
KINDS = {"jsonl": ROWS, "json": JSON.map(json.dumps) | ROWS, "csv": CELLS.map("\n".join), "tsv": CELLS.map("\n".join), 
         "html": MARKUP, "md": st.text(), "xml": MARKUP}


def drawn(folder: Path, kind: str, text: str) -> None:
    path, skipped = folder / f"a.{kind}", []
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for d in read(path, skipped=skipped):
        (d.id + d.text + d.title).encode("utf-8")
        assert d.text.strip()
    assert all("\n" not in reason for _, reason in skipped)


FILES = st.sampled_from(sorted(KINDS)).flatmap(lambda k: st.tuples(st.just(k), KINDS[k]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(FILES)
def test_drawn_inputs(tmp_path_factory, file):
    drawn(tmp_path_factory.getbasetemp(), *file)


@pytest.mark.slow
@seed(6)
@settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(FILES)
def test_thousands_of_drawn_inputs(tmp_path_factory, file):
    drawn(tmp_path_factory.getbasetemp(), *file)


# ---- very long lines ---------------------------------------------------------------------------------------------------


# VmHWM, not ru_maxrss: that one is the parent's where the parent was larger
GIANT = """
import json, re, sys, time
from ralm.what.read import read
skipped, began = [], time.process_time()
n = sum(1 for _ in read(sys.argv[1], skipped=skipped))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) >> 10
print(json.dumps([n, skipped, time.process_time() - began, peak]))
"""


def giant(path: Path, size: int, byte: bytes, limit: int) -> None:
    """One line of so many bytes after one good row; the good row is read, and memory stays below the limit in MB."""
    good = b'{"text": "good"}\n' if ".jsonl" in path.name else b"id\ttext\n1\tgood\n" if ".tsv" in path.name else b""
    with path.open("wb") as f:
        f.write(good)
        if byte == b"\0":
            f.truncate(size)  # takes no room on the disk
        else:
            for _ in range(size >> 20):
                f.write(byte * (1 << 20))
    done = subprocess.run([sys.executable, "-c", GIANT, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    n, skipped, seconds, peak = json.loads(done.stdout)
    path.unlink()
    kept = bool(good) and byte != b"\0"  # NUL bytes at the start of a file: it is no text
    assert n == kept and len(skipped) == 1 and seconds < 10 and peak < limit, (path.name, n, skipped, seconds, peak)


SUFFIXES = ["jsonl", "tsv", "csv", "txt", "md", "json", "html"]


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_line_above_the_limit(tmp_path, suffix):
    giant(tmp_path / f"a.{suffix}", stream.CAP + (2 << 20), b"\0", 1000)


@pytest.mark.slow
@pytest.mark.parametrize("byte", [b"x", b"\0"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_line_of_a_gigabyte(tmp_path, suffix, byte):
    giant(tmp_path / f"a.{suffix}", 1 << 30, byte, 1000)
