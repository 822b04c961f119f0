"""Web pages: the article where there is one, visibly all text where there is none, whatever the markup."""

import time

import pytest

from ralm import progress
from ralm.what.read import read
from ralm.what.stream import Reason
from ralm.what.webpage import html

SENTENCE = "This is a sentence of the article, number {}, long enough to count as text. "
ARTICLE = "".join(f"<p>{SENTENCE.format(i) * 2}</p>" for i in range(20))
PAGE = (f"<!DOCTYPE html><html><head><title>The  Title</title><meta property='article:published_time' content='2023-04-05T06:07'>"
        f"<link rel='license' href='https://creativecommons.org/licenses/by/4.0/'><script>var secret = 1</script></head><body><nav>"
        f"{'<a href=x>Menu entry</a> ' * 30}</nav><article><h1>Heading</h1>{ARTICLE}"
        f"<select>{'<option>a choice</option>' * 90}</select><table><tr><td>left</td><td>right</td></tr></table>"
        f"</article><footer>Copyright notice</footer></body></html>")


def test_article_without_the_menu():
    page = html(PAGE.encode())
    assert "number 19" in page.text and "Menu entry" not in page.text and "secret" not in page.text and "left" in page.text
    assert (page.title, page.date, page.licence) == ("The Title", "2023-04-05T06:07", "https://creativecommons.org/licenses/by/4.0/")
    assert page.remark == ""


def test_a_page_without_an_article_keeps_all_visible_text_and_says_so(tmp_path):
    links = "".join(f"<li><a href='{i}'>Entry {i}</a></li>" for i in range(2000))
    head = "<head><title>Index</title><style>p {}</style></head>"
    (tmp_path / "index.html").write_text(f"<html>{head}<body><nav>{links}</nav><article>{ARTICLE[:300]}</article></body></html>")
    notes = []
    sink = progress.Silent()
    sink.note = notes.append
    progress.use(sink)
    try:
        [d] = read(tmp_path, strict=True)
    finally:
        progress.use(progress.Silent())
    assert d.text.startswith("Entry 0\nEntry 1\n") and "Entry 1999\nThis is a sentence" in d.text and d.title == "Index"
    assert len(notes) == 1 and "all its visible text is kept" in notes[0]


@pytest.mark.parametrize(("encoding", "text"), [
    ("shift_jis", "日本語のテキストです。これは長い文章です。"), ("koi8-r", "Это довольно длинный текст"),
    ("utf-16", "Ein Text über Bäume"), ("utf-8-sig", "Ein Text über Bäume")])
def test_declared_encodings(encoding, text):
    head = f"<head><meta charset='{encoding}'><title>{text}</title></head>"
    page = html(f"<html>{head}<body><p>{text}</p></body></html>".encode(encoding))
    assert page.text.strip() == text and page.title == text and page.remark == ""


def test_xml_declaration_and_undeclared_encoding():
    page = html('<?xml version="1.0" encoding="iso-8859-1"?><html><body><p>café and more text</p></body></html>'.encode("latin-1"))
    assert page.text == "café and more text" and "cp1252" in page.remark


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"<script>x = 1</script>", b"\0\1", b"<!--" * 1000, b"   "])
def test_nothing_to_see(data):
    with pytest.raises(Reason):
        html(data)


@pytest.mark.parametrize("data", [
    b"<div>" * 100_000 + b"deep text", b"<b><i>" * 30_000 + b"deep text", b"<table><tr><td>" * 5000 + b"deep text",
    b"<br>" * 150_000 + b"deep text", b"<p " + b"a=1 " * 100_000 + b">deep text</p>", b"<" * 200_000 + b"p>deep text",
    b"<p>deep text" + b"&amp;" * 100_000])
def test_hostile_markup_neither_hangs_nor_loses_text(data):
    start = time.perf_counter()
    page = html(data)
    assert "deep text" in page.text
    assert time.perf_counter() - start < 30


def test_there_is_an_end_to_elements(monkeypatch):
    monkeypatch.setattr("ralm.what.webpage.LARGEST", 1000)
    assert "deep text" in html(b"<p>deep text" * 900).text
    with pytest.raises(Reason, match="more than 1,000 elements"):
        html(b"<p>deep text" * 1100)


def test_text_before_and_after_a_deep_part_is_kept():
    page = html(b"<p>before</p>" + b"<div>" * 3000 + b"inside" + b"</div>" * 3000 + b"<p>after</p>")
    assert page.text.split("\n") == ["before", "inside", "after"] and "3,002 levels" in page.remark


STATED = ("<body><header>Site name</header><nav>Menu entry</nav><div{role}><{tag}><h1>Heading</h1><p>One   two\n three <b>four</b> "
          "five.</p><aside>See also</aside><div role=navigation>Next page</div><pre>def f():\n    return  1\n</pre><table><tr>"
          "<td>a</td><td>b</td></tr></table></{tag}></div><footer>Copyright</footer></body>")


@pytest.mark.parametrize(("tag", "role"), [("article", ""), ("main", ""), ("section", " role='main'"), ("div", ' role="article"')])
def test_the_part_that_a_page_calls_its_article_is_taken_as_it_stands(tag, role, monkeypatch):
    import trafilatura

    monkeypatch.setattr(trafilatura, "extract", lambda *args, **kwargs: pytest.fail("the page has said what its article is"))
    page = html(STATED.format(tag=tag, role=role).encode())
    assert page.text == "Heading\nOne two three four five.\ndef f():\n    return  1\na\tb" and page.remark == ""


@pytest.mark.parametrize("data", [
    f"<article>{ARTICLE}</article><article>{ARTICLE}</article>",  # two: a list of articles
    f"<main><p>A word of welcome.</p></main><div>{ARTICLE}</div>",  # most of the text is elsewhere
    f"<div>{ARTICLE}</div>"])
def test_otherwise_trafilatura_is_asked(data, monkeypatch):
    import trafilatura

    monkeypatch.setattr(trafilatura, "extract", lambda *args, **kwargs: "what it says " * 99)
    assert html(f"<html><body>{data}</body></html>".encode()).text == "what it says " * 99


def test_an_article_with_comments_that_are_articles_is_one():
    comment = "<section><article>A comment.</article></section>"
    page = html(f"<body><article><h1>Heading</h1>{ARTICLE}{comment}</article></body>".encode())
    assert page.text.startswith("Heading\n") and page.text.endswith("A comment.")
