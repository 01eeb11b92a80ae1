"""The ways in which people call a model, and what a converted model gives beside its original.

Each call is a set of keyword inputs for a batch of three; what is compared is the forward, the
loss, and twelve greedy tokens. A comparison is a cell of the coverage table, as text: "0" is bit
for bit, a number is a relative RMS error within rounding, "ties 2" are tokens of which two rows
part where the original's choice is within rounding, "wrong" and "refused" say how much or why, and
"-" stands where the original itself does not take the call.

Rounding is the tolerance of the dtype, or what the original itself is away from its own copy in a
wider dtype (fp64, or fp32 for half precision) and, in half precision, from itself with PyTorch's
fused attention, whichever is more, also while it generates; two roundings may differ by twice as
much.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import told
from reroll.rewrite.analysis.tolerances import forward, relative_rms
from tests.tiny import types as tiny_types
from tests.tiny.configs import TEXT_IDS

CALLS = ("ids", "mask", "left", "right", "everything")
MEASURES = ("forward", "loss", "tokens")
# not the sizes that a model is captured with, so a size that was baked in shows
BATCH, LENGTH, NEW_TOKENS = 3, 24, 12

Inputs = dict[str, Tensor]
Outcome = dict[str, Any]


def make_calls(model: Any, seed: int = 0) -> dict[str, Inputs]:
    """The keyword inputs of each call; a model that reads no text has the first and last only."""
    given = tiny_types.example_inputs(model, BATCH, LENGTH, seed)
    if "input_ids" not in given:
        return {"ids": given}
    ids = given.pop("input_ids")
    # tokens where the example has padding
    ids = ids.where(ids >= TEXT_IDS.start, torch.full_like(ids, 17))
    accepted = set(inspect.signature(model.forward).parameters)
    given.pop("attention_mask", None)
    # less than the smallest window, or a row would see nothing
    lead = torch.arange(BATCH)[:, None] * 3
    at = torch.arange(LENGTH)[None]
    masks = {
        "mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "left": (at >= lead).long(),
        "right": (at < LENGTH - lead).long(),
    }
    if ids.shape[0] != BATCH:  # one stream of ids per codebook, flattened into the batch
        return {"ids": {"input_ids": ids, **given}, "mask": {**given, "input_ids": ids}}
    calls = {"ids": {"input_ids": ids, **given}}
    for name, mask in masks.items() if "attention_mask" in accepted else ():
        padded = ids.where(mask.bool(), torch.full_like(ids, _padding(model)))
        calls[name] = {"input_ids": padded, "attention_mask": mask, **given}
    optional = _optional(model, accepted, masks["left"])
    return calls | {"everything": calls.get("left", calls["ids"]) | optional}


def _padding(model: Any) -> int:
    found = getattr(model.config.get_text_config(), "pad_token_id", None)
    return int(found) if isinstance(found, int) and found >= 0 else 0


def _optional(model: Any, accepted: set[str], mask: Tensor) -> Inputs:
    """The inputs that most callers leave out."""
    made = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    kinds = getattr(model.config.get_text_config(), "type_vocab_size", None)
    if isinstance(kinds, int) and kinds > 0:
        second = torch.arange(mask.shape[1]) >= 12
        made["token_type_ids"] = second.long().expand_as(mask) % kinds
    return {name: value for name, value in made.items() if name in accepted}


def run_call(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Outcome]:
    """What a model gives in one call: a value by measure, or the error that it raised instead."""
    runs: dict[str, Callable[[], Outcome]] = {
        "forward": lambda: {"value": tiny_types.run_eager(model, typed(model, inputs))},
        "loss": lambda: _loss(model, typed(model, inputs)),
        "tokens": lambda: _tokens(model, inputs),
    }
    outcomes = {}
    for name, run in runs.items():
        try:
            outcomes[name] = run()
        except Exception as error:  # the table is the report of what fails
            outcomes[name] = {"error": told(error, 160)}
    return outcomes


def typed(model: Any, inputs: Mapping[str, Tensor]) -> Inputs:
    """The inputs with pictures and sound in the model's dtype."""
    return {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in inputs.items()}


def _loss(model: Any, inputs: Inputs) -> Outcome:
    if "labels" not in inspect.signature(model.forward).parameters or "input_ids" not in inputs:
        return {}
    labels = inputs["input_ids"].clone()
    if "attention_mask" in inputs:
        # the first token behind padding is predicted by a token that is none
        seen = inputs["attention_mask"].bool()
        labels[~seen | ~seen.roll(1, dims=1)] = -100
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    return {} if loss is None else {"value": loss.float().reshape(1)}


def _tokens(model: Any, inputs: Mapping[str, Tensor]) -> Outcome:
    if not model.can_generate() or "input_ids" not in inputs:
        return {}
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=_padding(model), output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack([each.float() for each in out.logits], 1)
    return {"value": out.sequences[:, -logits.shape[1] :], "logits": logits}


