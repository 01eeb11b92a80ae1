"""What of a Program is exported: its part, and the inputs that graphs take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from reroll.errors import ExportError
from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.defaults import needed_inputs
from reroll.rewrite.ir.program import Program, drop_unused, weight_nodes
from reroll.rewrite.ir.weights import WeightTable

ENCODER_OUTPUT = "encoder_last_hidden_state"


def exported_part(program: Program) -> Program:
    """Return the Program itself, or the encoder of an encoder-decoder model.

    Raises ExportError if such a Program does not return its encoder's output.
    """
    if not any(i.name.startswith("decoder_") for i in program.inputs):
        return program
    if ENCODER_OUTPUT not in program.outputs:
        raise ExportError(
            "the decoder of an encoder-decoder model cannot be exported, and the model does not "
            "return its encoder's output"
        )
    return only(program, [ENCODER_OUTPUT], {ENCODER_OUTPUT: "last_hidden_state"})


def only(program: Program, outputs: list[str], names: dict[str, str]) -> Program:
    """Return the part of a Program on which some outputs depend, and rename these outputs."""
    program = program.edit()
    graph = program.graph
    end = next(iter(reversed(graph.nodes)))
    values: Any = end.args[0]
    end.args = (tuple(values[program.outputs.index(name)] for name in outputs),)
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
        outputs=tuple(names.get(name, name) for name in outputs),
        origin=replace(program.origin, auto_class="AutoModel"),
    )


def computed_inputs(program: Program) -> tuple[str, ...]:
    """Return the Program's inputs that its graphs compute themselves.

    These are inputs with a default of their own, and positions where there is no past to count
    from. So are token types of a decoder, which runtimes of decoders do not support. Padding masks
    stay inputs: runtimes give them to every model, even to one with a default for them.
    """
    stateful = bool(plan_states(program).layers)
    return tuple(
        i.name
        for i in program.inputs
        if i.role != "padding"
        and (i.default is not None or (i.role == "zeros" if stateful else i.counts))
    )
