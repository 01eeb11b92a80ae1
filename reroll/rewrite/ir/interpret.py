"""Reference interpreter: runs a Program's graphs node by node.

It defines what a Program computes. Verification and measurement use it. The lowered modules of
`reroll.runtime` are the fast form, and are tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.errors import ProgramError, RerollError
from reroll.rewrite.ir.defaults import fitted, run_default
from reroll.rewrite.ir.matching import bind
from reroll.rewrite.ir.ops import ATTENTION
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Input
from reroll.rewrite.ir.shapes import concrete
from reroll.rewrite.ir.visibility import Visibility
from reroll.rewrite.ir.weights import WeightTable, evaluate
from reroll.rewrite.ir.weights.expressions import Apply, Expr, Meta, Source, build, walk

Tensors: TypeAlias = Mapping[tuple[str, int], Tensor]
Observe: TypeAlias = Callable[[str, int | None, fx.Node, tuple[Any, ...], Any], None]


# a padding mask covers past and present tokens; the interpreter has no past
_PRESENT_OF = {"t": "s"}


def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    *,
    weights: Tensors | None = None,
    dtype: torch.dtype | None = None,
    fast: bool = False,
    observe: Observe | None = None,
) -> dict[str, Tensor]:
    """Run a Program; return its outputs by name.

    `inputs` may leave out padding masks, positions and zeros. `weights` are the result of
    `materialise`; without them they are computed here. `dtype` is a wider dtype to compute in than
    the Program's own. `fast` runs attention by PyTorch's fused kernel where that can express it,
    which is the same up to rounding. `observe` is called after each op. Its arguments are the
    graph's name, the trip, the node, the values of the node's arguments in the order of the schema,
    and the result.

    Raises ProgramError naming the node that failed.
    """
    dtype = dtype or program.dtype
    if dtype != program.dtype and dtype not in _WIDER.get(program.dtype, ()):
        raise ProgramError(f"a program in {program.dtype} does not run in {dtype}")
    values = complete(program, inputs)
    weights = materialise(program) if weights is None else weights
    with torch.device("cpu") if not values else next(iter(values.values())).device:
        outputs = _Interpreter(program, weights, dtype, fast, observe).run(values)
    return dict(zip(program.outputs, outputs, strict=True))


_HALF = (torch.bfloat16, torch.float16)
_WIDER = {
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def materialise(program: Program) -> dict[tuple[str, int], Tensor]:
    """Compute every weight of a Program, by (name, entry)."""
    return {(n, e): t for n, e, t in evaluate(program.weights, program.source)}


def complete(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete the inputs with the defaults of those that are left out.

    Raises ProgramError for an input that is unknown, missing, or of another shape.
    """
    known = {i.name for i in program.inputs}
    for name in inputs:
        if name not in known:
            raise ProgramError(f"there is no input {name!r}", hint=f"there are {sorted(known)}")
    # data first, because its batch size is needed to expand single rows of other inputs
    order = sorted(program.inputs, key=lambda item: item.role != "data")
    sizes: dict[str, int] = {}
    for item in order:
        if item.name in inputs:
            _bind(item, fitted(item, inputs[item.name], sizes.get("b", 1)), sizes)
    device = next((t.device for t in inputs.values()), torch.device("cpu"))
    values: dict[str, Tensor] = {}
    with device:
        for item in program.inputs:
            values[item.name] = _completed(item, inputs, values, sizes).to(device)
            _bind(item, values[item.name], sizes)
    return values


def _completed(
    item: Input, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor], sizes: dict[str, int]
) -> Tensor:
    """Return the value given for an input, else its default computed from the inputs before it."""
    batch = sizes.get("b", 1)
    if item.name in inputs:
        return fitted(item, inputs[item.name], batch)
    if item.default is not None:
        return fitted(item, run_default(item, values).to(item.type.dtype), batch)
    if item.role == "data":
        raise ProgramError(f"the input {item.name!r} is missing")
    return _default(item, sizes)


def _bind(item: Input, tensor: Tensor, sizes: dict[str, int]) -> None:
    fits = tensor.dim() == len(item.type.shape)
    for size, dim in zip(tensor.shape, item.type.shape, strict=False):
        expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        fits = fits and size == expected
    if not fits:
        raise ProgramError(
            f"the input is {list(tensor.shape)}, not {list(item.type.shape)} with {sizes}",
            where=item.name,
        )


def _default(item: Input, sizes: Mapping[str, int]) -> Tensor:
    present = {total: sizes[now] for total, now in _PRESENT_OF.items() if now in sizes}
    try:
        # without pictures, one blank picture that no image token refers to
        shape = [concrete(dim, {"p": 1, **present, **sizes}) for dim in item.type.shape]
    except KeyError as error:
        raise ProgramError(f"nothing says how large {error} is", where=item.name) from None
    if item.counts:
        return torch.arange(shape[-1]).expand(shape).to(item.type.dtype)
    fill = torch.ones if item.role == "padding" else torch.zeros
    return fill(shape, dtype=item.type.dtype)


