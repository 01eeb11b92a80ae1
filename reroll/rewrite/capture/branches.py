"""Check the assumptions that a captured graph makes about the sizes of its inputs.

The exporter runs the model's Python once, on example sizes. Where the Python compares sizes, the
exporter takes the branch of the example. It records the condition as the range of a size, or as an
expression over sizes. For inputs that violate such a condition, the graph computes something else
than the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export.graph_signature import InputKind

from reroll.errors import CaptureError
from reroll.rewrite.capture.signature import Example

# sizes to try, by the name of the dimension: without a past, then with one
_NO_PAST = [{"s": n, "t": n, "b": b, "e": 7} for n, b in ((2, 3), (5, 2), (33, 2), (130, 5))]
_PAST = [{"s": s, "t": t, "b": b, "e": 130} for s, t, b in ((2, 33, 3), (33, 34, 2), (5, 130, 2))]
_LIMITS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions",
)  # fmt: skip


class BranchError(CaptureError):
    """Error for a model that computes something else for other lengths, batch sizes or pasts."""


def check_branches(
    exported: torch.export.ExportedProgram, examples: list[Example], config: Any
) -> None:
    """Refuse a capture that is correct for some lengths or batch sizes only.

    Lengths above the maximum of the configuration do not count. Raises BranchError with the
    condition that the capture assumes.
    """
    sizes, environment = _sizes(exported, examples)
    if environment is None:
        return
    limit = _limit(config)
    for symbol, known in exported.range_constraints.items():
        if symbol in sizes and (known.lower > 2 or known.upper < limit):
            raise _differs(f"{sizes[symbol]} from {known.lower} to {known.upper}")
    tried = [c for c in (*_NO_PAST, *_PAST) if max(c["s"], c["t"]) <= limit]
    asserted = [
        each.expr for held in environment.deferred_runtime_asserts.values() for each in held
    ]
    for held in {environment.replace(expression) for expression in asserted}:
        answers = [held.subs({s: c.get(name, c["b"]) for s, name in sizes.items()}) for c in tried]
        if any(answer == False for answer in answers):  # noqa: E712  (sympy's own False)
            raise _differs(_named(str(held), sizes))


def _differs(test: str) -> BranchError:
    return BranchError(
        "the model computes something else for other lengths, batch sizes or pasts",
        hint=f"it was captured with {test if len(test) < 200 else test[:200] + '...'}",
    )


def _named(text: str, sizes: dict[Any, str]) -> str:
    for symbol, name in sorted(sizes.items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(str(symbol), name)
    return text


def _limit(config: Any) -> int:
    """Return the maximum length of a text by the configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, name, None) for name in _LIMITS]
    return min((n for n in limits if isinstance(n, int) and n > 0), default=2**16)


def _sizes(
    exported: torch.export.ExportedProgram, examples: list[Example]
) -> tuple[dict[Any, str], Any]:
    """Return the dimension of each symbol of the exporter, and the exporter's shape environment."""
    specs = exported.graph_signature.input_specs
    names = [spec.arg.name for spec in specs if spec.kind == InputKind.USER_INPUT]
    values = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    sizes: dict[Any, str] = {}
    environment = None
    for name, example in zip(names, examples, strict=True):
        for size, dim in zip(values[name].shape, example.dims, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(dim, str):
                sizes.setdefault(size.node.expr, dim)
                environment = size.node.shape_env
    return sizes, environment
