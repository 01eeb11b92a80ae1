"""Least-squares starts: where the squared error is stationary, and exact where it can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.recover import Batch, Models
from reroll.recover.closed_form import fit_linear_layers
from reroll.recover.hooks import record_trips
from reroll.recover.sequential_fit import fit_trip_by_trip
from reroll.recover.trainable import new_names
from reroll.rewrite.pipeline.manager import run_passes
from tests import captured

LAYER = "mlp.up_proj"


def models(passes: str, train: str = "all") -> Models:
    program = captured.captured("llama")
    student = run_passes(program, passes, measure=False).to_module().eval()
    teacher = program.to_module().eval().requires_grad_(False)
    new = new_names(student, teacher)
    for name, parameter in student.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(train == "all" or name in new)
    return Models(student, student, teacher)


@pytest.fixture
def batches() -> list[Batch]:
    ids = torch.randint(3, 64, (8, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return [Batch(*part) for part in zip(ids.split(4), mask.split(4), strict=True)]


def squared_error(both: Models, batches: list[Batch], path: str) -> Tensor:
    """The squared error of all trips' layers of this name, on the original's inputs."""
    assert both.teacher is not None
    total = torch.zeros(())
    names = [n for n, _ in both.teacher.named_modules() if n.endswith(path)]
    for name in names:
        ours, theirs = both.module.get_submodule(name), both.teacher.get_submodule(name)
        inputs: list[Tensor] = []
        handle = theirs.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
        for batch in batches:
            both.teacher(input_ids=batch.data, attention_mask=batch.mask, use_cache=False)
        handle.remove()
        lacking = theirs.weight - ours.weight
        weights = dict(both.module.named_parameters())
        if f"{name}_lora_up.weight" in weights:
            up, down = (weights[f"{name}_lora_{part}.weight"] for part in ("up", "down"))
            lacking = lacking - up @ down
        for batch, x in zip(batches, inputs, strict=True):
            total = total + (x[batch.mask.bool()] @ lacking.T).square().sum()
    return total


@pytest.mark.parametrize("passes", ["tie(blocks=2)", "tie(blocks=2), relax(rank=3)"])
def test_the_error_is_stationary(passes: str, batches: list[Batch]) -> None:
    both = models(passes)
    before = squared_error(both, batches, LAYER).item()
    found = fit_linear_layers(both, batches)
    after = squared_error(both, batches, LAYER)
    assert after.item() < 0.9 * before
    assert found["error_after"] < found["error_before"]
    after.backward()
    # the last to be fitted are the residuals if there are some, else the shared weights
    part = "lora_up" if "relax" in passes else "up_proj.weight"
    gradients = [p.grad for n, p in both.module.named_parameters() if part in n and "mlp.up" in n]
    assert gradients
    scale = before / both.module.get_submodule("model.layers.0.mlp.up_proj").weight.norm().item()
    for gradient in gradients:
        assert gradient is not None
        # the ridge holds shared weights back by a thousandth
        assert gradient.norm().item() < 2e-2 * scale


def test_a_residual_of_full_rank_restores_the_original(batches: list[Batch]) -> None:
    # one less than full is the largest rank that is stored as factors
    both = models("tie(blocks=2), relax(rank=31, init=zero, vectors=true)", train="new")
    for _, up in [(n, p) for n, p in both.module.named_parameters() if "lora" in n]:
        with torch.no_grad():
            up.normal_(generator=torch.Generator().manual_seed(1))
    found = fit_linear_layers(both, batches)
    assert found["error_before"] > 1
    assert found["error_after"] < 1e-3


def test_only_what_is_trained_moves(batches: list[Batch]) -> None:
    both = models("tie(blocks=2), relax(rank=3)", train="new")
    before = {n: p.detach().clone() for n, p in both.module.named_parameters()}
    fit_linear_layers(both, batches)
    for name, parameter in both.module.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora" in name), name


def test_an_untied_model_has_nothing_to_fit(batches: list[Batch]) -> None:
    assert fit_linear_layers(models("tie(blocks=4)"), batches) == {}


def last_output(model: Any, batch: Batch) -> Tensor:
    """What the last trip gives for the tokens of a batch."""
    with record_trips(model.trip_modules()[-1:]) as seen, torch.no_grad():
        model(input_ids=batch.data, attention_mask=batch.mask, use_cache=False)
    return seen[0][1][batch.mask.bool()]


def test_trip_by_trip_makes_up_for_the_errors_before(batches: list[Batch]) -> None:
    both = models("tie(blocks=2), relax(rank=3)", train="new")
    errors = []
    for fit in (fit_linear_layers, fit_trip_by_trip):
        found = fit(both, batches)
        gone = [last_output(m, b) for b in batches for m in (both.module, both.teacher)]
        pairs = zip(gone[::2], gone[1::2], strict=True)
        errors.append(sum((ours - theirs).square().sum().item() for ours, theirs in pairs))
    assert found["own_error_after"] < found["own_error_before"]
    assert errors[1] < 0.9 * errors[0]


def test_trip_by_trip_moves_only_what_is_trained(batches: list[Batch]) -> None:
    both = models("tie(blocks=2), relax(rank=3)", train="new")
    before = {n: p.detach().clone() for n, p in both.module.named_parameters()}
    fit_trip_by_trip(both, batches)
    for name, parameter in both.module.named_parameters():
        assert torch.equal(before[name], parameter) != ("lora" in name), name
    assert fit_trip_by_trip(models("tie(blocks=2)"), batches) == {}
