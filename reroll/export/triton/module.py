"""Write model.py and the other files of a bundle: weights, manifest, README, tokenizer."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from torch import fx

import reroll
from reroll.errors import ExportError
from reroll.export.huggingface import with_saved_weights
from reroll.export.side_files import copy_side_files
from reroll.export.triton.graphs import LOGITS, GraphWriter
from reroll.export.triton.launches import NUMBERS, has_kernel, has_tiles, kernel_number, kernels_of
from reroll.export.triton.linears import Fused, fused_of, kinds_of
from reroll.export.triton.sites import Site, sites_of
from reroll.rewrite.ir.program import Program, drop_unused, weight_nodes

if TYPE_CHECKING:
    from reroll.export.targets import Progress
    from reroll.export.triton import Triton

# placeholders in the copied files, which the bundle defines itself
OURS = ("ARCHS", "SITES", "LINEARS", "DTYPE", "main")
STAND_IN = "# the bundle has its own"

MODULE, MANIFEST = "model.py", "manifest.json"


def write(
    target: Triton, program: Program, directory: Path, progress: Progress | None
) -> dict[str, Any]:
    """Write everything into a directory; see `Target.write`."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, "writing weights")

    # first, so that no side file replaces a file written here
    copy_side_files(program, directory)
    text = module_text(program, target.arch)
    (directory / MODULE).write_text(text, encoding="utf-8")
    stored = with_saved_weights(program, directory, report)
    found: dict[str, Any] = {
        "format": 1,
        "producer": {"reroll": reroll.__version__, "triton": triton.__version__},
        "model": program.origin.model,
        "passes": [step.text for step in program.origin.steps],
        "archs": list(target.arch),
        "dtype": str(program.dtype).removeprefix("torch."),
        "kernels": [line.split("(")[0][4:] for line in text.splitlines()
                    if line.startswith(("def near_", "def scan_", "def step_", "def linear_",
                                    "def convolve_"))],
        "weights": _weights(stored),
        # only a run on a GPU can measure it
        "gpu_speed": "not measured",
    }  # fmt: skip
    if target.precompiled:
        from reroll.export.triton.precompile import precompile

        found["binaries"] = precompile(directory, target.arch)
    (directory / "README.md").write_text(readme(found), encoding="utf-8")
    text = json.dumps(found, indent=1) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return {k: v for k, v in found.items() if k != "weights"}


def module_text(program: Program, archs: tuple[str, ...]) -> str:
    """Return the source of model.py, which is the same for the same program.

    Raises ExportError for a program that is no causal language model with a cache, and for other
    dtypes than fp32, fp16 and bf16.
    """
    if LOGITS not in program.outputs:
        raise ExportError(
            "a bundle is a causal language model, and the program has no logits",
            hint="the onnx target exports encoders",
        )
    if not program.has_past:
        raise ExportError(
            "a bundle reads new tokens alone, and the program was captured without a cache",
            hint="the onnx target exports it, to be run on all tokens",
        )
    if program.dtype not in NUMBERS:
        raise ExportError(f"a bundle computes in fp32, fp16 or bf16, not {program.dtype}")
    # attentions and recurrences whose output is not used get no state
    program = program.edit()
    for _, graph in program.graphs():
        drop_unused(graph)
    sites, fused = sites_of(program), fused_of(program)
    if not all(has_tiles(f, program.dtype, archs) for f in fused.values()):
        # layers may share a norm, so all of them are left to PyTorch
        fused = {}
    kinds = kinds_of(list(fused.values()))
    parts = [
        _HEAD.format(model=_one_line(program.origin.model)),
        f"ARCHS = {archs!r}\nDTYPE = {program.dtype}",
        _copied("bundle_launch.py"),
        kernels_of(list(sites.values()), kinds, program.dtype, archs),
        _copied("bundle_runtime.py"),
        _copied("bundle_definitions.py"),
        _copied("bundle_linear.py"),
        _site_list(sites),
        _linear_list(kinds),
        GraphWriter(program, sites, fused).source(),
        _copied("bundle_model.py"),
        _TAIL.strip(),
    ]
    return "\n\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _copied(file: str) -> str:
    """Return a file of this folder without its docstring, imports and placeholders."""
    text = resources.files("reroll.export.triton").joinpath(file).read_text("utf-8")
    tree = ast.parse(text)
    drop: set[int] = set()
    for node in tree.body:
        start, end = node.lineno, node.end_lineno or node.lineno
        ours = isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") in OURS
        if isinstance(node, ast.Import | ast.ImportFrom) or node is tree.body[0] or ours:
            drop |= set(range(start, end + 1))
    lines = text.splitlines()
    kept = [n for i, n in enumerate(lines, 1) if i not in drop and n != STAND_IN]
    return "\n".join(kept)


def _site_list(sites: Mapping[fx.Node, Site]) -> str:
    recurrences = [s for s in sites.values() if s.mixer is not None]
    attentions = [s for s in sites.values() if has_kernel(s)]
    convolutions = [s for s in sites.values() if s.kind == "Convolution"]
    lines = ["# the states of the program, in the order of its graphs", "SITES = ["]
    for site in sites.values():
        fields = [f"{key}={value!r}" for key, value in site.fields.items()]
        if site.mixer is not None:
            number = kernel_number(site, recurrences)
            fields += [f"scan=run_scan_{number}", f"step=run_step_{number}"]
        elif site.kind == "Convolution":
            number = kernel_number(site, convolutions)
            fields += [f"scan=run_convolve_{number}", f"step=run_convolve_step_{number}"]
        elif site in attentions:
            fields.append(f"near=run_near_{kernel_number(site, attentions)}")
        lines.append(f"    {site.kind}({', '.join(fields)}),")
    return "\n".join([*lines, "]"])


def _linear_list(kinds: Sequence[Fused]) -> str:
    names = "inputs", "rank", "norm", "gain", "bias", "activation"
    lines = ["# kernels of linear layers, and what each is specialised to", "LINEARS = ["]
    for number, fused in enumerate(kinds):
        about = dict(zip(names, fused.key, strict=True))
        lines.append(f"    (run_linear_{number}, {about!r}),")
    return "\n".join([*lines, "]"])


def _weights(stored: Program) -> dict[str, Any]:
    """Return the tensors that each graph reads, and the entry of each trip."""

    def of(names: Any) -> dict[str, Any]:
        return {
            name: {
                "entries": [e.name for e in stored.weights[name].entries],  # type: ignore[attr-defined]
                "trips": list(stored.weights[name].index or ()),
            }
            for name in names
        }

    loops = {loop.name: (loop.trips, of(weight_nodes(loop.body.graph))) for loop in stored.loops}
    return {"main": of(weight_nodes(stored.graph)), "loops": loops}


def _one_line(text: str) -> str:
    return " ".join(str(text).replace("\\", "/").replace('"', "'").split())


_HEAD = '''
"""{model}, rewritten by reroll: kernels, graphs and weights of one program.

This file was generated. It needs torch and triton; the weights lie beside it.

    from model import Model

    model = Model("the directory of this file")
    model.selftest()
    model.generate([[1, 2, 3]], 20)
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
'''
_TAIL = """
if __name__ == "__main__":
    for name, error in Model(Path(__file__).parent).selftest().items():
        print(f"{name}: relative error {error:.1e}")
"""


# ---- the README.md of a bundle


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
