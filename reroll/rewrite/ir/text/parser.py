"""Parse a program's text to a verified Program. The grammar is in `text.printer`."""

from __future__ import annotations

from typing import TypeVar

from reroll.errors import ProgramError, located
from reroll.rewrite.ir.program import Program, weight_nodes
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.text.sections import Draft, read
from reroll.rewrite.ir.types import set_type
from reroll.rewrite.ir.verify import Problem, check_sources, problems
from reroll.rewrite.ir.weights.expressions import TensorSource
from reroll.rewrite.ir.weights.sources import MemorySource

MAX_CHARACTERS = 2**27

T = TypeVar("T")


def parse(text: str, source: TensorSource | None = None) -> Program:
    """Parse a Program from text; `source` has the tensors that its weights are computed from.

    Raises ProgramError, with the line of the error, if the text is not a valid Program, or if its
    weights do not fit the source.
    """
    if len(text) > MAX_CHARACTERS:
        raise ProgramError(f"the text has more than {MAX_CHARACTERS:,} characters")
    draft = read(text.split("\n"))
    return assemble(draft, source)


def assemble(draft: Draft, source: TensorSource | None) -> Program:
    """Assemble and verify a Program from its parts; ProgramError with the line of an error."""
    dtype = _required(draft.dtype, "line `program dtype=... model=...`")
    weights = _required(draft.weights, "section `weights {`")
    origin = _required(draft.origin, "section `origin {`")
    graph = _required(draft.graph, "section `graph main(...) {`")
    program = Program(
        graph=graph,
        bodies=draft.bodies,
        weights=weights,
        source=MemorySource({}) if source is None else source,
        inputs=tuple(draft.inputs),
        outputs=tuple(draft.outputs),
        dtype=dtype,
        origin=origin,
        reference=draft.reference,
        halves=draft.halves,
    )
    _type_weights(program)
    for problem in problems(program):
        raise ProgramError(problem.message, f"line {_line(draft, problem)}", problem.hint)
    if source is not None:
        with located(f"line {draft.opened.get('weights', 1)}"):
            check_sources(program)
    return program


def _type_weights(program: Program) -> None:
    """Set the types of nodes that read weights, which are only in the weight table."""
    for _, graph in program.graphs():
        for name, nodes in weight_nodes(graph).items():
            weight = program.weights.get(name)
            for node in nodes if weight is not None else ():
                assert weight is not None
                set_type(node, TensorType(weight.meta.dtype, weight.meta.shape))


def _required(value: T | None, name: str) -> T:
    if value is None:
        raise ProgramError(f"there is no {name}", where="at the last line")
    return value


def _line(draft: Draft, problem: Problem) -> int:
    if problem.node in draft.lines:
        return draft.lines[problem.node]
    named = problem.graph if problem.graph in draft.opened else f"body {problem.graph}"
    return draft.opened.get(named, 1)
