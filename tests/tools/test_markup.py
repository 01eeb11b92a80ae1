import pytest

from tools.markup import html_to_text, tidy
from tools.wikitext import articles, plain_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc\n"),
        ("a \t\nb", "a\nb\n"),
        ("a\n\n\n\nb\n\n", "a\n\nb\n"),
        ("\ufeffa\u00a0b", "a b\n"),
        ("", "\n"),
    ],
)
def test_tidy(text: str, expected: str) -> None:
    assert tidy(text) == expected
    assert tidy(expected) == expected


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<h1>Title</h1><p>some\n  <b>bold</b> text", "Title\n\nsome bold text\n"),
        ("<ul><li>one<li>two</ul>", "* one\n* two\n"),
        ("<pre>\n  x = 1\n  y  = 2</pre>", "x = 1\n  y  = 2\n"),
        ("<head><title>no</title></head><p>yes &amp; no", "yes & no\n"),
        ('<div class="toc wide"><p>contents</div><p>text', "text\n"),
        ("a</p></div>b", "a\n\nb\n"),
    ],
)
def test_html_to_text(page: str, expected: str) -> None:
    assert html_to_text(page, unread_classes=frozenset({"toc"})) == expected


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("[[Target|a label]], [[plain]] and [https://a.b/ a page]", "a label, plain and a page"),
        ("a{{one {{inside}} another}}b", "ab"),
        ("[[File:x.png|thumb|a [[link]] in it]]text", "text"),
        ("fact<ref name=a>source</ref>, fact<ref name=a/>", "fact, fact"),
        ("&amp;lt;br&amp;gt; &amp;amp;", " &"),
        ("prose\n== See also ==\nlist", "prose"),
        ("word ({{lang|xx}}; ) word", "word  word"),
    ],
)
def test_plain_text(markup: str, expected: str) -> None:
    assert plain_text(markup) == expected


def test_articles_are_pages_of_the_main_namespace() -> None:
    page = "<page><title>{}</title><ns>{}</ns>{}<text>body</text></page>"
    dump = (
        page.format("A", 0, "") + page.format("Talk:A", 1, "") + page.format("B", 0, "<redirect>")
    )
    assert list(articles(dump)) == [("A", "A\n\nbody\n")]
