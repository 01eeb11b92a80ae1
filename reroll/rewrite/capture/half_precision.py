"""Derive the graph that a capture of the same model in half precision would give.

A capture in fp32 does not show where the model asks for fp32 and where for its own dtype. So the
model is traced again with parameters in half precision, without data and for fixed sizes, which is
cheap. The second trace runs the same ops in the same order and gives the dtype of each.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from reroll.rewrite.capture import clean
from reroll.rewrite.capture.entries import kind_of
from reroll.rewrite.capture.functional import COPIES
from reroll.rewrite.ir.dtypes import follow_limits
from reroll.rewrite.ir.hidden import NAMES, mark, marks, unmark
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Program, copy
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.types import set_dtype, set_type, type_of

aten = torch.ops.aten

TO = aten.to.dtype
# the parameters that transformers keeps in fp32, in both half precisions and in fp16
_KEPT, _KEPT_IN_FP16 = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
_VIEWS = (aten.view.default, aten._unsafe_view.default)


# ---- the model in half precision


@contextmanager
def without_data(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replace a model's parameters and buffers by tensors of a dtype without data.

    Buffers get the dtype that they have in a model constructed in `dtype`. The tensors report the
    CPU as their device, because a model's code may depend on it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtypes = {} if dtype == getattr(model, "dtype", None) else _buffer_dtypes(model, dtype)
    saved = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    twins: dict[int, nn.Parameter] = {}

    def twin(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        dtype = dtype if tensor.is_floating_point() else tensor.dtype
        with mode:
            return torch.empty(tensor.shape, dtype=dtype)

    try:
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in twins:
                    twins[id(parameter)] = nn.Parameter(twin(parameter, dtype), False)
                module._parameters[name] = None if parameter is None else twins[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    buffer_dtype = dtypes.get(f"{path}.{name}".removeprefix("."), buffer.dtype)
                    module._buffers[name] = twin(buffer, buffer_dtype)
        yield
    finally:
        for module, parameters, buffers in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def _buffer_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of the buffers of a model constructed from its configuration in a dtype."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            fresh = type(model)(deepcopy(model.config))
    # custom model code may need more than a configuration: buffers then keep their dtypes
    except Exception:
        return {}
    finally:
        torch.set_default_dtype(before)
    return {name: buffer.dtype for name, buffer in fresh.named_buffers()}


def keeps_parameters(model: nn.Module, half: torch.dtype) -> bool:
    """Whether transformers keeps some of a model's parameters in fp32 when it loads in `half`."""
    attributes = (_KEPT, _KEPT_IN_FP16) if half == torch.float16 else (_KEPT,)
    kept = {str(part) for a in attributes for part in getattr(model, a, None) or ()}
    return any(part in name for name, _ in model.named_parameters() for part in kept)


