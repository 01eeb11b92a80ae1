"""Clean an exported program: weights by name, and no guards, devices or no-ops."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from reroll.errors import CaptureError
from reroll.rewrite.capture.functional import COPIES, functionalise, mutates
from reroll.rewrite.ir.hidden import stand_in
from reroll.rewrite.ir.records import Dim, TensorType
from reroll.rewrite.ir.types import set_type, type_of

aten = torch.ops.aten

_WRAPPERS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
LAYOUTS = {aten.contiguous.default, aten.clone.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default}
CASTS = ("aten.to.", "aten._to_copy", "aten.type_as.")
_PLACEMENT = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy")


@dataclass(frozen=True)
class Flat:
    """Flat graph: placeholders are the model's inputs, `get_attr` nodes its weights."""

    graph: fx.Graph
    outputs: tuple[str, ...]
    shapes: dict[str, tuple[Dim, ...]]
    dtypes: dict[str, torch.dtype]


def flatten(
    exported: torch.export.ExportedProgram,
    dims: dict[str, tuple[Dim, ...]],
    aliases: dict[str, str],
) -> Flat:
    """Rewrite an exported program as a flat graph; it keeps all dtype conversions.

    `dims` names the dynamic dimensions of each input. `aliases` maps each further name of a weight
    to the one to use. `drop_casts` removes the conversions that do nothing.

    Raises CaptureError if the graph writes to a buffer or to a tensor in place.
    """
    functionalise(exported.graph)
    if mutates(exported.graph):
        # two traces more, which functionalise all writes and decompose nothing
        exported = exported.run_decompositions({})
        if mutates(exported.graph):
            raise CaptureError("the model changes a tensor in place in a way that export keeps")
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    names = _weight_names(exported)
    users = [
        s.arg.name for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT
    ]
    by_name = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    symbols = _symbols({name: by_name[node] for name, node in zip(dims, users, strict=True)}, dims)
    shapes: dict[str, tuple[Dim, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, node in zip(dims, users, strict=True):
        type_ = _type(by_name[node].meta["val"], symbols)
        assert type_ is not None
        values[by_name[node]] = placeholder = graph.placeholder(name)
        set_type(placeholder, type_)
        shapes[name], dtypes[name] = type_.shape, type_.dtype
    for name, node in by_name.items():
        constant = exported.constants.get(f"model.{names[name]}") if name in names else None
        if isinstance(constant, Tensor) and constant.dim() == 0 and "lifted" in names[name]:
            values[node] = constant
        elif name in names:
            values[node] = aliases.get(names[name], names[name])
    weights: dict[str, fx.Node] = {}
    graph.output(
        _copy_nodes(exported.graph, exported.graph_module, graph, values, weights, symbols)
    )
    graph.eliminate_dead_code()
    assert exported.call_spec.out_spec is not None
    outputs = tuple(map(str, exported.call_spec.out_spec.context))
    return Flat(graph, outputs, shapes, dtypes)


def drop_casts(graph: fx.Graph) -> None:
    """Remove conversions of tensors to the dtype that they already have."""
    for node in list(graph.nodes):
        if node.target is not aten.to.dtype:
            continue
        source: Any = node.args[0]
        type_ = type_of(source)
        if type_ is not None and type_.dtype == node.args[1]:
            stand_in(node, source)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _weight_names(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """Map the placeholder of each parameter, buffer and constant to its name in the model."""
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    signature = exported.graph_signature
    changed = [s for s in signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION]
    if changed:
        raise CaptureError(f"the model writes to its buffer {changed[0].target}")
    return {
        spec.arg.name: str(spec.target).removeprefix("model.")
        for spec in signature.input_specs
        if spec.kind in kinds
    }


def _symbols(nodes: dict[str, fx.Node], dims: dict[str, tuple[Dim, ...]]) -> dict[str, str]:
    """Map each symbol of the exporter to the name of its dynamic dimension."""
    names: dict[str, str] = {}
    for name, node in nodes.items():
        for size, dim in zip(node.meta["val"].shape, dims[name], strict=True):
            if isinstance(dim, str) and isinstance(size, torch.SymInt):
                names.setdefault(str(size.node.expr), dim)
    return names


def _type(value: Any, symbols: dict[str, str]) -> TensorType | None:
    if not isinstance(value, Tensor):
        return None
    return TensorType(value.dtype, tuple(_dim(size, symbols) for size in value.shape))


def _dim(size: Any, symbols: dict[str, str]) -> Dim:
    if isinstance(size, int):
        return size
    text = str(size.node.expr)
    for symbol in sorted(symbols, key=len, reverse=True):
        text = text.replace(symbol, symbols[symbol])
    return text


def _copy_nodes(
    old: fx.Graph,
    owner: Any,
    graph: fx.Graph,
    values: dict[fx.Node, Any],
    weights: dict[str, fx.Node],
    symbols: dict[str, str],
) -> Any:
    """Append the nodes of `old` to `graph`; return the copied arguments of its output node."""

    def resolve(node: fx.Node) -> Any:
        value = values[node]
        if isinstance(value, Tensor):
            values[node] = value = _scalar(graph, value)
        if isinstance(value, str):
            if value not in weights:
                weights[value] = graph.get_attr(value)
                type_ = _type(node.meta.get("val"), symbols)
                set_type(weights[value], type_)
            return weights[value]
        return value

    for node in old.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args[0], resolve)
        if node.op == "get_attr":
            values[node] = getattr(owner, str(node.target))
            continue
        target = str(node.target)
        if "_assert" in target or "sym_constrain_range" in target or node.op == "call_module":
            continue
        if any(wrapper in target for wrapper in _WRAPPERS):
            values[node] = _inline(node, graph, values, weights, symbols, resolve)
            continue
        args = fx.node.map_arg(node.args, resolve)
        kwargs = fx.node.map_arg(node.kwargs, resolve)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            values[node] = args[0][args[1]]
            continue
        if is_noop(node):
            values[node] = args[0]
            continue
        values[node] = _append(graph, node, args, kwargs, symbols)
    return None


def _scalar(graph: fx.Graph, value: Tensor) -> fx.Node:
    """Add a node for a scalar constant that the model holds as a tensor."""
    node = graph.call_function(aten.scalar_tensor.default, (value.item(),), {"dtype": value.dtype})
    set_type(node, TensorType(value.dtype, ()))
    return node


def _inline(
    node: fx.Node,
    graph: fx.Graph,
    values: dict[fx.Node, Any],
    weights: dict[str, fx.Node],
    symbols: dict[str, str],
    resolve: Any,
) -> Any:
    """Copy the nodes of a subgraph that the exporter wrapped because of a context manager."""
    position = next(
        i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"
    )
    inner = values[node.args[position]]  # type: ignore[index]
    if "autocast" in str(node.target) and node.args[2] is True:
        raise CaptureError("the model turns autocast on inside its forward")
    arguments = node.args[position + 1 :]
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    for placeholder, argument in zip(placeholders, arguments, strict=True):
        values[placeholder] = resolve(argument) if isinstance(argument, fx.Node) else argument
    return _copy_nodes(inner.graph, inner, graph, values, weights, symbols)


def is_noop(node: fx.Node) -> bool:
    """Whether a node returns its first argument unchanged, in eval mode and whatever the device."""
    args: tuple[Any, ...] = node.args
    if node.target in _DROPOUTS:
        return bool(args[1] == 0) or args[2] is False
    if node.target in COPIES:
        return True
    first = args[0] if args else None
    if not isinstance(first, fx.Node):
        return False
    before, after = first.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if node.target in LAYOUTS:
        # matrix products may round differently in another memory layout
        return str(before.stride()) == str(after.stride())
    if str(node.target) == "aten.slice.Tensor":
        start, end, step = (*args, *(0, None, None, 1)[len(args) - 1 :])[2:]
        return start in (0, None) and end in (None, 2**63 - 1) and bool(step == 1)
    return False


def _append(
    graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any, symbols: dict[str, str]
) -> fx.Node:
    target: Any = node.target
    kwargs = {k: v for k, v in kwargs.items() if k not in _PLACEMENT}
    name = str(target)
    value = node.meta.get("val")
    if name.startswith(CASTS) and isinstance(value, Tensor):
        target, args, kwargs = aten.to.dtype, (args[0], value.dtype), {}
    elif name == "reroll.cache.default":
        args = args[:2]
    elif target in LAYOUTS:
        target, args = aten.contiguous.default, args[:1]
    elif target in (aten.view.default, aten._unsafe_view.default):
        # without the copies that were dropped, strides may not permit a view
        target = aten.reshape.default
    new = graph.create_node("call_function", target, args, kwargs, name=node.name)
    set_type(new, _type(value, symbols))
    return new
