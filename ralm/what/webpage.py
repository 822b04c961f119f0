"""HTML -> Page: the article of a web page, or visibly all of its text.

One pass of lxml's event parser sees the whole page whatever its nesting (its tree parser drops what is deeper than 256 elements);
trafilatura then looks for the article in pages of a size and depth that it handles in a second or so."""

from __future__ import annotations

import re

from ralm.errors import need
from ralm.what.formats import Page
from ralm.what.stream import Reason, decode

BYTES, ELEMENTS, DEPTH = 4 << 20, 20_000, 200  # most that trafilatura is given: its time grows with their square
BLOCKS = {"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "table", "section", "article", "ul", "ol", "dl", "dt",
          "dd", "pre", "blockquote", "hr", "header", "footer", "nav", "main", "aside", "figure", "figcaption", "body"}
UNSEEN = {"script", "style", "noscript", "template", "head", "svg", "iframe", "object", "select", "datalist"}
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
    article, why = "", "has no article that trafilatura finds"
    if len(data) > BYTES or seen.elements > ELEMENTS or seen.deepest > DEPTH:
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
        self.names: list[str] = []
        self.meta: dict[str, str] = {}
        self.licence, self.elements, self.depth, self.deepest, self.hidden, self.titled = "", 0, 0, 0, 0, False

    def start(self, tag: str, attributes) -> None:
        self.elements += 1
        self.depth += 1
        self.deepest = max(self.deepest, self.depth)
        self.hidden += tag in UNSEEN
        self.titled = tag == "title"
        if tag in BLOCKS:
            self.out.append("\n")
        elif tag == "meta":
            name = attributes.get("property") or attributes.get("name") or attributes.get("itemprop") or ""
            self.meta.setdefault(name.lower(), (attributes.get("content") or "").strip())
        elif tag in ("a", "link") and not self.licence and "license" in (attributes.get("rel") or "").lower().split():
            self.licence = attributes.get("href") or ""

    def end(self, tag: str) -> None:
        self.depth -= 1
        self.hidden -= tag in UNSEEN
        self.titled = False
        if tag in BLOCKS:
            self.out.append("\n")
        elif tag in ("td", "th"):
            self.out.append("\t")

    def data(self, text: str) -> None:
        if self.titled:
            self.names.append(text)
        elif not self.hidden:
            self.out.append(" ".join(text.split("\n")))

    def close(self) -> _Seen:
        return self

    def text(self) -> str:
        lines = (line.strip() for line in "".join(self.out).split("\n"))
        return "\n".join(line for line in lines if line)

    def title(self) -> str:
        return " ".join("".join(self.names).split()) or self.meta.get("og:title", "")

    def date(self) -> str:
        stated = next((self.meta[n] for n in DATES if self.meta.get(n)), "")
        return stated if re.match(r"\d{4}-\d\d", stated) else ""
