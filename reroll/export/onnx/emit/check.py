"""Compare an exported graph with the torch module on the same inputs.

A causal model gets a batch of three prompts of different lengths, padded on the left. Then it
decodes token by token; graph and module both use their caches. Logits of all tokens except padding
are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.errors import ExportError
from reroll.export.onnx.emit.choices import Choices
from reroll.export.onnx.emit.session import Session
from reroll.export.onnx.graph import nodes_of
from reroll.export.onnx.plan.quantise import bits_of, dequantised
from reroll.export.onnx.plan.settings import Settings
from reroll.rewrite.analysis.distance import Distance
from reroll.rewrite.analysis.samples import (
    default_tokenizer,
    random_inputs,
    sample_text,
    token_input,
    vocabulary,
)
from reroll.rewrite.analysis.tolerances import relative_rms
from reroll.rewrite.ir.defaults import first_position
from reroll.rewrite.ir.interpret import complete
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights.expressions import Source
from reroll.runtime.lowering.recapture import stored_tensors

# relative RMS of outputs; with quantised weights, the module's weights are rounded equally, and
# the runtime's rounding of activations is switched off
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "int8": 1e-3, "int4": 1e-3}

ROWS, PROMPT, STEPS = 3, 24, 64
# fewer steps, because a quantised graph is slow with activations in fp32
QUANTISED_STEPS = 8
# tokens of text on which quality is measured
TEXT = 256

Inputs = Mapping[str, Tensor]


def check_graph(
    path: Path,
    program: Program,
    module: Any,
    precision: str = "fp32",
    steps: int = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Check one graph file by ONNX's checker, and by comparing its outputs with the module's.

    Returns the largest relative RMS error of any output at any step. Raises ExportError if it is
    above the tolerance, or if the checker or ONNX Runtime refuses the graph.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(f"the checker of ONNX refuses the graph: {reason}", path.name) from error
    if precision.startswith("int"):
        steps = min(steps, QUANTISED_STEPS)
    choices = Choices(TOLERANCE[precision])
    session = _session(path, choices)
    is_causal = bool(session.past)
    steps = min(steps, _room(program))
    pairs = _decoded if is_causal else _once
    worst, count = 0.0, 0
    for name, actual, expected in pairs(program, module, session, choices, steps):
        error_ = relative_rms(actual.float(), expected.float())
        worst, count = max(worst, error_), count + 1
        if not error_ <= TOLERANCE[precision]:
            raise ExportError(
                f"{name} differs from the torch module by {error_:.2e} relative RMS, "
                f"more than {TOLERANCE[precision]:.0e}",
                where=path.name,
                hint="without --check it is written anyway",
            )
        if progress is not None:
            progress(count, steps + 1 if is_causal else 1)
    return {
        "relative_rms_error": worst,
        "tolerance": TOLERANCE[precision],
        "batch": ROWS,
        "prompt": PROMPT if is_causal else None,
        "decode_steps": steps if is_causal else None,
    }


def quality(path: Path, program: Program, module: Any) -> dict[str, float | None] | None:
    """Measure the distance of a graph with lower precision from the module, on text.

    The graph rounds activations as in normal use. Returns mean KL divergence in nats, top-1
    agreement, and both perplexities; None for models without logits or states.
    """
    session = Session(path)
    if not session.past or program.outputs[0] != "logits":
        return None
    tokens, seen = prompts(program, rows=1, length=min(TEXT, _room(program) + PROMPT))
    positions = torch.arange(tokens.shape[1])[None]
    session.reset(1)
    given = {"input_ids": tokens, "attention_mask": seen, "position_ids": positions}
    distance = Distance(logits=True)
    with torch.no_grad():
        expected, actual = module(tokens).logits, session.run(given)["logits"]
    distance.add(expected[0], actual[0], F.pad(tokens[0, 1:], (0, 1), value=-100))
    return {
        "kl_divergence": distance.kl,
        "top1_agreement": distance.top1_agreement,
        "perplexity": distance.perplexity(1),
        "original_perplexity": distance.perplexity(0),
        "tokens": tokens.shape[1],
    }


def _session(path: Path, choices: Choices) -> Session:
    """Open a session whose choices are outputs, and whose quantised products keep fp32 inputs."""
    model = onnx.load(str(path), load_external_data=False)
    for node in nodes_of(model.graph):
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    choices.tell(model.graph)
    copy = path.with_name(f"checked-{path.name}")
    onnx.save(model, str(copy))
    try:
        return Session(copy)
    finally:
        copy.unlink()


def round_weights(module: Any, program: Program, settings: Settings) -> None:
    """Replace a module's weights by the values to which quantisation rounds them."""
    if settings.bits is None:
        return
    table, tensors = stored_tensors(module)
    for name, weight in table.items():
        bits = bits_of(settings, program, name)
        if bits is None:
            continue
        for entry in weight.entries:
            assert isinstance(entry, Source)
            tensor = tensors[entry.name]
            tensor.data.copy_(dequantised(tensor.data, bits, settings.block))


