"""Align: train every trip to compute the original's output from the original's input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from reroll.bounds import COUNT_OR_NONE, POSITIVE, SHARE
from reroll.errors import UsageError
from reroll.recover.closed_form import fit_linear_layers
from reroll.recover.hooks import modules_ending, record_inputs, record_trips, replace_inputs
from reroll.recover.sequential_fit import fit_trip_by_trip
from reroll.recover.stage import Batch, Loss, Models, Stage
from reroll.rewrite.pipeline.options import option


class Align(Stage):
    """Fit each trip to the original's layers on the original's hidden states.

    With x_t and y_t the input and output of the original's layers of trip t, and f_t the trip,

        loss = mean_t |f_t(x_t) - y_t|^2 / |y_t - x_t|^2

    over the tokens of a row: the error relative to what the layers add. All trips get the
    original's inputs, so all learn at once (MOHAWK's second stage, arXiv 2408.10189; LoLCATs'
    attention transfer, arXiv 2410.10254). Blocks that are applied several times must also learn on
    inputs with their own errors (Raptor, arXiv 2512.19941). `free` is the probability, at the end
    of the stage, that a trip takes the output of the trip before. It grows from 0 in proportion to
    the steps.

    With `into`, a name such as `o_proj`, the loss compares the inputs of the layers of that name,
    relative to their size. The input of `o_proj` is the output of attention: the attention transfer
    of LoLCATs (arXiv 2410.10254) and the first stage of RADLADS (arXiv 2505.03005).

    With `start_tokens`, tied weights and residuals start at their least-squares values on the
    original's inputs (`reroll.recover.closed_form`). With `start_free` residuals are then fitted on
    the model's own inputs (`reroll.recover.sequential_fit`).
    """

    name = "align"

    lr: float = option(1e-3, within=POSITIVE, help="the largest learning rate")
    train: str | list[str] = option("new", help="all, new, lora, or patterns of names")
    free: float = option(0.5, within=SHARE, help="share of trips that run freely at the end")
    into: str | None = option(
        None, help="compare what the layers of this name take, instead of what trips give"
    )
    start_tokens: int = option(
        0,
        within=COUNT_OR_NONE,
        help="tokens on which tied weights and residuals are fitted by least squares first",
    )
    start_free: bool = option(
        False, help="then fit residuals trip by trip, on what the model itself gives them"
    )

    def check_models(self, models: Models) -> None:
        assert models.teacher is not None
        teacher, student = len(models.teacher.trip_modules()), len(models.module.trip_modules())
        if teacher % student:
            raise UsageError(
                f"the original has {teacher} trips, which {student} cannot share evenly",
                where="stage align",
                hint="leave the stage out, or choose passes that keep the trips",
            )
        sides = models.teacher, models.module
        if self.into is not None and not set.intersection(
            *(modules_ending(m, self.into) for m in sides)
        ):
            raise UsageError(
                f"no layer of both models is called {self.into}", where="stage align, option into"
            )

    def initialise(self, models: Models, rows: Callable[[int], list[Batch]]) -> dict[str, float]:
        if not self.start_tokens:
            return {}
        batches = rows(self.start_tokens)
        errors = fit_linear_layers(models, batches)
        return {**errors, **fit_trip_by_trip(models, batches)} if self.start_free else errors

    def loss(self, batch: Batch, models: Models) -> Loss:
        assert models.teacher is not None
        trips = models.module.trip_modules()
        with (
            record_trips(models.teacher.trip_modules()) as teacher_trips,
            self._inside(models.teacher) as teacher_outputs,
        ):
            models.run_teacher_for_hooks(batch)
        # number of the original's trips in each of the student's
        step = len(teacher_trips) // len(trips)
        inputs = [x for x, _ in teacher_trips[::step]]
        student_inputs = [
            x if forced else None
            for x, forced in zip(inputs, self._forced(batch, len(trips)), strict=True)
        ]
        with (
            replace_inputs(trips, student_inputs),
            record_trips(trips) as student_trips,
            self._inside(models.module) as student_outputs,
        ):
            models.run_student_for_hooks(batch)
        weights = batch.mask.float()
        if self.into is None:
            targets = [y for _, y in teacher_trips[step - 1 :: step]]
            parts = [
                (y, target, x)
                for (_, y), target, x in zip(student_trips, targets, inputs, strict=True)
            ]
        else:
            parts = [
                (student_outputs[n], teacher_outputs[n], torch.zeros_like(teacher_outputs[n]))
                for n in student_outputs
                if n in teacher_outputs
            ]
        errors = [relative_error(*part, weights) for part in parts]
        value = torch.stack(errors).mean()
        worst = max(range(len(errors)), key=lambda t: errors[t].item())
        return Loss(value, {"worst_trip": float(worst), "worst": errors[worst].item()})

    def _inside(self, model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        return nullcontext({}) if self.into is None else record_inputs(model, self.into)

    def _forced(self, batch: Batch, trips: int) -> list[bool]:
        """Draw which trips take the original's hidden state as their input."""
        generator = torch.Generator().manual_seed(batch.seed)
        chances = torch.rand(trips, generator=generator)
        return [bool(c >= self.free * batch.progress) for c in chances]


def relative_error(actual: Tensor, expected: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """Compute |actual - expected|^2 / |expected - source|^2 of each row, averaged by tokens.

    All are [rows, length, width]; `weights` [rows, length] is 0 at padding.
    """
    error = (actual.float() - expected.float()).square().mean(-1)
    size = (expected.float() - source.float()).square().mean(-1)
    ratio = (error * weights).sum(-1) / (size * weights).sum(-1).clamp(min=1e-12)
    tokens = weights.sum(-1)
    return (ratio * tokens).sum() / tokens.sum()
