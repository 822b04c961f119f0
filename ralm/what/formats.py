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
