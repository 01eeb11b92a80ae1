"""Make a torch module follow the top-k choices of the ONNX graph with which it is compared.

The indices of the k largest elements are no continuous function of the scores. Scores that are
equal, or differ by rounding only, may be chosen either way. Torch does not say which of equal ones
it takes, and ONNX takes the first. The consequences of a choice differ by much: another expert, or
another key. So the graph's choices become outputs. Where they are as good as the module's own, the
module uses them, and all other values are compared with the usual tolerance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reroll.export.onnx.ops.reductions import CHOSEN

_NAME = re.compile(rf"{CHOSEN}(_\d+)?")
# scores below it are masked
_MASK = -1e30


class Choices:
    """Top-k choices of a model's graph, in running order; `tell` makes them outputs."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        # names of outputs that hold choices, grouped by Loop; `loops` are those with one per round
        self.groups: list[tuple[str, ...]] = []
        self.loops: set[str] = set()

    def tell(self, graph: onnx.GraphProto) -> None:
        """Make the choices in a graph and in its Loops outputs of the graph."""
        for node in graph.node:
            if node.op_type == "TopK" and _NAME.fullmatch(node.output[1]):
                self.groups.append((node.output[1],))
                graph.output.append(_any_shape(node.output[1]))
            elif node.op_type == "Loop":
                body = next(a.g for a in node.attribute if a.name == "body")
                inner = [n.output[1] for n in body.node if n.op_type == "TopK"]
                names = [name for name in inner if _NAME.fullmatch(name)]
                stacks = tuple(f"{name}.rounds" for name in names)
                body.output.extend(map(_any_shape, names))
                node.output.extend(stacks)
                graph.output.extend(map(_any_shape, stacks))
                if stacks:
                    self.groups.append(stacks)
                    self.loops.update(stacks)

    def of(self, outputs: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield the choices of one run, in the order in which they were made."""
        for group in self.groups:
            found = [outputs[name] for name in group]
            if group[0] not in self.loops:
                yield from found
                continue
            for made in zip(*found, strict=True):
                yield from made

    @contextmanager
    def taken(self, outputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Let a torch module use the graph's choices of this run, where they are as good."""
        with _Following(self.of(outputs), self.tolerance):
            yield


class _Following(TorchDispatchMode):
    """A dispatch mode that replaces results of topk by given choices, one after the other."""

    def __init__(self, choices: Iterator[Tensor], tolerance: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choices, self.tolerance = choices, tolerance

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.topk.default:
            return result
        chosen = next(self.choices, None)
        dim = args[2] if len(args) > 2 else -1
        if chosen is None or chosen.shape != result[1].shape:
            return result
        values = args[0].gather(dim, chosen)
        if not as_good(values, result[0], args[0], dim, self.tolerance):
            return result
        return torch.return_types.topk((values, chosen))


def as_good(chosen: Tensor, best: Tensor, scores: Tensor, dim: int, tolerance: float) -> bool:
    """Whether the chosen scores are the best ones, within a tolerance.

    `tolerance` is relative to the largest absolute score in the row.
    """
    a, b = (each.double().sort(dim).values for each in (chosen, best))
    size = scores.double().where(scores > _MASK, 0.0).abs().amax(dim, keepdim=True)
    near = (a - b).abs() <= tolerance * size
    return bool((near | (a == b)).all())


def _any_shape(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None)