def trace(model: nn.Module, inputs: Mapping[str, Tensor]) -> fx.Graph:
    """Trace a model inside `without_data` on these inputs; return its ops as one graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    mode: FakeTensorMode = next(model.parameters()).fake_mode  # type: ignore[attr-defined]
    examples = {name: mode.from_tensor(tensor.cpu()) for name, tensor in inputs.items()}
    traced = make_fx(
        lambda values: {n: v for n, v in model(values).items() if kind_of(n) not in NAMES},
        tracing_mode="fake",
        pre_dispatch=True,
        _allow_non_fake_inputs=True,
    )(examples)
    traced.graph.eliminate_dead_code()
    return traced.graph


# ---- the captured graph with the dtypes of the trace


def with_dtypes_of(program: Program, traced: fx.Graph, half: torch.dtype) -> Program | Miss:
    """Give a flat Program the dtypes of a trace in half precision.

    The Program still has all its conversions (see `clean.drop_casts`), and its weights stay
    unchanged. Return a Miss where the two compute something else.
    """
    graph, wide = copy(program.graph), program.dtype
    for node in graph.find_nodes(op="placeholder"):
        if _dtype(node) == wide:
            set_dtype(node, half)
    miss = _Alignment(graph, traced, wide).run()
    if miss is not None:
        return miss
    _move_marks(graph, half)
    _read_frozen(graph, program, half)
    follow_limits(graph, wide, half)
    clean.drop_casts(graph)
    inputs = tuple(
        replace(i, type=replace(i.type, dtype=half)) if i.type.dtype == wide else i
        for i in program.inputs
    )
    return replace(program, graph=graph, inputs=inputs, dtype=half)


def _move_marks(graph: fx.Graph, half: torch.dtype) -> None:
    """Move marks to the values in half precision.

    In fp32 a conversion does nothing, so the mark may be on either side of it.
    """
    for node in graph.nodes:
        if not marks(node) or _dtype(node) == half:
            continue
        narrowed = (u for u in node.users if _key(u) is TO and _dtype(u) == half)
        source = node.args[0] if _key(node) is TO else None
        new = source if _is_in(source, half) else next(narrowed, None)
        if new is not None:
            mark(new, unmark(node))


def _is_in(node: Any, dtype: torch.dtype) -> bool:
    return isinstance(node, fx.Node) and _dtype(node) == dtype


def _read_frozen(graph: fx.Graph, program: Program, half: torch.dtype) -> None:
    """Convert weights that are not trainable where they are read: they are stored in fp32."""
    for node in graph.find_nodes(op="get_attr"):
        weight = program.weights[str(node.target)]
        if _dtype(node) == half and not weight.trainable:
            users = list(node.users)
            with graph.inserting_after(node):
                cast = graph.call_function(TO, (node, half))
            set_type(cast, type_of(node))
            for user in users:
                user.replace_input_with(node, cast)
            set_dtype(node, weight.meta.dtype)


class _Alignment:
    """Alignment of a captured graph with a trace, which gives the graph the trace's dtypes."""

    def __init__(self, graph: fx.Graph, traced: fx.Graph, wide: torch.dtype) -> None:
        self.graph, self.wide = graph, wide
        self.captured = [n for n in graph.nodes if _counts(n)]
        self.traced = [n for n in traced.nodes if _counts(n)]
        # the graph's node for each node of the trace, including conversions inserted from it
        self.node_of: dict[fx.Node, fx.Node] = {}
        # conversions that do nothing in the captured graph
        self.no_ops = {n for n in self.captured if _key(n) is TO and _dtype(n.args[0]) == _dtype(n)}

    def run(self) -> Miss | None:
        """Align all nodes; return a Miss for the first pair that differs, else None."""
        captured, traced = iter(self.captured), iter(self.traced)
        a, b = next(captured, None), next(traced, None)
        while a is not None or b is not None:
            if a is not None and b is not None and _key(a) == _key(b):
                if not self.pair(a, b):
                    return Miss(
                        "a constant or an operand differs in half precision", (a.name, b.name)
                    )
                a, b = next(captured, None), next(traced, None)
            elif b is not None and _key(b) is TO and self.add(b):
                b = next(traced, None)
            elif a is not None and _key(a) is TO:
                # a conversion that does not exist in half precision
                set_dtype(a, _dtype(a.args[0]))
                a.update_arg(1, _dtype(a.args[0]))
                a = next(captured, None)
            else:
                return Miss(f"{a and a.target} is {b and b.target} in half precision")
        return None

    def add(self, b: fx.Node) -> bool:
        """Insert a conversion that only the trace has; return False if its operand is unknown."""
        source, dtype = self.node_of.get(_origin(b.args[0])), _dtype(b)
        if source is None or dtype is None:
            return False
        with self.graph.inserting_after(source):
            cast = self.graph.call_function(TO, (source, dtype))
        set_type(cast, type_of(source))
        set_dtype(cast, dtype)
        self.node_of[b] = cast
        self.no_ops.add(cast)
        return True

    def pair(self, a: fx.Node, b: fx.Node) -> bool:
        """Give node `a` the dtypes of `b`; return False if their constants or operands differ."""
        self.node_of[b] = a
        set_dtype(a, _dtype(b))
        for user in a.users:
            if user.target is operator.getitem:
                set_dtype(user, _dtype(b, int(user.args[1])))  # type: ignore[arg-type]
        try:
            if _key(a) is TO:
                a.args = (self.argument(a.args[0], b.args[0]), _dtype(b))
                return True
            a.args = self.argument(a.args, b.args)
            a.kwargs = {k: self.argument(v, b.kwargs.get(k, v)) for k, v in a.kwargs.items()}
        except _Differs:
            return False
        return True

    def argument(self, value: Any, traced: Any) -> Any:
        """Return an argument of the graph with the dtypes and conversions of the trace's."""
        if isinstance(value, (tuple, list)) and isinstance(traced, (tuple, list)):
            inner = [self.argument(x, y) for x, y in zip(value, traced, strict=False)]
            return type(value)((*inner, *value[len(inner) :]))
        if isinstance(value, torch.dtype) and isinstance(traced, torch.dtype):
            return traced
        if isinstance(value, fx.Node) and isinstance(traced, fx.Node):
            return self.operand(value, traced)
        if isinstance(value, float) and isinstance(traced, float):
            limits = (getattr(torch.finfo(self.wide), n) for n in ("min", "max"))
            if value != traced and value not in limits:
                raise _Differs
        return value

    def operand(self, node: fx.Node, traced: fx.Node) -> fx.Node:
        """Return the graph's node for an operand of the trace.

        A conversion that does nothing returns its input tensor itself. A capture in fp32 therefore
        shows it before all later uses, and only the trace tells which uses it belongs to.
        """
        value, traced = self.unconverted(node), _origin(traced)
        operand = self.node_of.get(traced, value)
        if self.unconverted(operand) is not value:
            raise _Differs
        if value.op == "get_attr" or value.target is aten.scalar_tensor.default:
            if operand is value:
                set_dtype(value, _dtype(traced))
            if value.op != "get_attr":
                value.kwargs = {**value.kwargs, "dtype": _dtype(value)}
        # in the layout that it has
        return node if operand is _origin(node) else operand

    def unconverted(self, node: fx.Node) -> fx.Node:
        """Skip layouts and conversions that do nothing in fp32, down to the node behind them."""
        while node in self.no_ops or node.target in clean.LAYOUTS:
            node = node.args[0]  # type: ignore[assignment]
        return node