class _Interpreter:
    """Interpreter that frees values after their last use, so long graphs need little memory."""

    def __init__(
        self,
        program: Program,
        weights: Tensors,
        dtype: torch.dtype,
        fast: bool,
        observe: Observe | None,
    ) -> None:
        self.observe = observe
        self.program = program
        self.weights = weights
        self.dtype = dtype
        self.fast = fast
        self.loops = {loop.node: loop for loop in program.loops}
        self.plans: dict[fx.Graph, list[tuple[fx.Node, list[fx.Node]]]] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        arguments = [
            inputs[i.name].to(self.dtype) if i.type.dtype == self.program.dtype else inputs[i.name]
            for i in self.program.inputs
        ]
        return self.graph("main", self.program.graph, arguments, None)

    def graph(
        self, name: str, graph: fx.Graph, arguments: list[Any], trip: int | None
    ) -> tuple[Any, ...]:
        values: dict[fx.Node, Any] = {}
        feed = iter(arguments)
        for node, dropped in self.plan(graph):
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = self.weight(str(node.target), trip)
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: values[n])
                return tuple(result) if isinstance(result, tuple | list) else (result,)
            else:
                values[node] = self.call(name, node, values, trip)
            for old in dropped:
                values.pop(old, None)
        raise ProgramError("the graph has no output", where=name)

    def plan(self, graph: fx.Graph) -> list[tuple[fx.Node, list[fx.Node]]]:
        """Return each node with the nodes whose last use it is."""
        if graph not in self.plans:
            later: set[fx.Node] = set()
            plan = []
            for node in reversed(graph.nodes):
                last = [n for n in dict.fromkeys([*node.all_input_nodes, node]) if n not in later]
                later.update(last)
                plan.append((node, last))
            self.plans[graph] = plan[::-1]
        return self.plans[graph]

    def weight(self, name: str, trip: int | None) -> Tensor:
        weight = self.program.weights[name]
        entry = 0 if weight.index is None or trip is None else weight.index[trip]
        return self.wide(self.weights[name, entry])

    def wide(self, tensor: Tensor) -> Tensor:
        # a tensor that the Program stores in a wider dtype than its own keeps that dtype
        narrow = tensor.dtype == self.program.dtype or tensor.dtype in _HALF
        return tensor.to(self.dtype) if narrow and self.dtype != self.program.dtype else tensor

    def call(
        self, name: str, node: fx.Node, values: Mapping[fx.Node, Any], trip: int | None
    ) -> Any:
        if node in self.loops:
            return self.loop(node, values)
        args = fx.node.map_arg(self.constants(node, node.args), lambda n: values[n])
        kwargs = fx.node.map_arg(self.constants(node, node.kwargs), lambda n: values[n])
        target: Any = node.target
        if self.fast and target is ATTENTION:
            target = fused_attention
        try:
            result = target(*args, **kwargs)
        except RerollError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ProgramError(
                f"{node.target}: {type(error).__name__}: {reason}", where=f"{name}, {node.name}"
            ) from error
        if self.observe is not None:
            self.observe(name, trip, node, _in_order(node, args, kwargs), result)
        return result

    def constants(self, node: fx.Node, value: Any) -> Any:
        """Replace the Program's dtype in arguments by the dtype to compute in."""
        if self.dtype == self.program.dtype:
            return value
        if isinstance(value, Mapping):
            return {k: self.constants(node, v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return tuple(self.constants(node, v) for v in value)
        return self.dtype if value == self.program.dtype else value

    def loop(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, ...]:
        loop = self.loops[node]
        carry = tuple(self.value(item, values) for item in loop.carry)
        for trip in range(loop.trips):
            inputs = [self.value(loop.input_for(i, trip), values) for i in range(len(loop.inputs))]
            carry = self.graph(loop.name, loop.body.graph, [*carry, *inputs], trip)
        return carry

    @staticmethod
    def value(item: Any, values: Mapping[fx.Node, Any]) -> Any:
        return fx.node.map_arg(item, lambda n: values[n])


def _in_order(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values of all arguments in the order of the schema, with defaults."""
    if not hasattr(node.target, "_schema"):
        return args
    return tuple(bind(node.target, args, kwargs).values())


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *args: Any, **kwargs: Any
) -> Tensor:
    """Compute `reroll::attention` by PyTorch's fused kernel.

    With sinks, a soft cap or a window of 0, run the op's own body.
    """
    arguments = bind(ATTENTION, (q, k, v, scale, *args), kwargs)
    visibility, bias = Visibility.among(arguments), arguments["bias"]
    if visibility.window == 0 or arguments["sinks"] is not None or arguments["softcap"] is not None:
        exact: Tensor = ATTENTION(**arguments)
        return exact
    length, keys = q.shape[2], k.shape[2]
    only_causal = (
        bool(visibility.causal) and not visibility.is_limited and bias is None and length == keys
    )
    if not only_causal and (visibility.causal or visibility.is_limited):
        at = torch.arange(length, device=q.device) + keys - length
        mask = visibility.added(at, keys, q.dtype)
        bias = mask if bias is None else bias + mask
    out = F.scaled_dot_product_attention(
        q, k, v, bias, is_causal=only_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).contiguous()


# ---- exact rewrites are checked on weights that are not rounded to half precision


def widened(program: Program, dtype: torch.dtype) -> Program:
    """Replace half precision by `dtype` in all weight expressions of a Program."""
    done: dict[Expr, Expr] = {}
    roots = [e for weight in program.weights.values() for e in weight.entries]
    for expr in walk(roots):
        done[expr] = _widen(expr, done, dtype)
    table = WeightTable(
        {
            name: replace(weight, entries=tuple(done[e] for e in weight.entries))
            for name, weight in program.weights.items()
        }
    )
    return program.with_weights(table)


def _widen(expr: Expr, done: Mapping[Expr, Expr], dtype: torch.dtype) -> Expr:
    if isinstance(expr, Source):
        meta = expr.meta
        return Source(expr.name, Meta(meta.shape, dtype)) if meta.dtype in _HALF else expr
    assert isinstance(expr, Apply)
    names = {"bf16", "f16"}
    wide = {torch.float32: "f32", torch.float64: "f64"}[dtype]
    args: Iterator[Any] = (
        done[a] if isinstance(a, Expr) else wide if isinstance(a, str) and a in names else a
        for a in expr.args
    )
    return build(expr.op, *args)
