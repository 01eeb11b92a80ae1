"""Inspect the capture of a model: its loops, its attention, and whether it is exact."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from reroll.errors import RerollError, UsageError
from reroll.evaluate.subjects import Opening, is_converted, open_original
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.costs import flops_per_token, state_bytes
from reroll.rewrite.analysis.program_distance import measured_output
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.raising.driver import raise_idioms
from reroll.rewrite.capture.rolling.roll import roll_loops
from reroll.rewrite.ir import interpret
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ATTENTION
from reroll.rewrite.ir.ops.base import Place
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.text.literals import type_to_text
from reroll.rewrite.ir.text.op_names import op_name
from reroll.rewrite.ir.visibility import Visibility

CONTEXTS = (1024, 4096)
ROWS, TIME = 2, 16

Progress = Callable[[int, int, str], None]


def inspect_model(
    model: Any,
    check: bool = True,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Capture a model and say what was found, as JSON data.

    `model` is a hub id, a path or a transformers model. With `check`, the model is also loaded, and
    the flat and the rolled Program are compared with it on random inputs with left padding.
    `captured_exactly` says whether the flat one gives the same bits, and `max_abs_logit_error` is
    its largest error. Both are None without a check, and for a model that reroll has converted,
    which has no original to be compared with.

    Raises CaptureError if the model cannot be captured, UsageError or CheckpointError if it cannot
    be opened.
    """
    report = on_progress or (lambda done, total, message: None)
    steps = 3 + check
    start = time.perf_counter()
    report(0, steps, "capturing")
    name = str(model)
    if isinstance(model, Program):
        raise UsageError("this is a Program already", hint="print it, or inspect its model")
    named = isinstance(model, str) or hasattr(model, "__fspath__")
    if not named:
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    flat = capture(model, roll=False, dtype=dtype, **options if named else {})
    captured = time.perf_counter() - start
    converted = (
        is_converted(name, revision)
        if named
        else isinstance(getattr(model, "program", None), Program)
    )
    report(1, steps, "raising")
    raised = flat if converted else raise_idioms(flat)
    report(2, steps, "rolling")
    rolled = flat if converted else roll_loops(raised)
    seconds = time.perf_counter() - start
    errors = None
    if check and not converted:
        report(3, steps, "checking")
        original = model
        if named:
            opening = Opening(dtype, "eager", revision, trust_remote_code)
            original = open_original(name, opening, flat.origin.architecture)
        errors = check_capture(original, flat, rolled)
    report(steps, steps, "done")
    return {
        "model": name,
        "parameters": rolled.parameters(),
        "loops": [_loop(loop) for loop in rolled.loops],
        "attention": attention_kinds(rolled),
        "captured_exactly": None if errors is None else errors["flat"]["bit_identical"],
        "max_abs_logit_error": _logit_error(rolled, errors),
        "architecture": rolled.origin.architecture,
        "dtype": str(rolled.dtype).removeprefix("torch."),
        "bytes": rolled.weights.bytes(),
        "flops_per_token": flops_per_token(rolled),
        "state_bytes": {str(c): state_bytes(rolled, c) for c in CONTEXTS},
        "inputs": {i.name: type_to_text(i.type) for i in rolled.inputs},
        "outputs": list(rolled.outputs),
        "outside_loops": {
            "ops": sum(_is_work(n) and op_name(n.target) != "loop" for n in rolled.graph.nodes)
        },
        "passes": [step.text for step in rolled.origin.steps],
        "remarks": list(rolled.origin.remarks),
        "output": measured_output(rolled),
        "check": errors,
        "seconds": {"capture": captured, "roll": seconds - captured, "total": seconds},
    }


def _logit_error(program: Program, errors: dict[str, Any] | None) -> float | None:
    if errors is None or "logits" not in measured_output(program):
        return None
    error: float | None = errors["flat"]["max_abs_error"]
    return error


# ---- loops and attention


