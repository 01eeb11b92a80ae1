"""Plain text out of HTML."""

import re
from html.parser import HTMLParser

HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
PARAGRAPHS = HEADINGS | {"p", "div", "pre", "blockquote", "section", "center", "hr"}
PARAGRAPHS |= {"table", "ul", "ol", "dl"}
LINES = frozenset({"li", "tr", "br", "dt", "dd"})
UNREAD = frozenset({"script", "style", "head", "svg", "nav", "button", "form"})
VOID = frozenset({"br", "hr", "img", "input", "meta", "link", "col"})


def tidy(text: str) -> str:
    """Text with plain line ends and spaces, one blank line at most, and one newline at its end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\u00a0", " ").replace("\ufeff", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip() + "\n"


def html_to_text(html: str, *, unread_classes: frozenset[str] = frozenset()) -> str:
    """The text of a page, without the elements that have one of the given classes."""
    extractor = TextExtractor(unread_classes)
    extractor.feed(html)
    extractor.close()
    lines = "".join(extractor.pieces).split("\n")
    # an indented line is preformatted text
    return tidy("\n".join(line if line.startswith("  ") else line.strip() for line in lines))


class TextExtractor(HTMLParser):
    """Collects the text of a page in `pieces`; blocks become lines and paragraphs."""

    def __init__(self, unread_classes: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.unread_classes = unread_classes
        self.open: list[tuple[str, bool]] = []  # open elements, and whether each is left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if tag not in VOID:
            unread = tag in UNREAD or not self.unread_classes.isdisjoint(classes)
            self.open.append((tag, unread))
        self.separate(tag)
        if tag == "li":
            self.pieces.append("* ")

    def handle_endtag(self, tag: str) -> None:
        # elements that were never closed end with the one around them
        if any(tag == name for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass
        self.separate(tag)

    def handle_data(self, data: str) -> None:
        if any(unread for _, unread in self.open):
            return
        preformatted = any(name == "pre" for name, _ in self.open)
        self.pieces.append(data if preformatted else re.sub(r"\s+", " ", data))

    def separate(self, tag: str) -> None:
        """Begin a new line or paragraph where an element does."""
        if tag in LINES:
            self.pieces.append("\n")
        elif tag in PARAGRAPHS:
            self.pieces.append("\n\n")
