"""An exit with an adapter: one attention between the lower layers and the model's own head.

Kangaroo (Liu et al., arXiv 2404.18911): an attention with a norm before it and one behind it, and
no feed-forward, turns the hidden states of the lower layers into what the head can read. The layers
above, and the logits, stay as they are. The adapter is a copy of the first attention behind the
exit with weights of its own, and it has keys and values of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.analysis.layers import AttentionLayer, attention_layers
from reroll.rewrite.analysis.residual import Stream, Tracer
from reroll.rewrite.capture.rolling.split import split_loop
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.drafting import EXIT_ADAPTER, EXIT_HIDDEN
from reroll.rewrite.ir.hidden import unmark
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.parts import logits_head
from reroll.rewrite.ir.program import Loop, Program, ancestors
from reroll.rewrite.ir.weights import Weight, copy

aten = torch.ops.aten

HINT = "give other `at` or `loop`; reroll show prints the layers"


def add_adapter(program: Program, loop: Loop, at: int) -> tuple[Program, int]:
    """Add an exit with an adapter after `at` trips of a loop; return the number of parameters.

    The loop is cut there, and the Program gets the output `exit_hidden` [batch, time, width]: what
    the head would read if the model ended there. The Program is edited in place. Raises PassError
    if there is no attention to copy, or no linear layer that computes the logits.
    """
    head = logits_head(program)
    if head is None:
        raise PassError("no linear layer computes the logits, so no exit can have it read for it")
    program, pieces = split_loop(program, loop, [at])
    (hidden,) = [n for n in pieces[0].node.users if n.users]
    stream = Tracer(program).trace(hidden)
    if not isinstance(stream, Stream):
        raise PassError(f"{loop.name} has no residual stream: {stream.reason}", hint=HINT)
    layer, trip = _first_behind(program, pieces[0])
    branch, values = _added_by(layer, stream), set(stream.nodes)
    adapter = _Copier(program, hidden, values - set(branch))
    with adapter.build.after(hidden):
        added = adapter.copied(branch[-1], layer.loop, trip)
        early = adapter.build.call(aten.add.Tensor, hidden, added)
        norm = _Copier(program, early, values, adapter)
        result = norm.copied(head.args[0], None, 0)  # type: ignore[arg-type]
    output = program.graph.output_node()
    output.args = ((*output.args[0], result),)  # type: ignore[misc]
    program = replace(
        program,
        weights=program.weights.with_weights(adapter.weights),
        outputs=(*program.outputs, EXIT_HIDDEN),
    )
    trained = [weight for weight in adapter.weights.values() if weight.trainable]
    return program, sum(weight.elements() for weight in trained)


class _Copier:
    """Copier of nodes to the place behind a value, with weights of their own.

    The copies read `hidden` in place of the residual stream. `previous` is a copier for the same
    place, to whose weights those of this one are added.
    """

    def __init__(
        self,
        program: Program,
        hidden: fx.Node,
        stream: Collection[fx.Node],
        previous: _Copier | None = None,
    ) -> None:
        self.program, self.hidden, self.stream = program, hidden, stream
        self.build = Builder(program.graph)
        self.weights: dict[str, Weight] = {} if previous is None else previous.weights
        self.copies: dict[fx.Node, Any] = {}
        # of the main graph, as far as the copies
        self.present = set(_until(program.graph, hidden))

    def copied(self, node: fx.Node, loop: Loop | None, trip: int) -> Any:
        """Copy a node, in a trip of `loop` if it is in one, with all that it is computed from."""
        if node in self.stream:
            return self.hidden
        if node not in self.copies:
            self.copies[node] = self._copied(node, loop, trip)
        return self.copies[node]

    def _copied(self, node: fx.Node, loop: Loop | None, trip: int) -> Any:
        if node.op == "get_attr":
            return self._weight(node, trip)
        if node.op == "placeholder" and loop is not None:
            value = loop.resolve(node, trip)
            return self.copied(value, None, 0) if isinstance(value, fx.Node) else value
        if loop is None and node in self.present and not self._reads_stream(node):
            return node
        if node.op != "call_function" or node in {each.node for each in self.program.loops}:
            raise PassError(f"the attention's branch reads {node.name}", hint=HINT)
        # in the order of the arguments
        for source in node.all_input_nodes:
            self.copied(source, loop, trip)
        new = self.program.graph.node_copy(node, lambda n: self.copied(n, loop, trip))
        unmark(new)
        return new

    def _weight(self, node: fx.Node, trip: int) -> fx.Node:
        name = str(node.target)
        old = self.program.weights[name]
        if not old.trainable and old.index is None:
            return self.build.weight(name, old)
        entry = old.entries[0 if old.index is None else old.index[trip]]
        own = f"{EXIT_ADAPTER}.{_without_layer(name)}"
        self.weights[own] = Weight((copy(entry, len(self.weights)),), trainable=old.trainable)
        return self.build.weight(own, self.weights[own])

    def _reads_stream(self, node: fx.Node) -> bool:
        return any(n in self.stream for n in ancestors([node], stop=self.stream))


def _first_behind(program: Program, lower: Loop) -> tuple[AttentionLayer, int]:
    """Return the first attention that runs behind a loop, or else the last, and its trip."""
    layers = attention_layers(program)
    if not layers:
        raise PassError("there is no attention that the adapter could be a copy of")
    below = set(_until(program.graph, lower.node))
    behind = [x for x in layers if (x.node if x.loop is None else x.loop.node) not in below]
    if behind:
        return min(behind, key=lambda layer: layer.numbers), 0
    last = max(layers, key=lambda layer: layer.numbers[-1])
    return last, len(last.numbers) - 1


def _added_by(layer: AttentionLayer, stream: Stream) -> list[fx.Node]:
    """Return what a layer's attention adds to the residual stream, and products of it by numbers.

    The last of them is what is added.
    """
    for writer in stream.writers:
        read = set(stream.nodes) - {writer}
        inside = ancestors([writer], stop=read)
        if writer.graph is not layer.node.graph or layer.node not in inside:
            continue
        if any(shape(n)[:2] != ("b", "s") for n in inside & read):
            break
        ends = [writer]
        while len(ends[-1].users) == 1 and (user := next(iter(ends[-1].users))) in stream.nodes:
            if user.op != "call_function" or user.target is aten.add.Tensor:
                break
            ends.append(user)
        return ends
    raise PassError(
        f"the attention {layer.node.name} reads and writes no residual stream", hint=HINT
    )


def _until(graph: fx.Graph, last: fx.Node) -> Iterable[fx.Node]:
    """Yield the nodes of a graph up to and including one."""
    for node in graph.nodes:
        yield node
        if node is last:
            return


def _without_layer(name: str) -> str:
    """Return a weight's name without its layer's: `self_attn.q_proj.weight`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit() or part == "*"]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