def _room(program: Program) -> int:
    """Return how many tokens can follow a prompt."""
    length = program.origin.positions
    # a model may reserve its first positions for padding
    first = max((first_position(i) or 0 for i in program.inputs), default=0)
    return STEPS if length is None else length - first - PROMPT


Compared = Iterator[tuple[str, Tensor, Tensor]]


def _once(
    program: Program, module: Any, session: Session, choices: Choices, steps: int
) -> Compared:
    """Compare the outputs of a model without state, except at padding.

    A model that predicts tokens is run at two lengths, because decoding runs it again for each new
    token.
    """
    rows = ROWS if len(program.inputs) > 1 else 2
    padding = next((i.name for i in program.inputs if i.role == "padding"), "")
    for length in (16, 17) if program.outputs[0] == "logits" else (16,):
        inputs = random_inputs(program, rows=rows, length=length, padded=True)
        actual = session.run(complete(program, inputs))
        with torch.no_grad(), choices.taken(actual):
            expected = module(**inputs)
        seen = inputs.get(padding)
        for name in program.outputs:
            a, b = actual[name], expected[name]
            if seen is not None and a.shape[:2] == seen.shape:
                a, b = a[seen.bool()], b[seen.bool()]
            yield name, a, b


def _decoded(
    program: Program, module: Any, session: Session, choices: Choices, steps: int
) -> Compared:
    """Compare the outputs for a prompt and for the tokens that the module then chooses."""
    tokens, seen = prompts(program)
    session.reset(ROWS)
    past: Any = None
    with torch.no_grad():
        for step in range(steps + 1):
            inputs = {"input_ids": tokens, "attention_mask": seen}
            positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            if "position_ids" in session.inputs:
                inputs["position_ids"] = positions
            actual = session.run(inputs)
            with choices.taken(actual):
                out = module(**inputs, past_key_values=past, use_cache=True)
            past = out.past_key_values
            shown = seen[:, -tokens.shape[1] :].bool()
            at = f"step {step}" if step else "the prompt"
            for name in program.outputs:
                if actual[name].shape[:2] == shown.shape:
                    yield f"{name} at {at}", actual[name][shown], out[name][shown]
            tokens = out.logits[:, -1:].argmax(-1)
            seen = torch.cat([seen, torch.ones_like(tokens)], dim=1)


def prompts(program: Program, rows: int = ROWS, length: int = PROMPT) -> tuple[Tensor, Tensor]:
    """Return token ids [rows, length] of text, and the mask of a batch padded on the left."""
    tokenizer = default_tokenizer(program)
    if tokenizer is not None:
        ids = torch.tensor(list(tokenizer(sample_text()))[: rows * length]).reshape(rows, length)
    else:
        item = token_input(program)
        top = vocabulary(program, item.name if item else None) or 2
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, top, (rows, length), generator=generator)
    lead = torch.arange(rows)[:, None] * (length // (2 * rows))
    return ids, (torch.arange(length)[None] >= lead).long()
