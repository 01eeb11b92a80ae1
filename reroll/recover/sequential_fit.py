"""Fit residuals trip by trip, on the inputs that they have in the rewritten model.

`closed_form` fits every layer on the original's inputs. In the rewritten model, a layer's inputs
carry the errors of all layers before it. So the layers are fitted again, in the order in which they
run. X is the layer's input in the student, and Y [tokens, out] the output of the original's layer
for the same tokens. W' is its shared weight, M = B A its residual of rank r, and M_0 the one
before:

    M = argmin |X (W' + M)^T - Y|^2 + ridge |M - M_0|^2

The solution of full rank is M_0 + (D - (W' + M_0) C) (C + ridge)^-1 with C = X^T X and D = Y^T X.
It is reduced to the r directions that explain most of the outputs (reduced-rank regression:
Izenman, Journal of Multivariate Analysis 5, 1975). Layers that are fitted later correct the errors
that remain in those before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.recover.closed_form import FittedLinear, layers_to_fit, set_factors
from reroll.recover.hooks import removing_hooks
from reroll.recover.stage import Batch, Models

# ridge penalty that keeps a residual unchanged, relative to the mean square of an input
RIDGE = 1e-2


@torch.no_grad()
def fit_trip_by_trip(models: Models, batches: Sequence[Batch]) -> dict[str, float]:
    """Fit the trainable residuals, from the first trip to the last.

    Returns the squared error of their layers' outputs relative to their size, before and after each
    layer's own fit. The result is empty if there are no residuals. Raises UsageError if the
    original has another number of trips.
    """
    layers = {layer.name: layer for layer in layers_to_fit(models) if layer.factors}
    if not layers:
        return {}
    assert models.teacher is not None
    student = _Walk(models.module, models.run_student_for_hooks, batches)
    teacher = _Walk(models.teacher, models.run_teacher_for_hooks, batches)
    if len(student.trips) != len(teacher.trips):
        raise UsageError(
            f"the original has {len(teacher.trips)} trips and this model {len(student.trips)}",
            where="fitting trip by trip",
            hint="leave start_free out, or choose passes that keep the trips",
        )
    before = after = size = 0.0
    for trip in range(len(student.trips)):
        for group in student.groups(trip, layers):
            sums = _sums(group, trip, student, teacher, batches)
            for layer in group:
                layer_sums = sums[layer.name]
                before += layer_sums.error(layer)
                _fit(layer, layer_sums)
                after += layer_sums.error(layer)
                size += layer_sums.size
        student.advance(trip)
        teacher.advance(trip)
    return {"own_error_before": before / size, "own_error_after": after / size}


class _Sums:
    """Sums C = X^T X, D = (Y - bias)^T X and |Y - bias|^2 of one layer, over tokens."""

    def __init__(self, layer: FittedLinear) -> None:
        weight = layer.teacher.weight
        self.c = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        self.d = torch.zeros_like(weight, dtype=torch.float64)
        self.size = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x [tokens, in], y [tokens, out]."""
        self.c += x.T @ x
        self.d += y.T @ x
        self.size += y.double().square().sum().item()

    def error(self, layer: FittedLinear) -> float:
        """Compute |X W^T - Y|^2 with the layer's current weight and residual."""
        weight = (layer.student.weight + layer.product()).double()
        return self.size + ((weight @ self.c - 2 * self.d) * weight).sum().item()


def _sums(
    group: Sequence[FittedLinear],
    trip: int,
    student: _Walk,
    teacher: _Walk,
    batches: Sequence[Batch],
) -> dict[str, _Sums]:
    sums = {layer.name: _Sums(layer) for layer in group}
    for number, batch in enumerate(batches):
        keep = batch.mask.bool()
        with _recorded_calls([layer.student for layer in group]) as student_calls:
            student.run(trip, number)
        with _recorded_calls([layer.teacher for layer in group]) as teacher_calls:
            teacher.run(trip, number)
        for layer in group:
            y = teacher_calls[layer.teacher][1][keep].float()
            if layer.student.bias is not None:
                y = y - layer.student.bias
            sums[layer.name].add(student_calls[layer.student][0][keep].float(), y)
    return sums


def _fit(layer: FittedLinear, sums: _Sums) -> None:
    residual = layer.product().double()
    ridge = RIDGE * sums.c.diagonal().mean()
    damped = sums.c.clone()
    damped.diagonal().add_(ridge)
    lacking = sums.d - (layer.student.weight + residual) @ sums.c
    wanted = residual + torch.linalg.solve(damped, lacking, left=False)
    set_factors(layer, wanted.float(), sums.c.float())


@contextmanager
def _recorded_calls(
    modules: Sequence[nn.Module],
) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Record the first input and the output of each module while the block runs."""
    calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] = (args[0], output)

    with removing_hooks([module.register_forward_hook(note) for module in modules]):
        yield calls


class _Walk:
    """A model that runs one trip at a time, each on the result of the trip before."""

    def __init__(
        self, module: Any, run_model: Callable[[Batch], None], batches: Sequence[Batch]
    ) -> None:
        self.trips: list[nn.Module] = module.trip_modules()
        self.run_model, self.batches = run_model, batches
        # for each batch: the trip's first input, and the other arguments of each trip
        self.hidden: list[Tensor] = []
        self.rest: list[dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = []
        # whether a trip's first input is the result of the trip before
        self.follows = [True] * len(self.trips)
        self._record_inputs(0)

    def run(self, trip: int, number: int) -> Tensor:
        """Run a trip on a batch, and return the first carried value."""
        args, kwargs = self.rest[number][trip]
        out: Tensor = self.trips[trip](self.hidden[number], *args, **kwargs)[0]
        return out

    def advance(self, trip: int) -> None:
        """Go on to the next trip."""
        after = [self.run(trip, number) for number in range(len(self.batches))]
        if trip + 1 < len(self.trips):
            if self.follows[trip + 1]:
                self.hidden = after
            else:
                # other operations lie between these trips
                self._record_inputs(trip + 1)

    def groups(self, trip: int, layers: Mapping[str, FittedLinear]) -> Iterator[list[FittedLinear]]:
        """Yield the layers of a trip in the order in which they run, grouped by their input."""
        inside = set(self.trips[trip].modules())
        by_module: dict[nn.Module, FittedLinear] = {
            layer.student: layer for layer in layers.values() if layer.student in inside
        }
        with _recorded_calls(list(by_module)) as calls:
            self.run(trip, 0)
        group: list[FittedLinear] = []
        last: Tensor | None = None
        for module, (x, _) in calls.items():
            if group and x is not last:
                yield group
                group = []
            group.append(by_module[module])
            last = x
        if group:
            yield group

    def _record_inputs(self, first: int) -> None:
        """Run the whole model to record the inputs of the trips from `first` on."""
        self.hidden, self.rest = [], []
        for batch in self.batches:
            calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

            def note(
                _module: nn.Module, args: Any, kwargs: Any, output: Any, to: Any = calls
            ) -> None:
                to.append((args, kwargs, output))

            # a module that makes several trips is hooked once
            once = dict.fromkeys(self.trips)
            with removing_hooks([m.register_forward_hook(note, with_kwargs=True) for m in once]):
                self.run_model(batch)
            self.hidden.append(calls[first][0][0])
            self.rest.append({t: (calls[t][0][1:], calls[t][1]) for t in range(len(calls))})
            for t in range(1, len(calls)):
                self.follows[t] = calls[t][0][0] is calls[t - 1][2][0]
