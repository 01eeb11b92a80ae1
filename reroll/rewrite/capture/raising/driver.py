"""Raise idioms of the flat graph to single ops, each checked numerically against its region."""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx

from reroll.rewrite.capture.entries import move_weights
from reroll.rewrite.capture.raising.attention import ATTENTION_RULES, absorb_masks
from reroll.rewrite.capture.raising.idioms import RULES, RewriteRule
from reroll.rewrite.capture.raising.recurrences import RECURRENCE_RULES
from reroll.rewrite.ir import weights as lazy
from reroll.rewrite.ir.hidden import keep_complete, stand_in, unmark
from reroll.rewrite.ir.matching import match
from reroll.rewrite.ir.ops import MASK
from reroll.rewrite.ir.patterns import Match, Miss, nearest
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.shapes import concrete, drop_copies, tidy_shapes
from reroll.rewrite.ir.types import set_type, type_of
from reroll.rewrite.ir.weights import Weight

log = logging.getLogger(__name__)
aten = torch.ops.aten

# relative RMS error in fp32 up to which a replacement counts as the same function
TOLERANCE = 1e-5
_SIZES = {"b": 2, "s": 3, "t": 3, "e": 4, "l": 5}


def raise_idioms(program: Program) -> Program:
    """Raise the idioms of a Program to single ops. Regions that match nothing stay unchanged."""
    before, program = program, raise_linears(program.edit())
    graph = program.graph
    drop_copies(graph)
    tidy_shapes(graph)
    checked: dict[Any, bool] = {}
    for rule in (*RECURRENCE_RULES, *RULES, *ATTENTION_RULES):
        apply_rule(graph, rule, checked)
    absorb_masks(graph)
    tidy_shapes(graph)
    graph.lint()
    keep_complete(program, before)
    return program.pruned()


def apply_rule(graph: fx.Graph, rule: RewriteRule, checked: dict[Any, bool]) -> int:
    """Replace every region that the rule matches; return their number.

    `checked` caches whether a replacement computes the same, by the ops and types of its region.
    """
    done, misses = 0, []
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        result = (
            rule.pattern(node) if callable(rule.pattern) else match(rule.pattern, node, rule.name)
        )
        if not result:
            misses.append(result)
            continue
        with graph.inserting_before(node):
            new = rule.rewrite(graph, node, result)
        if isinstance(new, Miss):
            misses.append(new)
            continue
        if not _same(node, new, result, rule.name, checked):
            misses.append(
                Miss("the replacement computes something else", (node.name,), rule.name, 99)
            )
            _erase(graph, new, node)
            continue
        unmark(new)
        move_weights(_region(node, result), new)
        stand_in(node, new)
        # an op with dropout counts as impure, so dead-code elimination does not remove it
        graph.erase_node(node)
        done += 1
    if done:
        graph.eliminate_dead_code()
    elif misses:
        log.debug("%s: no match; the nearest: %s", rule.name, nearest(misses))
    return done


def _region(root: fx.Node, match: Match) -> list[fx.Node]:
    """Return the nodes of a match from which `root` is computed."""
    found = [root]
    for node in found:
        inside = (n for n in node.all_input_nodes if n.name in match.nodes)
        found.extend(dict.fromkeys(n for n in inside if n not in found))
    return found[1:]


def _erase(graph: fx.Graph, new: fx.Node, root: fx.Node) -> None:
    """Undo a replacement: erase the nodes without users right before the root."""
    node = new
    while node.op == "call_function" and not node.users and node is not root:
        before = node.prev
        graph.erase_node(node)
        node = before


def _same(root: fx.Node, new: fx.Node, match: Match, rule: str, checked: dict[Any, bool]) -> bool:
    """Whether region and replacement agree on random inputs; equal regions are checked once."""
    region = set(match.nodes)
    inputs: list[fx.Node] = []
    order: list[fx.Node] = []

    def visit(node: fx.Node, inside: Any) -> None:
        if node in order or node in inputs:
            return
        if not inside(node):
            inputs.append(node)
            return
        for argument in node.all_input_nodes:
            visit(argument, inside)
        order.append(node)

    visit(root, lambda n: n.name in region)
    old_order, order = order, []
    bound = set(inputs) | {n for n in match.bound.values() if isinstance(n, fx.Node)}
    visit(new, lambda n: n not in bound and n.op == "call_function")
    key = (
        rule,
        tuple((str(n.target), _constants(n)) for n in (*old_order, *order)),
        tuple(str(n.meta.get("type")) for n in inputs),
    )
    if key not in checked:
        checked[key] = _agree(inputs, old_order, order, root, new)
    return checked[key]