def expected_of(original: Any, calls: Mapping[str, Inputs]) -> dict[str, Any]:
    """What the original gives in each call, and how far rounding takes it: see `compare`."""
    expected: dict[str, Any] = {name: run_call(original, given) for name, given in calls.items()}
    measured = [
        found
        for other in _others(original)
        for name, given in calls.items()
        if (found := _apart(expected[name], run_call(other, given), given))
    ]
    most = {key: max(each[key] for each in measured) for key in (measured or [{}])[0]}
    return {name: outcomes | most for name, outcomes in expected.items()}


def _others(original: Any) -> Iterator[Any]:
    """Copies of the original that differ from it by rounding alone."""
    half = original.dtype != torch.float32
    yield copy.deepcopy(original).to(torch.float32 if half else torch.float64)
    if half:
        fused = copy.deepcopy(original)
        # a model, or a part of it such as one for sound, may have no other than eager attention
        with suppress(ValueError):
            fused.set_attn_implementation("sdpa")
        yield fused
        yield _nudged(original)


def _nudged(original: Any) -> Any:
    """A copy in which one number in ten of the embeddings is one rounding away."""
    nudged = copy.deepcopy(original)
    weight = nudged.get_input_embeddings().weight
    chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    with torch.no_grad():
        above = torch.nextafter(weight, torch.full_like(weight, math.inf))
        weight.copy_(torch.where(chosen, above, weight))
    return nudged


def _apart(
    own: Mapping[str, Outcome], other: Mapping[str, Outcome], given: Mapping[str, Tensor]
) -> dict[str, float] | None:
    """How far a copy is from the original in one call; None if either refuses it."""
    if "value" not in own["forward"] or "value" not in other["forward"]:
        return None
    values = (tiny_types.valid_outputs(each["forward"]["value"], given) for each in (own, other))
    a, b = (value.double() for value in values)
    farthest = max(float((a - b).abs().max()), _generated_apart(own, other))
    found = {"rounding": relative_rms(a, b), "farthest": farthest}
    # masks made for fp32 overflow in fp64: such a call goes by the others
    return found if all(math.isfinite(value) for value in found.values()) else None


def _generated_apart(own: Mapping[str, Outcome], other: Mapping[str, Outcome]) -> float:
    """How far two generations' logits are apart as long as both have chosen the same tokens."""
    a, b = own["tokens"], other["tokens"]
    if "value" not in a or "value" not in b:
        return 0.0
    same = (a["value"] == b["value"]).long().cumprod(1)
    # the logits that chose the first other token have read the same tokens, too
    read_alike = torch.nn.functional.pad(same[:, :-1], (1, 0), value=1).bool()
    return float((a["logits"] - b["logits"]).abs()[read_alike].max())


def compare(
    actual: Mapping[str, Any],
    expected: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, str]:
    """The cell of each measure of one call."""
    allowed = max(forward(dtype), 2 * expected.get("rounding", 0.0))
    cells = {}
    for measure in MEASURES:
        got, wanted = actual[measure], expected[measure]
        if "value" not in wanted:
            cells[measure] = "-"
        elif "value" not in got:
            cells[measure] = f"refused: {got.get('error', 'nothing came out')}"
        elif measure == "tokens":
            close = 2 * torch.finfo(dtype).eps * float(wanted["logits"].abs().max())
            close = max(close, 2 * expected.get("farthest", 0.0))
            cells[measure] = _compare_tokens(got["value"], wanted, close)
        else:
            a, b = got["value"], wanted["value"]
            if measure == "forward":
                a, b = (tiny_types.valid_outputs(each, inputs) for each in (a, b))
            cells[measure] = _compare_values(a, b, allowed)
    return cells


def _compare_values(actual: Tensor, expected: Tensor, allowed: float) -> str:
    if torch.equal(actual, expected):
        return "0"
    error = relative_rms(actual.float(), expected.float())
    return f"{error:.1e}" if error <= allowed else f"wrong: {error:.1e}"


def _compare_tokens(actual: Tensor, expected: Outcome, close: float) -> str:
    """Compare tokens [batch, new]; rows may part where the original's logits are so close."""
    wanted, logits = expected["value"], expected["logits"]
    if actual.shape != wanted.shape:
        return f"wrong: {list(actual.shape)} tokens, not {list(wanted.shape)}"
    ties = 0
    for row in range(wanted.shape[0]):
        different = (actual[row] != wanted[row]).nonzero()
        if not len(different):
            continue
        at = int(different[0])
        gap = float(logits[row, at, wanted[row, at]] - logits[row, at, actual[row, at]])
        if gap > close:
            return f"wrong: token {at + 1} of row {row + 1}, by {gap:.1e}"
        ties += 1
    return f"ties {ties}" if ties else "0"


def passed(cell: str) -> bool:
    """Whether a cell is right, or the original's to refuse."""
    return not cell.startswith(("wrong", "refused", "stopped"))
