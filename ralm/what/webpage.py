"""HTML -> Page: the article of a web page, or visibly all of its text.

One pass of lxml's event parser sees the whole page whatever its nesting (its tree parser drops what is deeper than 256 elements).
Where the page itself says which part is the article (its only <article>, or its <main>), and that part holds most of the text that
is not navigation, it is taken as it stands. Otherwise trafilatura looks for the article, in pages of a size and depth that it
handles in a second or so: its guess costs ten times as much as everything else."""

from __future__ import annotations

import re

from ralm.errors import need
from ralm.what.formats import Page
from ralm.what.stream import Reason, decode

LARGEST = 3_000_000  # elements of a page that is read at all: a hundred bytes may unpack to as many
BYTES, ELEMENTS, DEPTH = 4 << 20, 20_000, 200  # most that trafilatura is given: its time grows with their square
BLOCKS = {"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "table", "section", "article", "ul", "ol", "dl", "dt",
          "dd", "pre", "blockquote", "hr", "header", "footer", "nav", "main", "aside", "figure", "figcaption", "body"}
UNSEEN = {"script", "style", "noscript", "template", "head", "svg", "iframe", "object", "select", "datalist"}
BESIDE = {"nav", "aside", "footer", "form", "button", "menu", "dialog"}  # no part of an article, wherever they are,
ROLES = {"navigation", "complementary", "contentinfo", "search", "banner"}  # nor what has these roles
MOST = 0.6  # of the text that is not beside: as much must be in the part that a page calls its article
SPACES = re.compile(r"[ \r\f]{2,}")
BLOCK, HIDDEN, ASIDE, CODE, CELL, REGION = 1, 2, 4, 8, 16, 32
KIND = {tag: BLOCK * (tag in BLOCKS) | HIDDEN * (tag in UNSEEN) | ASIDE * (tag in BESIDE) | CODE * (tag == "pre")
        | CELL * (tag in ("td", "th")) | REGION * (tag in ("article", "main")) for tag in {*BLOCKS, *UNSEEN, *BESIDE, "td", "th"}}
DATES = ("article:published_time", "datepublished", "date", "dc.date", "dcterms.date")  # names of meta elements, best first


def html(data: bytes) -> Page:
    """Title, date and licence as the page states them. Raises Reason where it shows no text."""
    trafilatura = need("trafilatura", "reading HTML", "files")
    etree = need("lxml.etree", "reading HTML", "files")
    declared = re.search(rb"<meta[^>]{0,200}?charset\s{0,9}=\s{0,9}[\"']?([\w.:-]{1,40})", data[:4096], re.IGNORECASE)
    text, remark = decode(data, declared[1].decode("ascii", "replace") if declared else "")
    data = text.encode("utf-8")  # as bytes: lxml refuses text that declares an encoding
    try:
        seen = etree.fromstring(data, etree.HTMLParser(target=_Seen(), encoding="utf-8"))
    except (etree.LxmlError, ValueError) as e:
        raise Reason("has no HTML in it") from e
    everything = seen.text()
    article, why = seen.article(), "has no article that trafilatura finds"
    if article:
        pass
    elif len(data) > BYTES or seen.elements > ELEMENTS or seen.deepest > DEPTH:
        why = f"is too large or too deep for trafilatura ({len(data):,} bytes, {seen.elements:,} elements, {seen.deepest:,} levels)"
    elif everything:
        try:
            lxml_html = need("lxml.html", "reading HTML", "files")
            tree = lxml_html.document_fromstring(data, lxml_html.HTMLParser(encoding="utf-8"))  # whatever its meta element says
            article = trafilatura.extract(tree, include_comments=False, include_tables=True, favor_recall=True) or ""
        except Exception as e:  # it meets every malformed page of the web; the page's text is still there
            why = f"makes trafilatura fail ({type(e).__name__})"
    if not everything and not article.strip():
        raise Reason("has no visible text")
    if len(article) * 20 < len(everything):
        article, remark = everything, "; ".join(filter(None, (remark, f"{why}: all its visible text is kept")))
    return Page(article, seen.title(), seen.date(), seen.licence, remark)


