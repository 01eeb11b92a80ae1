"""What `reroll export --target onnx` wrote, as its manifest describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reroll.errors import UsageError

MANIFEST = "manifest.json"


def is_exported(directory: str | Path) -> bool:
    """Whether a path is that of an ONNX export of reroll."""
    try:
        found = json.loads((Path(directory) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "graphs" in found and "opset" in found


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of an export that decodes behind a state; else raise UsageError."""
    if not is_exported(directory):
        raise UsageError(
            "this is no directory that reroll exported to ONNX",
            where=str(directory),
            hint="write one: reroll export MODEL DIR --target onnx",
        )
    found: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if found.get("decoding") != "states":
        raise UsageError(
            f"the model does not decode behind a state (part: {found.get('part')}, decoding: "
            f"{found.get('decoding')})",
            where=str(directory),
            hint="README.md in it says how to run it",
        )
    if "vocabulary" not in found or "ends" not in found:
        raise UsageError(
            "an earlier version of reroll wrote this directory",
            where=str(directory),
            hint="export the model again",
        )
    return found
