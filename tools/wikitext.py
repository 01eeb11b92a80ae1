"""Plain text out of Wikipedia's wiki markup."""

import html
import re
from collections.abc import Iterator

from tools.markup import tidy

LEFT_OUT = "math|gallery|timeline|score|source|syntaxhighlight|table"
APPENDICES = (
    "See also|References|External links|Further reading|Notes|Bibliography|Footnotes|Sources"
)
# a link, or plain text, inside the brackets of another
NESTED = r"(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*"


def substitution(
    pattern: str, replacement: str = "", flags: int = 0, rounds: int = 1
) -> tuple[re.Pattern[str], str, int]:
    """A step of the cleaning; nested markup needs several rounds, from the inside out."""
    return re.compile(pattern, flags), replacement, rounds


BEFORE_SECTIONS = [
    substitution(r"<!--.*?-->", flags=re.S),
    substitution(r"<ref[^>/]*/>"),
    substitution(r"<ref[^>]*>.*?</ref>", flags=re.S),
    substitution(rf"<({LEFT_OUT})[^>]*>.*?</\1>", flags=re.S),
    # templates and tables
    substitution(r"\{\{[^{}]*\}\}", rounds=8),
    substitution(r"\{\|(?:(?!\{\||\|\}).)*\|\}", flags=re.S, rounds=4),
    # images, categories and other languages
    substitution(
        rf"\[\[(?:File|Image|Category|[a-z]{{2,3}}(?:-[a-z]+)?):{NESTED}\]\]", flags=re.I, rounds=4
    ),
    # links keep their label
    substitution(r"\[\[[^\[\]|]*\|([^\[\]]*)\]\]", r"\1"),
    substitution(r"\[\[([^\[\]]*)\]\]", r"\1"),
    substitution(r"\[https?://\S+\s+([^\]]*)\]", r"\1"),
    substitution(r"\[https?://\S+\]"),
    # bold, italics and any other tag
    substitution(r"'{2,}"),
    substitution(r"<[^>]+>"),
]
AFTER_SECTIONS = [
    substitution(r"^==+\s*(.*?)\s*==+\s*$", r"\n\1\n", flags=re.M),
    substitution(r"^[*#:;]+\s*", flags=re.M),
    # what is left of tables
    substitution(r"^\|.*$|^\}\}.*$|^!.*$", flags=re.M),
    substitution(r"__[A-Z]+__"),
    # brackets whose content was markup
    substitution(r"\(\s*[;,]?\s*\)"),
]


def plain_text(markup: str) -> str:
    """The prose of an article, without its references, tables and lists of links."""
    text = html.unescape(html.unescape(markup))
    text = apply(BEFORE_SECTIONS, text)
    text = re.split(rf"\n==+\s*(?:{APPENDICES})\s*==+", text)[0]
    return apply(AFTER_SECTIONS, text)


def apply(steps: list[tuple[re.Pattern[str], str, int]], text: str) -> str:
    """The text after all substitutions, in order."""
    for pattern, replacement, rounds in steps:
        for _ in range(rounds):
            text = pattern.sub(replacement, text)
    return text


def articles(dump: str) -> Iterator[tuple[str, str]]:
    """Title and text of each article in an XML dump; redirects and talk pages are left out."""
    for page in re.findall(r"<page>(.*?)</page>", dump, re.S):
        title = re.search(r"<title>(.*?)</title>", page)
        markup = re.search(r"<text[^>]*>(.*?)</text>", page, re.S)
        other_namespace = re.search(r"<ns>(?!0<)", page)
        if title and markup and not other_namespace and "<redirect" not in page:
            name = title.group(1)
            yield name, tidy(f"{name}\n\n{plain_text(markup.group(1))}")
