"""The README.md of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def readme(found: Mapping[str, Any]) -> str:
    """Return the text that describes a bundle and how to run it."""
    passes = "\n".join(f"- `{text}`" for text in found["passes"]) or "- none"
    kernels = ", ".join(f"`{name}`" for name in found["kernels"]) or "none: it has no recurrence"
    return _TEXT.format(
        model=found["model"], passes=passes, kernels=kernels, archs=", ".join(found["archs"])
    )


_TEXT = """# {model}, as a Triton bundle

Needs `torch` and `triton` (3.7.1 or newer), nothing else.

```python
from model import Model

model = Model(".", slots=8)
model.selftest()  # every kernel against its definition, on this GPU
model.generate([[1, 2, 3]], 20)
```

`prefill(ids, mask)` begins sequences in slots and gives their logits, `decode(tokens)` takes one
more token of each; on CUDA, decoding is one CUDA graph for each number of rows. Padding stands
before the tokens of a row. Without a GPU, `TRITON_INTERPRET=1` runs the same code slowly.

Passes:

{passes}

Kernels: {kernels}. Block sizes are for {archs}, as reroll's sweep chose them. Speed on a GPU has
not been measured.
"""
