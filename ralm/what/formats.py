"""Files that are one document each: plain text, Markdown, HTML, PDF, DOCX -> Page.

The text of a Page is the document's text from then on: all character offsets count in it. Plain text keeps every character
(line ends too); a PDF's pages are joined by form feeds, so the page of offset i is text.count("\\f", 0, i) + 1."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from ralm.errors import need
from ralm.what.stream import BLOCK, CAP, RATIO, Reason, decode

HTML_CAP = 4 << 20  # bytes of HTML that the article extractor is given: its time grows faster than the page
DEEP = 200  # levels of nesting likewise
BLOCKS = {"p", "div", "li", "tr", "br", "h1", "h2", "h3", "h4", "h5", "h6", "table", "section", "article", "ul", "ol", "dl", "dt",
          "dd", "pre", "blockquote", "hr", "header", "footer", "nav", "main", "aside", "figure", "figcaption", "title", "option"}
DATES = ("article:published_time", "datepublished", "date", "dc.date", "dcterms.date")  # names of meta elements, best first
UNSEEN = {"script", "style", "noscript", "template", "head", "svg", "iframe", "object"}


@dataclass(frozen=True, slots=True)
class Page:
    """What a file says, and what to tell the user about how it was read."""

    text: str
    title: str = ""
    date: str = ""
    licence: str = ""
    remark: str = ""


def plain(data: bytes) -> Page:
    text, remark = decode(data)
    return Page(text, remark=remark)


def markdown(data: bytes) -> Page:
    """Markdown as it is; its first heading of the first level is its title."""
    text, remark = decode(data)
    heading = re.search(r"^#[ \t]+([^\r\n]*[^\s#])[ \t#]*$", text[:1 << 16].replace("\r\n", "\n"), re.MULTILINE)
    return Page(text, heading[1].strip() if heading else "", remark=remark)


# ---- HTML ---------------------------------------------------------------------------------------------------------------


def html(data: bytes) -> Page:
    """The article of a page, as trafilatura finds it; where it finds next to nothing, all visible text, with a remark."""
    trafilatura = need("trafilatura", "reading HTML", "files")
    need("lxml.html", "reading HTML", "files")
    declared = re.search(rb"<meta[^>]{0,200}?charset\s{0,9}=\s{0,9}[\"']?([\w.:-]{1,40})", data[:4096], re.IGNORECASE)
    text, remark = decode(data, declared[1].decode("ascii", "replace") if declared else "")
    tree = _tree(text)
    if tree is None:
        raise Reason("has no HTML in it")
    title, date, licence, depth = _head(tree)
    everything = _visible(tree)
    article, why = "", f"has more than {HTML_CAP >> 20} MB of HTML"
    if depth > DEEP:
        why = f"is nested more than {DEEP} levels deep"
    elif len(text) <= HTML_CAP:
        why = "has no article that trafilatura finds"
        try:
            article = trafilatura.extract(tree, include_comments=False, include_tables=True, favor_recall=True) or ""
        except Exception as e:  # it meets every malformed page of the web; the page's text is still there
            why = f"makes trafilatura fail ({type(e).__name__})"
    if len(article) * 20 < len(everything) or not article.strip():
        if not everything.strip():
            raise Reason("has no visible text")
        article, remark = everything, "; ".join(filter(None, (remark, f"{why}: kept all visible text")))
    return Page(article, title, date, licence, remark)


def _tree(text: str):
    from lxml import etree
    from lxml import html as lxml_html

    parser = lxml_html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=False)
    try:  # as bytes: lxml refuses text that declares an encoding
        return lxml_html.document_fromstring(text.encode("utf-8"), parser=parser)
    except (etree.LxmlError, ValueError, AssertionError):
        return None


def _head(tree) -> tuple[str, str, str, int]:
    """(title, date, licence, depth of nesting) as the page states them."""
    title = " ".join("".join(t.itertext()) for t in tree.iter("title")).split()
    meta = {}
    for m in tree.iter("meta"):
        name = (m.get("property") or m.get("name") or m.get("itemprop") or "").lower()
        meta.setdefault(name, (m.get("content") or "").strip())
    date = next((meta[n] for n in DATES if meta.get(n)), "")
    licence = next((a.get("href") or "" for a in tree.iter("link", "a") if "license" in (a.get("rel") or "").lower().split()), "")
    depth = deepest = 0
    from lxml import etree

    for event, _ in etree.iterwalk(tree, events=("start", "end")):
        depth += 1 if event == "start" else -1
        deepest = max(deepest, depth)
    return " ".join(title) or meta.get("og:title", ""), date if re.match(r"\d{4}-\d\d(-\d\d)?", date) else "", licence, deepest


def _visible(tree) -> str:
    """All text of a page that a reader would see, a line a block, without recursion."""
    from lxml import etree

    out: list[str] = []
    hidden = 0
    for event, element in etree.iterwalk(tree, events=("start", "end")):
        name = element.tag if isinstance(element.tag, str) else ""
        if name in UNSEEN:
            hidden += 1 if event == "start" else -1
        if name in BLOCKS:
            out.append("\n")
        elif name in ("td", "th") and event == "end":
            out.append("\t")
        text = element.text if event == "start" else element.tail
        if text and not hidden:
            out.append(text if "\n" not in text else re.sub(r"\s*\n\s*", " ", text))
    kept = (" ".join(line.split(" ")).strip() for line in "".join(out).split("\n"))
    return "\n".join(line for line in kept if line)


# ---- PDF ----------------------------------------------------------------------------------------------------------------


def pdf(file: str | bytes) -> Page:
    """The text layer of a PDF, page by page. Raises Reason for one that is encrypted, damaged, or only pictures."""
    pdfium = need("pypdfium2", "reading PDF", "pdf")
    try:
        document = pdfium.PdfDocument(file)
    except Exception as e:
        if "password" in str(e).lower():
            raise Reason("is protected by a password: save it without one") from e
        raise Reason(f"is not a PDF that can be read ({str(e) or type(e).__name__})") from e
    try:
        pages, broken = [], 0
        for number in range(len(document)):
            try:
                pages.append(_page(document, number))
            except Exception:  # one damaged page among good ones
                pages.append("")
                broken += 1
        about = document.get_metadata_dict(skip_empty=True)
    finally:
        document.close()
    if not any(p.strip() for p in pages):
        raise Reason(f"has {len(pages)} pages without text: it is scanned or empty; run it through OCR first")
    remark = f"{broken} of its {len(pages)} pages are damaged and left empty" if broken else ""
    return Page("\f".join(pages), about.get("Title", "").strip(), _pdf_date(about), remark=remark)


def _page(document, number: int) -> str:
    page = document[number]
    try:
        words = page.get_textpage()
        try:
            text = words.get_text_range(errors="replace")
        finally:
            words.close()
    finally:
        page.close()
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n").replace("\0", "")
    return re.sub("[\ufffe\u0002]\n?", "", text)  # how pdfium writes a hyphen at the end of a line


def _pdf_date(about: dict[str, str]) -> str:
    """D:20240131120000+01'00' -> 2024-01-31."""
    stated = re.match(r"(?:D:)?(\d{4})(\d\d)(\d\d)", about.get("ModDate") or about.get("CreationDate") or "")
    return "-".join(stated.groups()) if stated else ""


# ---- DOCX ---------------------------------------------------------------------------------------------------------------


def docx(data: bytes) -> Page:
    """Paragraphs and tables (a line a row, cells apart by tabs) in the order of the document."""
    library = need("docx", "reading DOCX", "files")
    _check_zip(data)
    try:
        document = library.Document(io.BytesIO(data))
        text = "\n".join(_docx_lines(document, 0))
        about = document.core_properties
        title, changed = about.title or "", about.modified
    except Exception as e:  # python-docx meets missing parts, broken XML, other kinds of zip with as many kinds of error
        raise Reason(f"is not a DOCX that can be read ({type(e).__name__}: {' '.join(str(e).split())[:160]})") from e
    if not text.strip():
        raise Reason("has no text")
    return Page(text, title.strip(), changed.date().isoformat() if changed else "")


def _docx_lines(part, level: int) -> Iterator[str]:
    for block in part.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                cells = {id(c._tc): c for c in row.cells}.values()  # a merged cell comes once for each column it spans
                yield "\t".join(" ".join(_docx_lines(c, level + 1)) if level < 20 else c.text for c in cells)
        else:
            yield block.text


def _check_zip(data: bytes) -> None:
    """Refuse what would unpack to more than CAP, by what it declares and by what it really gives."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            limit = min(CAP, max(64 << 20, RATIO * len(data)))
            declared = sum(m.file_size for m in archive.infolist())
            given = 0
            for member in archive.infolist() if declared <= limit else ():
                with archive.open(member) as stream:
                    while given <= limit and (block := stream.read(BLOCK)):
                        given += len(block)
    except Exception as e:  # BadZipFile, zlib.error, RuntimeError (encrypted), NotImplementedError (compression), struct.error ...
        raise Reason(f"is not a DOCX: {' '.join(str(e).split()) or type(e).__name__}") from e
    if max(declared, given) > limit:
        raise Reason(f"unpacks to {max(declared, given) >> 20} MB: it looks like a zip bomb")
