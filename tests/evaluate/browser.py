"""Opening a page in headless Chromium, and asking it what it sees."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# the page stands in a frame of the wanted width: a window may have a least width of its own
_FRAME = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<body style="margin:0"><iframe style="border:0;width:{width}px;height:{height}px"
srcdoc="{page}"></iframe><pre id="seen"></pre><script>
const frame = document.querySelector("iframe");
onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const wide = [...page.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > view.innerWidth + 1);
  document.getElementById("seen").textContent = JSON.stringify({{
    width: view.innerWidth,
    scrolls: page.documentElement.scrollWidth,
    wide: wide.map(e => e.outerHTML.slice(0, 120)),
    loaded: view.performance.getEntriesByType("resource").map(e => e.name),
    text: page.body.innerText.length,
  }});
}};
</script>"""


def chromium() -> str:
    """The program; skips the test with the command that installs it where it is missing."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("Chromium is not there: apt-get install chromium")
    return found


def look(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What Chromium sees of a page at a width: sizes, what it has loaded, and its console."""
    frame = folder / f"frame-{width}.html"
    content = html.escape(page)
    frame.write_text(_FRAME.format(width=width, height=900, page=content), encoding="utf-8")
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width + 40},1000",
        "--virtual-time-budget=5000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    (text,) = re.findall(r'<pre id="seen">(.*?)</pre>', result.stdout, re.DOTALL)
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(html.unescape(text)), "console": console}
