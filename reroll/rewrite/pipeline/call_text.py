"""Format passes and their options as pipeline text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from reroll.rewrite.pipeline.options import plain
from reroll.rewrite.pipeline.pipeline_parser import RESERVED, WORD


def call_to_text(name: str, options: Mapping[str, Any]) -> str:
    """Format a pass's name and options as text."""
    if not options:
        return name
    return f"{name}({', '.join(f'{k}={value_to_text(plain(v))}' for k, v in options.items())})"


def value_to_text(value: Any) -> str:
    """Format an option's value as pipeline text."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, str):
        bare = WORD.fullmatch(value) and value.lower() not in RESERVED
        return value if bare else json.dumps(value)
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, list):
        return f"[{', '.join(map(value_to_text, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{value_to_text(k)}: {value_to_text(v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)