class _Seen:
    """What the event parser tells: visible text, a line a block, and what the page says about itself.

    Called for every element of every page: `out` has all pieces of text, and `marks` where what they are part of changes."""

    def __init__(self):
        self.out: list[str] = []
        self.regions: list[tuple[int, str]] = []  # (depth, "article", "main" or "beside") of what is open
        self.marks: list[tuple[int, frozenset[str]]] = [(0, frozenset())]  # (from this piece on, what it is in)
        self.count = {"main": 0, "article": 0, "beside": 0}  # without those within another of their kind (comments, say)
        self.names: list[str] = []
        self.meta: dict[str, str] = {}
        self.licence, self.elements, self.depth, self.deepest, self.hidden, self.titled = "", 0, 0, 0, 0, False
        self.code = 0  # open <pre>

    def start(self, tag: str, attributes) -> None:
        self.elements += 1
        if self.elements > LARGEST:
            raise Reason(f"has more than {LARGEST:,} elements: cut it into several files")
        self.depth += 1
        if self.depth > self.deepest:
            self.deepest = self.depth
        kind = KIND.get(tag, 0)
        if kind & BLOCK:
            self.out.append("\n")
        self.hidden += kind & HIDDEN
        self.code += kind & CODE
        self.titled = tag == "title"
        role = attributes["role"] if attributes and "role" in attributes else ""
        if kind & (ASIDE | REGION) or role:
            here = "beside" if kind & ASIDE or role in ROLES else tag if kind & REGION else role
            if here in self.count and not any(h == here for _, h in self.regions):
                self.count[here] += 1
                self.regions.append((self.depth, here))
                self._mark()
        if tag == "meta":
            name = attributes.get("property") or attributes.get("name") or attributes.get("itemprop") or ""
            self.meta.setdefault(name.lower(), (attributes.get("content") or "").strip())
        elif tag in ("a", "link") and not self.licence and "license" in (attributes.get("rel") or "").lower().split():
            self.licence = attributes.get("href") or ""

    def end(self, tag: str) -> None:
        kind = KIND.get(tag, 0)
        if kind & (BLOCK | CELL):
            self.out.append("\n" if kind & BLOCK else "\t")
        self.hidden -= kind & HIDDEN
        self.code -= kind & CODE
        self.titled = False
        if self.regions and self.regions[-1][0] >= self.depth:
            while self.regions and self.regions[-1][0] >= self.depth:
                self.regions.pop()
            self._mark()
        self.depth -= 1

    def data(self, text: str) -> None:
        if self.titled:
            self.names.append(text)
        elif not self.hidden:
            # a line of code keeps its spaces: NUL, of which there is none in the page, marks where one begins
            self.out.append(text.replace("\n", "\n\0") if self.code else text.replace("\n", " "))

    def _mark(self) -> None:
        self.marks.append((len(self.out), frozenset(here for _, here in self.regions)))

    def close(self) -> _Seen:
        return self

    def text(self) -> str:
        return _lines(self.out)

    def article(self) -> str:
        """What the page calls its article, "" where it does not or where that is not most of the text."""
        ends = [at for at, _ in self.marks[1:]] + [len(self.out)]
        parts = [(self.out[at:end], inside) for (at, inside), end in zip(self.marks, ends) if "beside" not in inside]
        sizes = [sum(map(len, pieces)) for pieces, _ in parts]
        for name in ("article", "main"):
            if self.count[name] == 1 and sum(n for n, (_, inside) in zip(sizes, parts) if name in inside) >= MOST * sum(sizes):
                return _lines([piece for pieces, inside in parts if name in inside for piece in pieces])
        return ""

    def title(self) -> str:
        return " ".join("".join(self.names).split()) or self.meta.get("og:title", "")

    def date(self) -> str:
        stated = next((self.meta[n] for n in DATES if self.meta.get(n)), "")
        return stated if re.match(r"\d{4}-\d\d", stated) else ""


def _lines(pieces: list[str]) -> str:
    lines = (line[1:].rstrip() if line.startswith("\0") else _tidy(line.strip()) for line in "".join(pieces).split("\n"))
    return "\n".join(line for line in lines if line).replace("\0", "")


def _tidy(line: str) -> str:
    return SPACES.sub(" ", line) if "  " in line else line
