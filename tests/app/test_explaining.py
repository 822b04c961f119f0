"""ralm explain: the promised JSON, text that can be read in a terminal, and a page that keeps to itself."""

import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest

pytest.importorskip("torch")
KNN = "knn:k=8,lam=0.5,temperature=1"
TEXT = "The Moon is the only natural satellite."


@pytest.fixture(scope="module")
def held(shared, tiny, tmp_path_factory):
    """A datastore with a token store, to read; its texts hold markup and characters of several bytes."""
    from ralm.app import cli

    folder = tmp_path_factory.mktemp("explain")
    (folder / "moon.txt").write_text("The Moon is the only natural satellite of Earth. Naïve 北京 🦩 </script><b onload=x>&amp;")
    (folder / "sea.txt").write_text("The sea is deep. The only natural thing is the sea, and the Moon above it.")
    assert cli.main(["build", str(folder / "kb"), str(folder / "moon.txt"), str(folder / "sea.txt"), "-q"]) == 0
    assert cli.main(["tokens", str(folder / "kb"), "--lm", tiny, "-q"]) == 0
    return folder / "kb"


def test_the_json_is_what_was_promised(ralm, held, tiny):
    data = ralm("explain", held, TEXT, "--lm", tiny, "--how", KNN, "--json").json
    assert data.keys() == {"tokens", "documents", "convention"}
    assert "".join(t["text"] for t in data["tokens"]) == TEXT
    stored = {i: ralm("show", held, "--id", i, "--json").json["text"] for i in ("moon.txt", "sea.txt")}
    for t in data["tokens"]:
        assert t.keys() == {"text", "p_lm", "p_knn", "p", "neighbours"}
        assert t["p"] == pytest.approx(0.5 * t["p_lm"] + 0.5 * t["p_knn"], rel=1e-3)
        assert len(t["neighbours"]) == 8 and sum(n["weight"] for n in t["neighbours"]) == pytest.approx(1, abs=1e-4)
        for n in t["neighbours"]:
            assert n.keys() == {"left", "target", "document", "start", "distance", "weight"}
            assert stored[n["document"]][n["start"]:].startswith(n["target"])
    supplied = sum(0.5 * t["p_knn"] / t["p"] for t in data["tokens"])
    assert sum(data["documents"].values()) == pytest.approx(supplied, rel=1e-3)
    assert "k=8" in data["convention"]["how"] and data["convention"]["tokens"].startswith("TokenStore('default'")


def test_own_and_named_documents_can_be_left_out(ralm, held, tiny):
    args = ["explain", held, "--file", held.parent / "moon.txt", "--lm", tiny, "--how", KNN, "--json"]
    for more in (["--exclude-self"], ["--exclude", "moon.txt"]):
        data = ralm(*args, *more).json
        assert data["documents"].keys() == {"sea.txt"} and data["convention"]["excluded"] == ["moon.txt"]
    assert "moon.txt" in ralm(*args).json["documents"]


