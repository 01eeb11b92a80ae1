"""Hooks of MkDocs: pages from the root of the repository, and links that lead out of the folder.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages of the site. On all pages, links to these,
to pictures and to folders lead to the page that stands for them. A link to a file of source is left
as its text, since the site holds none. A link to a file that is not there is a warning, which is an
error under `--strict`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("reroll")

ROOT = Path(__file__).parents[1]
# pages of the site, by the file of the repository that they are made of
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FOLDERS = {"docs/results": "results/README.md"}

_LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the root."""
    for name, page in FROM_ROOT.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make the links of a page lead to pages of the site."""
    sources = {page_name: name for name, page_name in FROM_ROOT.items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")
    parts = _FENCE.split(markdown)
    for number in range(0, len(parts), 2):
        parts[number] = _LINK.sub(lambda m: _link(m, source, here), parts[number])
    return "".join(parts)


def _link(match: re.Match[str], source: str, here: str) -> str:
    path, sharp, anchor = match["target"].partition("#")
    if not path or "://" in path:
        return match[0]
    wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / wanted).exists():
        log.warning("%s: there is no %s", source, wanted)
        return match[0]
    page = FROM_ROOT.get(wanted) or FOLDERS.get(wanted)
    if page is None and wanted.startswith("docs/"):
        page = wanted.removeprefix("docs/")
    if page is None:
        return match["text"]
    link = posixpath.relpath(page, posixpath.dirname(here) or ".")
    return f"{match['mark']}[{match['text']}]({link}{sharp}{anchor})"
