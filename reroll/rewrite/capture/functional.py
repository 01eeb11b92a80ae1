"""Functionalise a traced graph: writes to tensors become ops that return the result.

A write to a tensor `x` is the op without the write, whose result later nodes read in place of `x`.
A write to a view, as in `x[:, 1] = y`, is scattered into what it views; views that are read later
are taken of the result again:

    v = slice(x, ...); v.copy_(y)   ->   x' = slice_scatter(x, copy(v, y), ...)

`exported.run_decompositions` does so for all writes, but traces the graph twice, which takes longer
than the export.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# ops that return their argument, or a copy
COPIES = {
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
}
# views, and the op that returns the viewed tensor with other values there
_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def mutates(graph: fx.Graph) -> bool:
    """Whether a graph writes to tensors in place."""
    return any(map(writes, graph.nodes))


def writes(node: fx.Node) -> bool:
    """Whether a node writes to a tensor in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and node.target not in COPIES


def functionalise(graph: fx.Graph) -> None:
    """Replace the writes of a graph, whose nodes have their fake values as `meta["val"]`.

    The graph stays as it is if one of them is not understood: if it writes to an input or a weight,
    if another kind of view shows the write, or if the op without the write has another dtype or
    memory layout.
    """
    written = [node for node in graph.nodes if writes(node)]
    order = {node: i for i, node in enumerate(graph.nodes)}
    if written and all(_is_understood(node, order) for node in written):
        _Functionalised(graph).run()


class _Functionalised:
    """The values that stand for tensors which were written, while a graph is walked."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.base = {node: _base(node) for node in graph.nodes}
        self.viewed: dict[fx.Node, Any] = {n: n.args[0] for n in graph.nodes if _is_view(n)}
        # of tensors that were written: what stands for them now
        self.now: dict[fx.Node, fx.Node] = {}
        # of views: what stood for their base when they were taken, and what they are now
        self.views: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def run(self) -> None:
        replaced = []
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                if writes(node):
                    self._write(node)
                    replaced.append(node)
                    continue
                node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
            base = self.base[node]
            if node in self.viewed and base is not None:
                self.views[node] = self.now.get(base, base), node
        for node in reversed(replaced):
            self.graph.erase_node(node)

    def _write(self, node: fx.Node) -> None:
        base, target = self.base[node], _written(node)
        assert base is not None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        new = self._add(_functional(node), args, kwargs, node.meta)
        while target in self.viewed:
            whole = self._value(self.viewed[target])
            args = (whole, new, *target.args[1:])
            new = self._add(_SCATTERS[target.target], args, target.kwargs, whole.meta)
            target = _written(self.viewed[target])
        self.now[base] = new

    def _value(self, node: fx.Node) -> fx.Node:
        """Return what stands for a node at this place of the graph."""
        base = self.base.get(node)
        if base is None or base not in self.now:
            return node
        node, now = _written(node), self.now[base]
        if node is base:
            return now
        before, view = self.views[node]
        if before is not now:
            args = (self._value(self.viewed[node]), *node.args[1:])
            view = self._add(node.target, args, node.kwargs, node.meta)
            self.views[node] = now, view
        return view

    def _add(self, target: Any, args: Any, kwargs: Any, meta: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(meta)
        return node


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _SCATTERS


def _written(node: Any) -> fx.Node:
    """Return the tensor that a write returns, or the node itself if it is none."""
    while writes(node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _base(node: Any) -> fx.Node | None:
    """Return the tensor that an op made, of which a node is a view or a write; None for others."""
    while isinstance(node, fx.Node) and (writes(node) or _is_view(node)):
        node = node.args[0]
    return node if _is_fresh(node) else None


def _is_fresh(node: Any) -> bool:
    """Whether an op made a tensor that shares no data with another."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if getattr(node.target, "__name__", "") == "getitem":
        source = node.args[0]
        return isinstance(source, fx.Node) and _schema(source) is not None and not _shares(source)
    return _schema(node) is not None and not _shares(node)


def _shares(node: fx.Node) -> bool:
    """Whether what a node returns may share data with an argument."""
    schema = _schema(node)
    return schema is None or any(value.alias_info for value in schema.returns)


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _functional(node: fx.Node) -> Any:
    """Return the op that returns what a node writes, or None."""
    schema = _schema(node)
    name, overload = schema.name.removeprefix("aten::"), schema.overload_name or "default"
    if not name.endswith("_"):
        return None
    return getattr(getattr(aten, name.removesuffix("_"), None), overload, None)


def _is_understood(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    base, function = _base(node), _functional(node)
    if base is None or function is None or any("val" not in n.meta for n in node.all_input_nodes):
        return False
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
    new, target = function(*args, **kwargs), _written(node)
    if new.dtype != target.meta["val"].dtype or new.shape != target.meta["val"].shape:
        return False
    while _is_view(target):
        (viewed, *where), kwargs = fx.node.map_arg((target.args, target.kwargs), _value)
        new = _SCATTERS[target.target](viewed, new, *where, **kwargs)
        target = _written(target.args[0])
    if str(new.stride()) != str(target.meta["val"].stride()):
        return False
    return not any(_shows(other, node, order) for other in _other_views(base))


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _other_views(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that may share data with a tensor, its views and writes, but are neither."""
    found = []
    for user in node.users:
        if writes(user) or _is_view(user):
            if user.args[0] is node:
                found += _other_views(user)
        elif user.op == "call_function" and _shares(user):
            found.append(user)
    return found


def _shows(view: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a view that was taken before a write is read after it."""
    return order[view] < order[write] < _last_use(view, order)


def _last_use(node: fx.Node, order: dict[fx.Node, int]) -> int:
    last = order[node]
    for user in node.users:
        again = user.op == "call_function" and _shares(user)
        last = max(last, _last_use(user, order) if again else order[user])
    return last