def test_text_comes_from_words_a_file_or_a_pipe(ralm, held, tiny, tmp_path, monkeypatch):
    args = ["--lm", tiny, "--how", KNN, "--json", "--neighbours", "1"]
    words = ralm("explain", held, *TEXT.split(), *args).json
    (tmp_path / "t.txt").write_text(TEXT)
    assert ralm("explain", held, "--file", tmp_path / "t.txt", *args).json["tokens"] == words["tokens"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    assert ralm("explain", held, *args).json["tokens"] == words["tokens"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert ralm("explain", held, *args).code == 2
    assert "--file" in ralm("explain", held, tmp_path / "t.txt", *args).err  # the words, not the file: told
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for file in ("bad.txt", "none.txt"):
        ran = ralm("explain", held, "--file", tmp_path / file, *args, "-q")
        assert ran.code == 1 and file in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("how", ["prepend:k=1,tokens=64", "ensemble:k=2,tokens=64", f"prepend:k=1,tokens=64+{KNN}"])
def test_passages_in_force_are_told(ralm, held, tiny, how):
    data = ralm("explain", held, TEXT, "--lm", tiny, "--how", how, "--when", "every:8", "--json").json
    assert data.keys() == {"tokens", "documents", "convention", "evidence"} and data["documents"]
    knn = "knn" in how
    assert all((t["p_knn"] is not None) == knn and bool(t["neighbours"]) == knn for t in data["tokens"])
    for e in data["evidence"]:
        assert 0 <= e["first"] < e["stop"] <= len(data["tokens"]) and e["query"]
        for c in e["passages"]:
            assert ralm("show", held, "--id", c["document"], "--json").json["text"][c["start"]:c["end"]] == c["quote"]


def test_text_is_readable(ralm, held, tiny):
    out = ralm("explain", held, TEXT, "--lm", tiny, "--how", KNN).out
    assert "perplexity" in out and "moon.txt" in out and "tokens supplied" in out and "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 132 and len(out.splitlines()) < 60
    assert "nats moved" in ralm("explain", held, TEXT, "--lm", tiny, "--how", "prepend:tokens=64", "--when", "every:8").out


def test_a_terminal_gets_colour(monkeypatch):
    from ralm.app import explaining

    monkeypatch.setattr(explaining, "coloured", lambda: True)
    data = {"tokens": [{"text": t, "p_lm": a, "p_knn": b, "p": c, "neighbours": []} for t, a, b, c in
                       [("up", 0.01, 0.9, 0.2), ("\ndown", 0.9, 0.0, 0.1), (" same", 0.5, 0.5, 0.5)]],
            "documents": {}, "convention": {}}
    lines = "\n".join(explaining._lines(data, ""))
    assert "\x1b[48;5;19m\x1b[97mup\x1b[0m\n\x1b[48;5;124m" in lines and " same" in lines


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.scripts, self.tags, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = dict(attrs).get("id", "js")
            self.scripts.append([self.inside, ""])

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1][1] += data


@pytest.fixture(scope="module")
def pages(held, tiny, tmp_path_factory):
    from ralm.app import cli

    out = tmp_path_factory.mktemp("pages")
    for name, how in (("knn", KNN), ("prepend", "prepend:tokens=64")):
        assert cli.main(["explain", str(held), "The <b>Moon</b> & 北京 🦩 </script> is", "--lm", tiny, "--how", how, "--when",
                         "once" if name == "knn" else "every:8", "--html", str(out / f"{name}.html"), "-q"]) == 0
    return {name: (out / f"{name}.html").read_text() for name in ("knn", "prepend")}


@pytest.mark.parametrize("name", ["knn", "prepend"])
def test_the_page_is_one_file_that_escapes_everything(pages, name):
    text = pages[name]
    page = Page(text)
    assert [s[0] for s in page.scripts] == ["data", "js"] and text.count("</script>") == 2
    assert not any({"src", "href", "onload"} & attrs.keys() for _, attrs in page.tags) and not any(t == "b" for t, _ in page.tags)
    assert not re.search(r"https?://|url\(|@import|innerHTML|document\.write", text)
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy
    data = json.loads(page.scripts[0][1])
    assert "".join(t["text"] for t in data["tokens"]) == "The <b>Moon</b> & 北京 🦩 </script> is"


DOM = r"""
class E { constructor(t) { this.tag = t; this.children = []; this.style = {}; this.on = {}; this.attrs = {}; this.tabIndex = -1;
    this.textContent = ""; this.className = ""; const set = new Set();
    this.classList = { add: x => set.add(x), remove: x => set.delete(x), contains: x => set.has(x) }; }
  append(...x) { this.children.push(...x); } replaceChildren() { this.children = []; }
  setAttribute(k, v) { this.attrs[k] = String(v); }
  addEventListener(k, f) { this.on[k] = f; } focus() { this.on.focus && this.on.focus(); }
  all() { return this.textContent + this.children.map(c => c.all()).join(" "); } }
const by = { data: new E(), text: new E(), panel: new E() };
by.data.textContent = require("fs").readFileSync(process.argv[2], "utf8");
global.document = { getElementById: id => by[id], createElement: t => new E(t) };
"""
DRIVE = r"""
const told = { first: by.panel.all(), stops: by.text.children.filter(s => s.tabIndex === 0).length,
  text: by.text.children.map(s => s.textContent).join("") };
const press = key => by.text.on.keydown({ key, preventDefault() {} });
press("ArrowRight"); told.second = by.panel.all(); press("End"); told.last = by.panel.all(); press("ArrowLeft"); press("Home");
told.home = by.panel.all(); by.text.children[2].on.mouseenter(); told.hover = by.panel.all();
by.text.children[3].on.click(); by.text.children[4].on.mouseenter(); told.held = by.panel.all();
told.selected = by.text.children.filter(s => s.attrs["aria-selected"] === "true").length;
console.log(JSON.stringify(told));
"""


@pytest.mark.parametrize("name", ["knn", "prepend"])
def test_the_page_works_with_keys_and_pointer(pages, name, tmp_path):
    """The page's own script over a document that holds what it uses; with a real engine, where there is one."""
    import shutil
    import subprocess

    node = shutil.which("node") or pytest.skip("no JavaScript engine here")
    page = Page(pages[name])
    (tmp_path / "data.json").write_text(page.scripts[0][1])
    (tmp_path / "run.js").write_text(DOM + page.scripts[1][1] + DRIVE)
    ran = subprocess.run([node, tmp_path / "run.js", tmp_path / "data.json"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    n = len(json.loads(page.scripts[0][1])["tokens"])
    assert told["text"] == "The <b>Moon</b> & 北京 🦩 </script> is"
    assert told["stops"] == told["selected"] == 1  # one stop for Tab, arrows move within
    for key, i in (("first", 1), ("second", 2), ("last", n), ("home", 1), ("hover", 3), ("held", 4)):
        assert told[key].startswith(f"Token {i} of {n}"), (key, told[key])
    assert ("moon.txt" in told["first"]) == (name == "knn") and ("Passages in force" in told["last"]) == (name == "prepend")
