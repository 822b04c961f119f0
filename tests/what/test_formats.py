"""Text, Markdown, PDF and DOCX files: exact text, what is stated about it, and a reason for every broken one."""

import io
import zipfile

import docx
import pypdfium2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ralm.what import formats
from ralm.what.read import read
from ralm.what.stream import Reason, clean, decode


def pdf_bytes(pages, title="", flate=False):
    """A valid PDF written by hand: one line of Latin text per entry of a page, None for a page without any."""
    import zlib
    n = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(n))
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {n}>>",
               "<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"]
    for i, lines in enumerate(pages):
        shown = "".join(f"1 0 0 1 72 {740 - 16 * y} Tm ({line}) Tj\n" for y, line in enumerate(lines or ()))
        content = f"BT /F1 12 Tf {shown}ET" if lines else "0 0 10 10 re f"
        body = content.encode("cp1252")
        packed = zlib.compress(body) if flate else body
        look = "MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/{look}/Contents {5 + 2 * i} 0 R>>")
        how = "/Filter/FlateDecode" if flate else ""
        objects.append(f"<</Length {len(packed)}{how}>>stream\n".encode() + packed + b"\nendstream")
    objects.append(f"<</Title({title})/ModDate(D:20240131120000+01'00')>>")
    out, places = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, io.SEEK_END)
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj".encode() + (body if isinstance(body, bytes) else body.encode("cp1252")) + b"\nendobj\n")
    start = out.tell()
    table = "".join(f"{p:010} 00000 n \n" for p in places)
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}".encode())
    out.write(f"trailer<</Size {len(objects) + 1}/Root 1 0 R/Info {len(objects)} 0 R>>\nstartxref\n{start}\n%%EOF".encode())
    return out.getvalue()


def docx_bytes(build, title=""):
    document = docx.Document()
    build(document)
    document.core_properties.title = title
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


# ---- text ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\r\t"), min_size=1, max_size=60),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"]))
def test_plain_text_is_exact_in_every_unicode_encoding(text, encoding):
    if text[0] == "\ufeff":
        text = "x" + text
    data = text.encode(encoding)
    if encoding == "utf-16-be":
        data = b"\xfe\xff" + data
    assert formats.plain(data) == formats.Page(text)


def test_other_encodings_are_said(tmp_path):
    page = formats.plain("naïve café – “quoted”".encode("cp1252"))
    assert page.text == "naïve café – “quoted”" and "not UTF-8 (byte 2): read as cp1252" in page.remark
    assert decode(b"caf\xe9 \x81")[0] == "caf\xe9 \x81"
    assert decode("привет".encode("koi8-r"), "koi8-r") == ("привет", "")
    assert decode("caf\xe9".encode("cp1252"), "unicode_escape")[1]  # a codec that is no encoding of text


@pytest.mark.parametrize("data", [b"a\0b", bytes(range(1, 32)) * 9, b"\xff\xfea", b"\xff\xfe\0\xd8", b"\xff\xfe\0\0abc"])
def test_binary_is_refused(data):
    with pytest.raises(Reason, match=r"binary|is not valid"):
        formats.plain(data)


@given(st.text(st.characters() | st.characters(categories=["Cs"])))
def test_clean_keeps_all_but_lone_surrogates(text):
    cleaned = clean(text)
    cleaned.encode("utf-8")
    assert cleaned == text or any("\ud800" <= c <= "\udfff" for c in text)


def test_markdown_title():
    assert formats.markdown(b"---\na: b\n---\n\n# The Title #\r\n\n# Other\n").title == "The Title"
    assert formats.markdown(b"## Second level\n#hashtag\ntext").title == ""
    assert formats.markdown(b"# Only\ntext").text == "# Only\ntext"


# ---- PDF ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flate", [False, True])
def test_pdf_pages_are_joined_by_form_feeds(tmp_path, flate):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf_bytes([["First page, line one", "line two"], None, ["Third café"]], "A Title", flate))
    [d] = read(path, strict=True)
    assert d.text == "First page, line one\nline two\f\fThird café"
    assert (d.title, d.date, d.source) == ("A Title", "2024-01-31", str(path))
    assert d.text.count("\f", 0, d.text.index("Third")) + 1 == 3
    assert formats.pdf(path.read_bytes()).text == d.text


def test_pdf_made_by_pdfium_itself(tmp_path):
    document = pypdfium2.PdfDocument.new()
    document.new_page(200, 200)
    document.save(tmp_path / "scan.pdf")
    with pytest.raises(Reason, match=r"no text on its 1 page: .*OCR"):
        formats.pdf(str(tmp_path / "scan.pdf"))


