"""The vocabulary of a Program with another size: its weights, and the types of its graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from reroll.errors import RerollError, UsageError
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import EXIT_LINEAR
from reroll.rewrite.ir.parts import logits_head
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.types import infer, set_type, type_of
from reroll.rewrite.ir.weights import Source, Weight, concat, slice_
from reroll.rewrite.ir.weights.expressions import Expr, Meta

aten = torch.ops.aten
HINT = "resize the original model, and convert that"
# dtypes of tokens
IDS = (torch.int64, torch.int32)
# operations that combine two tensors element by element
_COMBINING = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


@dataclass
class Vocabulary:
    """Weights of a Program that have an element or a row for each token.

    `tables` look up the tokens, that of the main input first. `heads` are weights of linear layers
    over the vocabulary, each with its bias or None. `dims` maps these and all others, such as what
    is added to logits, to the dimension that counts tokens.
    """

    tables: list[str]
    rows: int
    heads: list[tuple[str, str | None]] = field(default_factory=list)
    dims: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, dim: int, shape: tuple[int, ...]) -> None:
        """Note that a dimension of a weight counts tokens, if it has that size."""
        if name not in self.dims and shape[dim] == self.rows:
            self.dims[name] = dim if dim >= 0 else len(shape) + dim


def resized(program: Program, rows: int) -> tuple[Program, Vocabulary]:
    """Return a Program with `rows` tokens in its vocabulary, and the weights that this changes.

    New rows are Sources that its source does not have: see `new_rows`. Raises UsageError, with the
    node or weight, where another size of the vocabulary would not give the same function.
    """
    found = _tables(program)
    head = logits_head(program)
    if head is not None and "Classification" not in program.origin.auto_class:
        _add_head(program, found, head)
    known, failures = -1, list[UsageError]()
    while known < len(found.dims):
        known = len(found.dims)
        _add_tied(program, found)
        edited = program.edit()
        failures = [e for name, g in edited.graphs() for e in _retype(edited, name, g, found, rows)]
    for failure in failures:
        raise failure
    reference = program.reference.without(*(n for n in found.dims if n in program.reference))
    weights = program.weights.with_weights(_weights(program, found, rows))
    return replace(edited, weights=weights, reference=reference), found


def new_rows(program: Program) -> set[str]:
    """Return the names of Sources that a resized Program reads and its source does not have."""
    return program.weights.sources() - set(program.source.names())


def _tables(program: Program) -> Vocabulary:
    """Find the tables in which tokens are looked up, an untied one of a decoder too."""
    data = [i.name for i in program.inputs if i.role == "data" and i.type.dtype in IDS]
    looked_up: dict[str, str] = {}
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, ids = node.args[:2]
        if table.op == "get_attr" and ids.op == "placeholder" and ids.target in data:
            looked_up.setdefault(str(table.target), str(ids.target))
    main = next((table for table, name in looked_up.items() if name == data[0]), None)
    if main is None:
        raise UsageError("the model looks up no tokens")
    if program.origin.config.get("share_encoder_decoder_embeddings") is False:
        raise UsageError("encoder and decoder have a vocabulary each", where=main, hint=HINT)
    found = Vocabulary([main], program.weights[main].meta.shape[0])
    for table in (main, *looked_up):
        found.add(table, 0, program.weights[table].meta.shape)
    found.tables = list(found.dims)
    return found


def _add_head(program: Program, found: Vocabulary, node: fx.Node) -> None:
    """Add the weights and biases of a head over the vocabulary."""
    weights: Any = node.args[3] if node.target is EXIT_LINEAR else [argument(node, "weight")]
    biases: Any = node.args[4] if node.target is EXIT_LINEAR else [argument(node, "bias")]
    for number, weight in enumerate(weights):
        bias = biases[number] if number < len(biases) else None
        if any(isinstance(x, fx.Node) and x.op != "get_attr" for x in (weight, bias)):
            continue
        name, bias_name = str(weight.target), None if bias is None else str(bias.target)
        if program.weights[name].meta.shape[0] != found.rows:
            continue
        found.add(name, 0, program.weights[name].meta.shape)
        if bias_name is not None:
            found.add(bias_name, 0, program.weights[bias_name].meta.shape)
        if (name, bias_name) not in found.heads:
            found.heads.append((name, bias_name))


def _add_tied(program: Program, found: Vocabulary) -> None:
    """Add the other names of stored tensors that are resized."""
    table = program.weights
    same = {
        table.identity(name, entry): dim
        for name, dim in found.dims.items()
        for entry in range(len(table[name].entries))
    }
    for name, weight in table.items():
        dims = {same.get(table.identity(name, entry)) for entry in range(len(weight.entries))}
        if (dim := next(iter(dims - {None}), None)) is not None:
            found.add(name, dim, weight.meta.shape)


def _retype(
    program: Program, name: str, graph: fx.Graph, found: Vocabulary, rows: int
) -> Iterator[UsageError]:
    """Infer the types of all nodes that depend on the vocabulary; note weights that follow.

    Yields an error for each node that does not run: a weight that is noted here may be missing.
    """
    loop = next((x for x in program.loops if x.name == name), None)
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            if (dim := found.dims.get(str(node.target))) is not None:
                set_type(node, _type(program.weights[str(node.target)].meta, dim, rows))
                changed.add(node)
            continue
        read = [n for n in node.all_input_nodes if n in changed]
        if not read:
            continue
        where = f"{name}, {node.name}"
        if node.op == "output" and name == "main":
            continue
        if node.op != "call_function" or node.target is ops.loop:
            yield UsageError("a loop carries a value of the vocabulary's size", where, HINT)
            continue
        if node.target is aten.embedding.default:
            padding = argument(node, "padding_idx")
            if padding >= rows:
                node.args = (*node.args[:2], -1, *node.args[3:])
        elif found.rows in _numbers((node.args, node.kwargs)):
            yield UsageError(f"{node.target} names the vocabulary's size", where, HINT)
        _follow(program, node, found)
        try:
            if _infer(node, loop, found.rows, rows):
                changed.add(node)
        except RerollError as error:
            yield UsageError(f"{node.target}: {error.message}", where, HINT)


def _follow(program: Program, node: fx.Node, found: Vocabulary) -> None:
    """Note the weights that have to be resized with the value that a node computes."""
    if node.target in (aten.linear.default, EXIT_LINEAR):
        _add_head(program, found, node)
    elif node.target in _COMBINING:
        for other in node.all_input_nodes:
            while other.target in CONVERSIONS:
                other = other.all_input_nodes[0]
            weight = program.weights.get(str(other.target)) if other.op == "get_attr" else None
            if weight is not None and weight.meta.shape:
                found.add(str(other.target), -1, weight.meta.shape)


def _infer(node: fx.Node, loop: Loop | None, old: int, rows: int) -> bool:
    """Infer a node's type; return whether it changed.

    Raises UsageError for another change than that of the vocabulary's size.
    """
    before = type_of(node)
    infer(node, loop)
    after = type_of(node)
    if before is None or after is None:
        return True
    expected = before.shape
    if len(after.shape) == len(before.shape):
        sizes = zip(before.shape, after.shape, strict=True)
        expected = tuple(rows if b == old and a == rows else b for b, a in sizes)
    if after.shape != expected:
        raise UsageError(f"it would return {after}, and not {before}")
    return after != before


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for each in value:
            yield from _numbers(each)
    elif type(value) is int:
        yield value


# ---- weights


def _type(meta: Meta, dim: int, rows: int) -> TensorType:
    return TensorType(meta.dtype, (*meta.shape[:dim], rows, *meta.shape[dim + 1 :]))


def _weights(program: Program, found: Vocabulary, rows: int) -> dict[str, Weight]:
    """Return the resized weights: rows of the old expressions, then new rows."""
    taken = set(program.source.names())
    made: dict[Any, Expr] = {}
    weights = {}
    for name, dim in found.dims.items():
        weight, entries = program.weights[name], []
        for number, entry in enumerate(weight.entries):
            key = program.weights.identity(name, number)
            if key not in made and rows < found.rows:
                made[key] = slice_(entry, dim, 0, rows)
            elif key not in made:
                stored = f"{name.replace('*', str(number))}.new_rows"
                while stored in taken:
                    stored = f"{stored}_"
                type_ = _type(weight.meta, dim, rows - found.rows)
                new = Source(stored, Meta(tuple(map(int, type_.shape)), weight.meta.dtype))
                made[key] = concat(dim, [entry, new])
            entries.append(made[key])
        weights[name] = Weight(tuple(entries), weight.index, weight.trainable)
    return weights
