"""Convert a Program to another dtype: which of its conversions stay, and which change with it.

In fp32, a conversion to fp32 and one to the model's own dtype both do nothing, so they cannot be
distinguished. In half precision they can: fp32 is what the model asks for, and its own dtype
changes with the Program. A Program in fp32 keeps conversions of the first kind as `reroll.widen`.
`Program.halves` lists the half-precision dtypes for which this is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from reroll.errors import RerollError, UsageError
from reroll.rewrite.ir.hidden import stand_in
from reroll.rewrite.ir.ops import WIDEN
from reroll.rewrite.ir.program import Loop, Program, copy
from reroll.rewrite.ir.records import Input, TensorType
from reroll.rewrite.ir.shapes import concrete
from reroll.rewrite.ir.types import run_without_data, set_dtype, set_type, type_of
from reroll.rewrite.ir.weights import Weight, WeightTable, cast

log = logging.getLogger(__name__)

aten = torch.ops.aten
# the ops that only change the dtype of a value
CONVERSIONS = (aten.to.dtype, WIDEN)

HALVES = (torch.bfloat16, torch.float16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# sizes of symbolic dimensions for inferring types
_SIZES = {"b": 2, "s": 3, "t": 3, "e": 4, "l": 5}
_LIMITS = ("min", "max")


def dtype_of(
    value: torch.dtype | str | None, default: torch.dtype | None = None
) -> torch.dtype | None:
    """Return the dtype that an option names: one of `DTYPES`, or `own` for "auto" and None.

    Raises UsageError for anything else.
    """
    if value is None or value == "auto":
        return default
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in DTYPES.values():
        raise UsageError(f"{value!r:.80} is no dtype to compute in", hint=f"use {_names(DTYPES)}")
    return dtype


def retype(program: Program, dtype: torch.dtype | str | None) -> Program:
    """Convert a Program to another dtype.

    Conversion to fp32 is exact for the weights; a warning names constants that the model computes
    of its configuration, which were rounded when it was captured. Conversion to half precision
    rounds the trainable weights, and gives the graph that a capture in half precision has. Raises
    UsageError where that graph is not known.
    """
    if dtype == program.dtype:
        return program
    target = dtype_of(dtype, program.dtype) or program.dtype
    if target == program.dtype:
        return program
    if program.dtype not in DTYPES.values() or (target in HALVES and target not in program.halves):
        raise UsageError(
            f"a program in {_name(program.dtype)} does not run in {_name(target)}",
            hint="capture the original model in it: "
            f"capture(model, dtype={_name(target)!r}), or reroll convert --dtype {_name(target)}",
        )
    if program.dtype in HALVES:
        _warn_of_rounded(program)
    graphs = retype_graphs(program, target)
    weights = {name: _weight(w, program.dtype, target) for name, w in graphs.weights.items()}
    reference = {name: _weight(w, program.dtype, target) for name, w in graphs.reference.items()}
    draft = None if program.draft is None else retype(program.draft, target)
    result = replace(
        graphs, weights=WeightTable(weights), reference=WeightTable(reference), draft=draft
    )
    if target in HALVES:
        infer_types(result)
    return result


def _warn_of_rounded(program: Program) -> None:
    """Warn of constants, such as Gemma's scale of embeddings, that half precision has rounded."""
    weights = program.weights.items()
    rounded = [n for n, w in weights if not w.trainable and w.meta.dtype == program.dtype]
    if rounded:
        log.warning(
            "rounded to %s, in which the model was captured: %s; capture it in float32 for the "
            "original's own",
            _name(program.dtype),
            ", ".join(rounded),
        )


def retype_graphs(program: Program, dtype: torch.dtype) -> Program:
    """Convert the graphs and inputs of a Program to another dtype; keep the weights unchanged."""
    old, program = program.dtype, program.edit()
    for _, graph in program.graphs():
        follow_limits(graph, old, dtype)
        for node in list(graph.nodes):
            if dtype == torch.float32:
                _keep_wide(node)
            _follow(node, old, dtype)
    inputs = tuple(_retype_input(i, old, dtype) for i in program.inputs)
    halves = tuple(dict.fromkeys((*program.halves, *((old,) if old in HALVES else ()))))
    return replace(program, inputs=inputs, dtype=dtype, halves=halves)


def _retype_input(item: Input, old: torch.dtype, new: torch.dtype) -> Input:
    """Convert an input and its default to another dtype."""
    default = None if item.default is None else copy(item.default)
    for node in () if default is None else default.nodes:
        _follow(node, old, new)
    type_ = TensorType(new if item.type.dtype == old else item.type.dtype, item.type.shape)
    return replace(item, type=type_, default=default)


def _weight(weight: Weight, old: torch.dtype, new: torch.dtype) -> Weight:
    # weights that are not trainable, such as rotary frequencies, stay in fp32
    if weight.meta.dtype != old or (new in HALVES and old not in HALVES and not weight.trainable):
        return weight
    entries = tuple(cast(entry, new) for entry in weight.entries)
    return Weight(entries, weight.index, weight.trainable)