def test_broken_pdfs_give_reasons():
    whole = pdf_bytes([["text here"]])
    for data in (b"", b"%PDF-1.4", whole[:60], b"\x93random" * 40, b"<html>no pdf</html>"):
        with pytest.raises(Reason, match="is not a PDF that can be read"):
            formats.pdf(data)
    locked = whole.replace(b"trailer<<", b"trailer<</Encrypt<</Filter/Standard/V 1/R 2/O(" + b"x" * 32 + b")/U(" + b"y" * 32
                           + b")/P -4>>/ID[(12345678901234567)(12345678901234567)]")
    with pytest.raises(Reason, match="password"):
        formats.pdf(locked)


# ---- DOCX ---------------------------------------------------------------------------------------------------------------


def test_docx_paragraphs_and_tables_in_order(tmp_path):
    def build(document):
        document.add_heading("Heading", 1)
        document.add_paragraph("Before the table, with a tab\tand café.")
        table = document.add_table(2, 2)
        for n, text in enumerate(("a", "b", "c", "d")):
            table.cell(n // 2, n % 2).text = text
        table.cell(0, 0).merge(table.cell(0, 1))
        inner = table.cell(1, 1).add_table(1, 1)
        inner.cell(0, 0).text = "nested"
        document.add_paragraph("After.")

    path = tmp_path / "a.docx"
    path.write_bytes(docx_bytes(build, "Its Title"))
    [d] = read(path, strict=True)
    assert d.title == "Its Title"
    assert d.text.split("\n")[:2] == ["Heading", "Before the table, with a tab\tand café."] and d.text.endswith("After.")
    assert "\na b\nc\td nested\nAfter." in d.text.replace(" \n", "\n")


def test_docx_keeps_what_is_inserted_or_in_controls_and_drops_what_is_deleted():
    body = ('<w:p><w:r><w:t>one </w:t></w:r><w:ins w:id="1"><w:r><w:t>inserted </w:t></w:r></w:ins>'
            '<w:del w:id="2"><w:r><w:delText>deleted</w:delText></w:r></w:del>'
            '<w:sdt><w:sdtContent><w:r><w:t>chosen</w:t><w:br/><w:t>a-b</w:t></w:r></w:sdtContent></w:sdt></w:p>'
            '<w:sdt><w:sdtContent><w:p><w:r><w:t>in a control</w:t></w:r></w:p></w:sdtContent></w:sdt>'
            '<w:tbl><w:tr><w:tc><w:tcPr><w:gridSpan w:val="1000000000"/></w:tcPr><w:p><w:r><w:t>wide</w:t></w:r></w:p>'
            '</w:tc></w:tr></w:tbl>')
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(docx_bytes(lambda d: None))) as source, zipfile.ZipFile(out, "w") as archive:
        for member in source.infolist():
            data = source.read(member)
            if member.filename == "word/document.xml":
                data = data.replace(b"<w:body>", b"<w:body>" + body.encode())
            archive.writestr(member.filename, data)
    assert formats.docx(out.getvalue()).text.rstrip().split("\n") == ["one inserted chosen", "a-b", "in a control", "wide"]


def test_broken_docx_give_reasons():
    whole = docx_bytes(lambda d: d.add_paragraph("text"))
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a.txt", "no docx")
    for data in (b"", b"PK\x03\x04", whole[:-30], whole[:200], b"\x93random" * 40, other.getvalue()):
        with pytest.raises(Reason, match="is not a DOCX"):
            formats.docx(data)
    with pytest.raises(Reason, match="has no text"):
        formats.docx(docx_bytes(lambda d: None))


def test_docx_bombs(monkeypatch):
    whole = docx_bytes(lambda d: d.add_paragraph("text"))
    out = io.BytesIO(whole)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/media/zeros.bin", b"\0" * (90 << 20))
    with pytest.raises(Reason, match="zip bomb"):
        formats.docx(out.getvalue())
    liar = bytearray(out.getvalue())  # the same, declaring a small size in its directory
    at = liar.rindex(b"word/media/zeros.bin") - 46
    liar[at + 24:at + 28] = (1000).to_bytes(4, "little")
    with pytest.raises(Reason, match=r"is not a DOCX|zip bomb"):
        formats.docx(bytes(liar))
    deep = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(deep, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in source.infolist():
            data = source.read(member)
            if member.filename == "word/document.xml":
                data = data.replace(b"<w:body>", b"<w:body>" + b"<w:p>" * 100_000)
                data = data.replace(b"</w:body>", b"</w:p>" * 100_000 + b"</w:body>")
            archive.writestr(member.filename, data)
    with pytest.raises(Reason, match="is not a DOCX that can be read"):
        formats.docx(deep.getvalue())
