"""The README.md of a saved model: its original, the passes that ran, and the measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from reroll.rewrite.analysis.dropout import dropout_remark
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Step


def model_card(program: Program) -> str:
    """Return a model card with the metadata that the hub reads."""
    return "\n".join([*_metadata(program), "", *_body(program)]) + "\n"


def _metadata(program: Program) -> Iterator[str]:
    yield from ("---", "library_name: reroll", "tags:", "- reroll")
    if re.fullmatch(r"[\w-]+/[\w.-]+", program.origin.model):
        yield f"base_model: {program.origin.model}"
    yield "---"


def _body(program: Program) -> Iterator[str]:
    origin = program.origin
    name = origin.model.rstrip("/").rpartition("/")[2] or origin.architecture or "model"
    yield f"# {_inline(name)}, rerolled"
    yield ""
    made = f"Made by reroll from {_code(name)}"
    if origin.architecture:
        made += f" ({_code(origin.architecture)})"
    if origin.revision:
        made += f", revision {_code(origin.revision)}"
    yield f"{made}: {program.parameters():,} parameters."
    yield ""
    yield from ("```python", "import reroll, transformers", "")
    yield f'model = transformers.{origin.auto_class}.from_pretrained("path/or/id")'
    yield from ("```", "")
    training = dropout_remark(origin.config)
    if remarks := [*origin.remarks, *([] if training is None else [training])]:
        yield from (f"- {_inline(remark)}" for remark in remarks)
        yield ""
    yield from ("## Recipe", "")
    if not origin.steps:
        yield "No pass has run: it computes what the original computes."
        return
    for number, step in enumerate(origin.steps, 1):
        yield f"{number}. {_code(step.text)} in {step.seconds:.1f} s"
        yield from (f"   - {_inline(remark)}" for remark in step.remarks)
    measured = [step for step in origin.steps if step.measured]
    if measured:
        yield from ("", "## Measurements", "")
        yield from _table(measured)


def _table(steps: list[Step]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for step in steps for key in step.measured))
    yield f"| after | {' | '.join(map(_inline, columns))} |"
    yield f"| --- |{' --- |' * len(columns)}"
    for step in steps:
        cells = [_value(step.measured, key) for key in columns]
        yield f"| {_code(step.text)} | {' | '.join(cells)} |"


def _value(measured: Mapping[str, Any], key: str) -> str:
    value = measured.get(key, "")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_inline(str(k))}: {_value(value, k)}" for k in value)
    return _inline(value if isinstance(value, str) else json.dumps(value))


def _inline(text: str) -> str:
    """Escape text to one line without markup: names and remarks come from files."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", text)


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