def _constants(node: fx.Node) -> str:
    return str(fx.node.map_arg((node.args, node.kwargs), lambda n: "."))


def _agree(
    inputs: list[fx.Node], old: list[fx.Node], new: list[fx.Node], root: fx.Node, last: fx.Node
) -> bool:
    generator = torch.Generator().manual_seed(0)
    try:
        values = {node: _example(node, generator) for node in inputs}
        with torch.no_grad():
            expected = _evaluate(old, dict(values))[root]
            actual = _evaluate(new, dict(values))[last]
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError) as error:
        log.debug("a replacement of %s could not be checked: %s", root.name, error)
        return False
    if expected.shape != actual.shape:
        return False
    distance = (actual.double() - expected.double()).pow(2).mean().sqrt()
    return bool(distance <= TOLERANCE * expected.double().pow(2).mean().sqrt() + 1e-12)


def _example(node: fx.Node, generator: torch.Generator) -> Any:
    """Draw a random value of a node's type, in fp32 where it is floating."""
    type_ = type_of(node)
    if type_ is None:
        return _integer(node)
    shape = [concrete(dim, _SIZES) for dim in type_.shape]
    if node.target is MASK:
        # equivalent computations of a mask may differ on tensors that are no masks
        hidden = torch.rand(shape, generator=generator) < 0.3
        hidden[..., :2] = False
        return torch.where(hidden, torch.finfo(torch.float32).min, 0.0)
    if type_.dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    values = torch.randint(0, 2, shape, generator=generator)
    if values.dim() > 1 and values.shape[-1] > 1:
        # a row has a True and a False, so neither polarity of the condition masks all of it
        values[..., 0], values[..., 1] = 1, 0
    return values.to(type_.dtype)


def _integer(node: Any) -> int:
    """Compute the value of a size node from the example sizes."""
    if not isinstance(node, fx.Node):
        return int(node)
    args: tuple[Any, ...] = node.args
    if node.target is aten.sym_size.int:
        return concrete(args[0].meta["type"].shape[args[1]], _SIZES)
    target: Any = node.target
    if getattr(target, "__module__", "") == operator.add.__module__:
        return int(target(*map(_integer, args)))
    raise KeyError(node.name)


def _evaluate(order: list[fx.Node], values: dict[fx.Node, Any]) -> dict[fx.Node, Tensor]:
    half = (torch.bfloat16, torch.float16)

    def wide(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(wide(v) for v in value)
        return torch.float32 if value in half else value

    for node in order:
        if node not in values:
            target: Any = node.target
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            args = tuple(a if isinstance(a, Tensor) else wide(a) for a in args)
            values[node] = target(*args, **kwargs)
    return values


def raise_linears(program: Program) -> Program:
    """Turn products with a stored matrix into `linear`, over its transpose in the weight table.

    A matrix with any other reader stays unchanged.
    """
    weights, graph = program.weights, program.graph
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        for user in [u for u in node.users if _is_transpose(u)]:
            if all(_product(product, user) for product in user.users):
                for product in list(user.users):
                    product.target, product.args = aten.linear.default, (product.args[0], node)
                graph.erase_node(user)
        uses = [_product(user, node) for user in node.users]
        if not uses or not all(uses) or len(weights[name].meta.shape) != 2:
            continue
        entry = lazy.transpose(weights[name].entries[0])
        weights = weights.with_weight(name, Weight((entry,), trainable=weights[name].trainable))
        if (type_ := type_of(node)) is not None:
            set_type(node, TensorType(type_.dtype, type_.shape[::-1]))
        for user in list(node.users):
            bias = user.args[0] if user.target is aten.addmm.default else None
            x = user.args[1] if user.target is aten.addmm.default else user.args[0]
            user.target, user.args, user.kwargs = aten.linear.default, (x, node, bias), {}
    return program.with_weights(weights)


def _is_transpose(user: fx.Node) -> bool:
    args: tuple[Any, ...] = user.args
    if user.target is aten.permute.default:
        return list(args[1]) == [1, 0]
    if user.target is aten.transpose.int:
        return sorted(d % 2 for d in args[1:3]) == [0, 1]
    return user.target in (aten.t.default, aten.numpy_T.default)


def _product(user: fx.Node, weight: fx.Node) -> bool:
    if user.target is aten.addmm.default:
        bias = user.args[0]
        vector = isinstance(bias, fx.Node) and len(bias.meta["type"].shape) == 1
        return vector and user.args[2] is weight and user.args[1] is not weight and not user.kwargs
    if user.target in (aten.mm.default, aten.matmul.default):
        return user.args[1] is weight and user.args[0] is not weight
    return False