def _keep_wide(node: fx.Node) -> None:
    """Write a half-precision node's own request for fp32 as `reroll.widen`."""
    if node.op != "call_function" or not _asks_for(node, torch.float32):
        return
    if node.target is aten.to.dtype:
        node.target, node.args, node.kwargs = WIDEN, node.args[:1], {}
        return
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    position = names.index("dtype") if "dtype" in names else len(names)
    first = node.args[0] if node.args else None
    if values.get("dtype") != torch.float32 or position < len(node.args) - 1:
        raise UsageError(f"{node.target} in fp32 inside a program in half precision")
    node.args = node.args[:position]
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}
    graph = node.graph
    if isinstance(first, fx.Node) and (type_ := type_of(first)) is not None:
        with graph.inserting_before(node):
            wide = graph.call_function(WIDEN, (first,))
        set_type(wide, TensorType(torch.float32, type_.shape))
        node.update_arg(0, wide)
        return
    # without the dtype argument, the op returns integers or fp32
    type_ = node.meta["type"]
    with graph.inserting_after(node):
        wide = graph.call_function(WIDEN, (node,))
    set_type(wide, type_)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)


def widen_node(node: fx.Node, half: torch.dtype) -> None:
    """Convert a node of a program in half precision to fp32."""
    _keep_wide(node)
    _follow(node, half, torch.float32)


def _asks_for(node: fx.Node, dtype: torch.dtype) -> bool:
    values = (*node.args, *node.kwargs.values())
    return any(isinstance(v, torch.dtype) and v == dtype for v in values)


def follow_limits(graph: fx.Graph, old: torch.dtype, new: torch.dtype) -> None:
    """Replace the limits of one dtype, such as a mask's minimum, by those of another."""
    limits = {getattr(torch.finfo(old), n): getattr(torch.finfo(new), n) for n in _LIMITS}
    for node in graph.nodes:
        _replace(node, lambda v: limits.get(v, v) if type(v) is float else v)


def _replace(node: fx.Node, change: Callable[[Any], Any]) -> None:
    """Apply `change` to the constants among a node's arguments."""

    def inside(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(inside, value))
        return value if isinstance(value, fx.Node) else change(value)

    node.args = tuple(inside(a) for a in node.args)
    node.kwargs = {k: inside(v) for k, v in node.kwargs.items()}


def _follow(node: fx.Node, old: torch.dtype, new: torch.dtype) -> None:
    """Replace the dtype `old` by `new` in a node's arguments and type."""
    _replace(node, lambda v: new if isinstance(v, torch.dtype) and v == old else v)
    if node.target is WIDEN and new in HALVES:
        node.target, node.args = aten.to.dtype, (*node.args, torch.float32)
    type_ = type_of(node)
    if type_ is not None and type_.dtype == old:
        set_dtype(node, new)


def without_casts(program: Program) -> Program:
    """Drop the conversions of an fp32 Program that matter in half precision only."""
    program = program.edit()
    for _, graph in program.graphs():
        for node in list(graph.nodes):
            if node.op == "call_function":
                _drop_cast(node)
        graph.eliminate_dead_code()
    return program


def _drop_cast(node: fx.Node) -> None:
    if node.target is WIDEN:
        node.target, node.args = aten.to.dtype, (*node.args, torch.float32)
    if node.target is aten.to.dtype:
        source: Any = node.args[0]
        type_ = type_of(source)
        if type_ is not None and type_.dtype == node.args[1]:
            stand_in(node, source)
    elif node.target is not aten.arange.start and _asks_for(node, torch.float32):
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None else [a.name for a in schema.arguments]
        if "dtype" in names and names.index("dtype") >= len(node.args) - 1:
            node.args = node.args[: names.index("dtype")]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}


# ---- the types of nodes


def infer_types(program: Program) -> None:
    """Infer the dtypes of all nodes by running the graphs on meta tensors.

    Raises UsageError at a node that does not run.
    """
    inputs = [_empty(i.type) for i in program.inputs]
    _infer(program, "main", program.graph, inputs, None)


def _empty(type_: TensorType) -> torch.Tensor:
    shape = [concrete(dim, _SIZES) for dim in type_.shape]
    return torch.empty(shape, dtype=type_.dtype, device="meta")


def _infer(
    program: Program, name: str, graph: fx.Graph, arguments: list[Any], trip: int | None
) -> Any:
    values: dict[fx.Node, Any] = {}
    loops = {loop.node: loop for loop in program.loops} if name == "main" else {}
    feed = iter(arguments)
    run: Callable[[Any], Any] = lambda value: fx.node.map_arg(value, values.__getitem__)  # noqa: E731
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            meta = program.weights[str(node.target)].meta
            values[node] = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
        elif node.op == "output":
            return run(node.args[0])
        elif node in loops:
            values[node] = _infer_loop(program, loops[node], run)
        else:
            values[node] = _call(name, node, run)
        if isinstance(values[node], torch.Tensor):
            set_dtype(node, values[node].dtype)
    return ()


def _infer_loop(program: Program, loop: Loop, run: Callable[[Any], Any]) -> Any:
    inputs = [run(loop.input_for(i, 0)) for i in range(len(loop.inputs))]
    return _infer(program, loop.name, loop.body.graph, [*run(loop.carry), *inputs], 0)


def _call(name: str, node: fx.Node, run: Callable[[Any], Any]) -> Any:
    try:
        return run_without_data(node.target, run(node.args), dict(run(node.kwargs)))
    except RerollError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{node.target} does not run in another dtype: {reason}", where=f"{name}, {node.name}"
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(names: Any) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
