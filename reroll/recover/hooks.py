"""Record or replace the inputs and outputs of a model's trips and layers, by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def removing_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_trips(trips: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the first carried value that each trip takes and returns, while the block runs."""
    recorded: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorded.append((args[0], output[0]))

    handles = [trip.register_forward_hook(note) for trip in trips]
    with removing_hooks(handles):
        yield recorded


def modules_ending(model: nn.Module, ending: str) -> set[str]:
    """Return the names of the modules whose last parts are `ending`."""
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    return {name for name in names if f".{name}".endswith(f".{ending}")}


@contextmanager
def record_inputs(model: nn.Module, ending: str) -> Iterator[dict[str, Tensor]]:
    """Record the first input of each module whose name ends with `ending`, by name."""
    recorded: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            recorded[name] = args[0]

        return note

    handles = [
        model.get_submodule(name).register_forward_pre_hook(noting(name))
        for name in modules_ending(model, ending)
    ]
    with removing_hooks(handles):
        yield recorded


@contextmanager
def replace_inputs(trips: Sequence[nn.Module], values: Sequence[Tensor | None]) -> Iterator[None]:
    """Replace the first input of each trip that has a value in `values`; None leaves it."""

    def feeder(value: Tensor) -> Any:
        return lambda _module, args: (value, *args[1:])

    handles = [
        trip.register_forward_pre_hook(feeder(value))
        for trip, value in zip(trips, values, strict=True)
        if value is not None
    ]
    with removing_hooks(handles):
        yield
