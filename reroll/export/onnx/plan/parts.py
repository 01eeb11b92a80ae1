"""What of a Program is exported: its part, and the inputs that graphs take."""

from __future__ import annotations

from reroll.errors import ExportError
from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.parts import output_values, part
from reroll.rewrite.ir.program import Program

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
    program = program.edit().with_draft(None)
    return part(program, {"last_hidden_state": output_values(program)[ENCODER_OUTPUT]})


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