class _Differs(Exception):
    """Corresponding ops have different constants or operands."""


def _counts(node: fx.Node) -> bool:
    """Whether a node takes part in the alignment: not a size, copy, layout or scalar constant."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = str(node.target)
    left_out = (*clean.LAYOUTS, aten.scalar_tensor.default)
    return not (
        "_assert" in name or "sym_" in name or node.target in left_out or clean.is_noop(node)
    )


def _key(node: fx.Node) -> Any:
    """Return the op that aligned nodes share; all casts are one op, and so are all views."""
    if str(node.target).startswith(clean.CASTS):
        return TO
    return aten.reshape.default if node.target in _VIEWS else node.target


def _origin(node: Any) -> Any:
    """Skip copies, changes of layout and dropout, down to the node whose value they return."""
    skipped = (*COPIES, *clean.LAYOUTS)
    while isinstance(node, fx.Node) and (node.target in skipped or clean.is_noop(node)):
        node = node.args[0]
    return node


def _dtype(node: Any, part: int | None = None) -> torch.dtype | None:
    """Return the dtype of a node's value, or of one of its several results."""
    value = node.meta.get("type", node.meta.get("val"))
    if part is not None and value is not None:
        value = value[part]
    if part is not None and value is None:
        parts = [u for u in node.users if u.target is operator.getitem and u.args[1] == part]
        return _dtype(parts[0]) if parts else None
    return value.dtype if isinstance(value, (TensorType, Tensor)) else None
