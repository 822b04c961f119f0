"""Files that are one document each: plain text, Markdown, PDF, DOCX -> Page (HTML: webpage.py).

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

SIGNS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}  # elements of a DOCX that stand for a character
UNSAID = {"Fallback", "pPr", "rPr", "tblPr", "trPr", "tcPr", "sectPr", "sdtPr", "del", "moveFrom"}


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
        pages, broken, size = [], 0, 0
        for number in range(len(document)):
            try:
                pages.append(_page(document, number))
            except Exception:  # one damaged page among good ones
                pages.append("")
                broken += 1
            size += len(pages[-1])
            if size > CAP:  # a small file can show one page a million times
                raise Reason(f"is one text of more than {CAP >> 20} million characters: cut it into several files")
        about = document.get_metadata_dict(skip_empty=True)
    finally:
        document.close()
    if not any(p.strip() for p in pages):
        many = f"{len(pages)} page{'s' * (len(pages) != 1)}"
        raise Reason(f"has no text on its {many}: it is scanned or empty; run it through OCR first")
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
        text = "\n".join(_docx_lines(document.element.body))
        about = document.core_properties
        title, changed = about.title or "", about.modified
    except Exception as e:  # python-docx meets missing parts, broken XML, other kinds of zip with as many kinds of error
        raise Reason(f"is not a DOCX that can be read ({type(e).__name__}: {' '.join(str(e).split())[:160]})") from e
    if not text.strip():
        raise Reason("has no text")
    return Page(text, title.strip(), changed.date().isoformat() if changed else "")


def _docx_lines(element) -> Iterator[str]:
    """Paragraphs and table rows below an element of WordprocessingML. On the XML itself, since python-docx passes over content
    controls, tracked insertions and text boxes, and gives a merged cell once for each column it spans."""
    for child in element:
        name = _name(child)
        if name == "p":
            yield _said(child)
        elif name == "tr":
            yield "\t".join(" ".join(_docx_lines(cell)) for cell in child.iter(child.tag[:-2] + "tc") if _row_of(cell) is child)
        elif name not in UNSAID:
            yield from _docx_lines(child)


def _row_of(cell):
    """The row that a table cell is in, past any content control around it."""
    return next(a for a in cell.iterancestors() if _name(a) == "tr")


def _said(element) -> str:
    """The text of a paragraph. What was deleted is not in it (w:delText), nor the second form of a text box (mc:Fallback)."""
    parts = []
    for child in element:
        name = _name(child)
        if name == "t":
            parts.append(child.text or "")
        elif name in SIGNS:
            parts.append(SIGNS[name])
        elif name not in UNSAID:
            parts.append(f"\n{_said(child)}" if name == "p" else _said(child))
    return "".join(parts)


def _name(element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


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