def _loop(loop: Loop) -> dict[str, Any]:
    per_trip = sum(isinstance(value, tuple) for value in loop.inputs)
    ops = Counter(op_name(n.target) or str(n.target) for n in loop.body.graph.nodes if _is_work(n))
    return {
        "name": loop.name,
        "trips": loop.trips,
        "period": loop.period,
        "layers": loop.layers,
        "body_ops": ops.total(),
        "carried": len(loop.carry),
        "invariants": len(loop.inputs) - per_trip,
        "per_trip": per_trip,
        "ops": dict(ops.most_common()),
    }


def _is_work(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node.target) != "getitem"


def attention_kinds(program: Program) -> list[dict[str, Any]]:
    """List the kinds of attention of a Program, each with how often a forward runs it."""
    kinds: Counter[tuple[tuple[str, Any], ...]] = Counter()
    places = [(program.graph, Place(0))]
    places += [(p.body.graph, Place(0, p, t)) for p in program.loops for t in range(p.trips)]
    for graph, place in places:
        for node in graph.nodes:
            if node.target is ATTENTION:
                kinds[tuple(_attention(node, place).items())] += 1
    return [{**dict(attention), "count": count} for attention, count in kinds.most_common()]


def _attention(node: fx.Node, place: Place) -> dict[str, Any]:
    def constant(value: Any) -> Any:
        value = place.resolve(value)
        return None if isinstance(value, fx.Node) else value

    def has(name: str) -> bool:
        return place.resolve(argument(node, name)) is not None

    limits = Visibility.of(node).map(constant)
    q, k = (shape(node.args[position]) for position in (0, 1))
    return {
        "causal": bool(limits.causal),
        "window": limits.window,
        "chunk": limits.chunk,
        "kv_heads": k[1] if len(k) == 4 else None,
        "heads": q[1] if len(q) == 4 else None,
        "head_dim": q[3] if len(q) == 4 else None,
        "softcap": constant(argument(node, "softcap")),
        "sinks": has("sinks"),
        "bias": has("bias"),
    }


# ---- whether it is exact


def check_capture(model: Any, flat: Program, rolled: Program, seed: int = 0) -> dict[str, Any]:
    """Measure how far flat and rolled Program are from a model's eager forward, as JSON data.

    Only positions that are not padding are compared. A Program that does not run on inputs of
    another size than it was captured with has a `failure`.
    """
    name = measured_output(flat)
    inputs = random_inputs(flat, rows=ROWS, length=TIME, seed=seed, padded=True)
    expected = _eager(model, inputs)[name]
    result: dict[str, Any] = {}
    for form, program in (("flat", flat), ("rolled", rolled)):
        try:
            actual = interpret.run(program, inputs)[name]
        except RerollError as error:
            result[form] = _failed(str(error))
            continue
        if actual.shape != expected.shape:
            result[form] = _failed(f"{name} is {list(actual.shape)}, not {list(expected.shape)}")
            continue
        x, y = _valid(actual, inputs), _valid(expected, inputs)
        same = torch.where(x == y, 0.0, (x - y).double())
        result[form] = {
            "bit_identical": torch.equal(x, y),
            "max_abs_error": same.abs().max().item(),
            "relative_rms_error": tolerances.relative_rms(x, y),
            "failure": None,
        }
    padded = any("mask" in key for key in inputs)
    return {**result, "inputs": f"random, {ROWS} rows" + (", left padding" if padded else "")}


def _failed(reason: str) -> dict[str, Any]:
    numbers = {"max_abs_error": None, "relative_rms_error": None}
    return {"bit_identical": False, **numbers, "failure": reason}


def _eager(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Run a model's forward with eager attention, and return its outputs."""
    config = model.config
    before = getattr(config, "_attn_implementation", None)
    training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = getattr(model, "dtype", torch.float32)
    converted = {
        n: t.to(device, dtype if t.is_floating_point() else None) for n, t in inputs.items()
    }
    try:
        if before != "eager" and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        model.eval()
        with torch.no_grad():
            return model(**converted)
    finally:
        model.train(training)
        if before not in (None, "eager") and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation(before)


def _valid(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    if mask is None or output.shape[:2] != mask.shape:
        return output
    return output[mask.bool().to(output.device)]
