"""Hooks on a model's modules: what trips and layers take and give, while a block is open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(trips: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect, while it is open, what each trip takes and gives: the first carried value."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0], output[0]))

    handles = [trip.register_forward_hook(note) for trip in trips]
    with hooked(handles):
        yield seen


def named(model: nn.Module, ending: str) -> set[str]:
    """The names of the modules whose last parts are these."""
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    return {name for name in names if f".{name}".endswith(f".{ending}")}


@contextmanager
def taken(model: nn.Module, ending: str) -> Iterator[dict[str, Tensor]]:
    """Collect, while it is open, what the modules take whose names end with this, by name."""
    seen: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0]

        return note

    handles = [
        model.get_submodule(name).register_forward_pre_hook(noting(name))
        for name in named(model, ending)
    ]
    with hooked(handles):
        yield seen


@contextmanager
def fed(trips: Sequence[nn.Module], values: Sequence[Tensor | None]) -> Iterator[None]:
    """Give each trip its value instead of what the trip before returned, where there is one."""

    def feeder(value: Tensor) -> Any:
        return lambda _module, args: (value, *args[1:])

    handles = [
        trip.register_forward_pre_hook(feeder(value))
        for trip, value in zip(trips, values, strict=True)
        if value is not None
    ]
    with hooked(handles):
        yield
