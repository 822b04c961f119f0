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

BYTES, ELEMENTS, DEPTH = 4 << 20, 20_000, 200  # most that trafilatura is given: its time grows with their square
BLOCKS = {"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "table", "section", "article", "ul", "ol", "dl", "dt",
          "dd", "pre", "blockquote", "hr", "header", "footer", "nav", "main", "aside", "figure", "figcaption", "body"}
UNSEEN = {"script", "style", "noscript", "template", "head", "svg", "iframe", "object", "select", "datalist"}
BESIDE = {"nav", "aside", "footer", "form", "button", "menu", "dialog"}  # no part of an article, wherever they are,
ROLES = {"navigation", "complementary", "contentinfo", "search", "banner"}  # nor what has these roles
MOST = 0.6  # of the text that is not beside: as much must be in the part that a page calls its article
SPACE = re.compile(r"[ \t\n\r\f]+")
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
    """What the event parser tells: visible text, a line a block, and what the page says about itself."""

    def __init__(self):
        self.out: list[str] = []
        self.parts: dict[str, list[str]] = {"body": [], "main": [], "article": []}  # what is not beside: all, and what is in them
        self.open: list[tuple[str, int]] = []  # (part, depth) of open elements that are one
        self.count = {"main": 0, "article": 0}  # those within another of their kind (comments to an article) not counted
        self.names: list[str] = []
        self.meta: dict[str, str] = {}
        self.licence, self.elements, self.depth, self.deepest, self.hidden, self.titled = "", 0, 0, 0, 0, False
        self.beside, self.apart, self.code = 0, [], 0  # open elements: with such a tag; depths of those with such a role; <pre>

    def start(self, tag: str, attributes) -> None:
        self.elements += 1
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        self.hidden += tag in UNSEEN
        self.beside += tag in BESIDE
        self.code += tag == "pre"
        self.titled = tag == "title"
        role = attributes.get("role") if attributes else None
        if role in ROLES:
            self.apart.append(self.depth)
        part = tag if tag in ("main", "article") else role if role in ("main", "article") else ""
        if part:
            nested = any(p == part for p, _ in self.open)
            self.count[part] += not nested
            if not nested:
                self.open.append((part, self.depth))
        if tag in BLOCKS:
            self._say("\n")
        elif tag == "meta":
            name = attributes.get("property") or attributes.get("name") or attributes.get("itemprop") or ""
            self.meta.setdefault(name.lower(), (attributes.get("content") or "").strip())
        elif tag in ("a", "link") and not self.licence and "license" in (attributes.get("rel") or "").lower().split():
            self.licence = attributes.get("href") or ""

    def end(self, tag: str) -> None:
        if tag in BLOCKS:
            self._say("\n")
        elif tag in ("td", "th"):
            self._say("\t")
        while self.open and self.open[-1][1] >= self.depth:
            self.open.pop()
        while self.apart and self.apart[-1] >= self.depth:
            self.apart.pop()
        self.depth -= 1
        self.hidden -= tag in UNSEEN
        self.beside -= tag in BESIDE
        self.code -= tag == "pre"
        self.titled = False

    def data(self, text: str) -> None:
        if self.titled:
            self.names.append(text)
        elif not self.hidden:
            # a line of code keeps its spaces: NUL, of which there is none in the page, marks where one begins
            self._say(text.replace("\n", "\n\0") if self.code else SPACE.sub(" ", text))

    def _say(self, text: str) -> None:
        self.out.append(text)
        if not self.beside and not self.apart:
            self.parts["body"].append(text)
            for part, _ in self.open:
                self.parts[part].append(text)

    def close(self) -> _Seen:
        return self

    def text(self) -> str:
        return _lines(self.out)

    def article(self) -> str:
        """What the page calls its article, "" where it does not or where that is not most of the text."""
        size = sum(map(len, self.parts["body"]))
        for part in ("article", "main"):
            if self.count[part] == 1 and sum(map(len, self.parts[part])) >= MOST * size:
                return _lines(self.parts[part])
        return ""

    def title(self) -> str:
        return " ".join("".join(self.names).split()) or self.meta.get("og:title", "")

    def date(self) -> str:
        stated = next((self.meta[n] for n in DATES if self.meta.get(n)), "")
        return stated if re.match(r"\d{4}-\d\d", stated) else ""


def _lines(pieces: list[str]) -> str:
    lines = (line[1:].rstrip() if line.startswith("\0") else line.strip() for line in "".join(pieces).split("\n"))
    return "\n".join(line for line in lines if line).replace("\0", "")
