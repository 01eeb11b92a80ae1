"""Parts of a Program: some of its values, the layers without their head, and another head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from reroll.errors import UsageError
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.defaults import needed_inputs
from reroll.rewrite.ir.dtypes import CONVERSIONS
from reroll.rewrite.ir.hidden import marks
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.ops import EXIT_LINEAR, loop
from reroll.rewrite.ir.program import Program, drop_unused, weight_nodes
from reroll.rewrite.ir.weights import Source, Weight, WeightTable
from reroll.rewrite.ir.weights.sources import ChainSource, MemorySource

aten = torch.ops.aten

# the name of the weight of a classifier in transformers' decoders
SCORE = "score.weight"

# pointwise ops on one tensor, which may come between the last matrix product and the logits
_POINTWISE = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor,
    aten.add.Scalar, aten.tanh.default, aten.neg.default, *CONVERSIONS,
}  # fmt: skip


def part(program: Program, outputs: Mapping[str, fx.Node]) -> Program:
    """Return the part of a Program that computes these nodes of its main graph, by output name.

    Its auto class is "AutoModel". The Program itself is edited.
    """
    graph = program.graph
    graph.output_node().args = (tuple(outputs.values()),)
    drop_unused(graph)
    inputs = []
    places = [n for n in graph.nodes if n.op == "placeholder"]
    needed = needed_inputs(program, [str(p.target) for p in places if p.users])
    for place, item in zip(places, program.inputs, strict=True):
        if item.name in needed:
            inputs.append(item)
        else:
            graph.erase_node(place)
    bodies = {
        str(node.args[0]): program.bodies[str(node.args[0])]
        for node in graph.nodes
        if isinstance(node, fx.Node) and str(node.args[0] if node.args else "") in program.bodies
    }
    used = {n for g in (graph, *(b.graph for b in bodies.values())) for n in weight_nodes(g)}
    table = WeightTable({n: w for n, w in program.weights.items() if n in used})
    return replace(
        program,
        bodies=bodies,
        weights=table,
        reference=WeightTable(),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        origin=replace(program.origin, auto_class="AutoModel"),
    )


def output_values(program: Program) -> dict[str, fx.Node]:
    """Return the nodes that a Program's outputs are, by name."""
    values: tuple[fx.Node, ...] = program.graph.output_node().args[0]  # type: ignore[assignment]
    return dict(zip(program.outputs, values, strict=True))


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is a weight, in whatever dtype: such as a bias of the logits."""
    while node.target in CONVERSIONS:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def logits_head(program: Program) -> fx.Node | None:
    """Find the linear node that computes the logits of every position; None if there is none.

    Where exits have heads of their own, it is an `exit_linear`.
    """
    node = output_values(program).get("logits")
    while isinstance(node, fx.Node) and node.target in _POINTWISE and len(node.users) == 1:
        tensors = [n for n in node.all_input_nodes if not _is_weight(n)]
        if len(tensors) != 1 or len(shape(tensors[0])) != 3:
            return None
        node = tensors[0]
    if not isinstance(node, fx.Node) or node.target not in (aten.linear.default, EXIT_LINEAR):
        return None
    hidden = shape(node.args[0])
    return node if len(node.users) == 1 and len(hidden) == 3 else None


def last_hidden_state(program: Program) -> fx.Node:
    """Find the last hidden state [batch, time, width] of a model that reads one text.

    That is the last value marked as a hidden state behind all loops, or else the input of the
    language model's head. Raises UsageError if there is none.
    """
    last: fx.Node | None = output_values(program).get("last_hidden_state")
    if last is not None:
        return last
    for node in program.graph.nodes:
        if node.target is loop:
            last = None
        elif "hidden_states" in marks(node):
            last = node
    head = logits_head(program) if program.origin.loss == "shifted" else None
    last = last if last is not None or head is None else head.args[0]  # type: ignore[assignment]
    texts = [i.name for i in program.inputs if i.role == "data"] == ["input_ids"]
    if last is None or not texts:
        raise UsageError(
            f"the hidden states of {program.origin.architecture or 'the model'} are not "
            "taken out of it",
            hint=f"load it by {program.origin.auto_class}, and ask for output_hidden_states",
        )
    return last


def without_head(program: Program) -> Program:
    """Return the layers of a model of text: the Program that gives its last hidden state.

    Raises UsageError if the Program does not show where that is.
    """
    program = program.edit()
    return part(program, {"last_hidden_state": last_hidden_state(program)})


def with_classifier(program: Program, weight: Tensor) -> Program:
    """Replace the head of a decoder by a classifier of sequences, as transformers makes them.

    `weight` [labels, width] gives the logits [batch, labels] at the last token that is no padding,
    by the padding mask. (transformers looks for the last token that is not `pad_token_id`.) Raises
    UsageError as `without_head` does.
    """
    program = without_head(program)
    hidden = last_hidden_state(program)
    masks = [i.name for i in program.inputs if i.role == "padding"]
    places = {str(n.target): n for n in program.graph.nodes if n.op == "placeholder"}
    source = MemorySource({SCORE: weight})
    score = Weight((Source(SCORE, source.meta(SCORE)),))
    builder = Builder(program.graph)
    with builder.before(program.graph.output_node()):
        logits = builder.call(aten.linear.default, hidden, builder.weight(SCORE, score))
        mask = [places[name] for name in masks[:1]]
        logits = builder.trace(_at_last_token, logits, *mask)
    program = part(program, {"logits": logits})
    origin = replace(
        program.origin, auto_class="AutoModelForSequenceClassification", loss="aligned"
    )
    return replace(
        program,
        weights=WeightTable({**program.weights, SCORE: score}),
        source=ChainSource([source, program.source]),
        origin=origin,
    )


def _at_last_token(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Take the logits [batch, time, labels] of the last token of each row, [batch, labels]."""
    if mask is None:
        return logits[:, -1]
    number = mask.to(torch.long).cumsum(1) * mask
    last = number.argmax(-1)[:, None, None].expand(-1, 1, logits.shape[-1])
    return logits.gather(1, last).squeeze(1)
