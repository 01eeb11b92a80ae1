"""Cut at exit: the layers up to an exit with an adapter, as a model of its own."""

from __future__ import annotations

from dataclasses import replace

from reroll.errors import PassError
from reroll.rewrite.ir.drafting import EXIT_HIDDEN
from reroll.rewrite.ir.ops import loop
from reroll.rewrite.ir.parts import logits_head, output_values
from reroll.rewrite.ir.program import Program, drop_unused
from reroll.rewrite.pipeline.base import Context, Pass


class CutAtExit(Pass):
    """Leave out the layers behind an exit with an adapter, whose logits become the model's.

    The result is the draft of a model that `insert_exits(adapter=attention)` has given such an
    exit: the layers below it, the adapter and the model's own head, with the same weights
    (Kangaroo, arXiv 2404.18911).
    """

    name = "cut_at_exit"
    contract = "approximate"

    def run(self, program: Program, context: Context) -> Program:
        if EXIT_HIDDEN not in program.outputs:
            raise PassError(
                "the model has no exit with an adapter",
                hint="insert_exits(at=[2], adapter=attention) inserts one, and recovery trains it",
            )
        before, values = program.parameters(), output_values(program)
        head = logits_head(program)
        if head is None:
            raise PassError("no linear layer computes the logits")
        hidden = values.pop(EXIT_HIDDEN)
        head.update_arg(0, hidden)
        graph = program.graph
        graph.output_node().args = (tuple(values.values()),)
        # the head may stand before the exit
        drop_unused(graph)
        left = {str(n.args[0]) for n in graph.nodes if n.target is loop}
        bodies = {name: body for name, body in program.bodies.items() if name in left}
        program = replace(program, bodies=bodies, outputs=tuple(values)).pruned()
        context.remark(
            f"the layers behind the exit are left out: {program.parameters():,} of {before:,} "
            "parameters stay"
        )
        return program
