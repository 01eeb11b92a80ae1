"""Run a Program that reads pictures: all of it with pictures, its text part without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from reroll.errors import UsageError
from reroll.rewrite.capture.pictures import MERGE, ROLE
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Input


def put_pictures(embeddings: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """Write features of pictures into embeddings [batch, time, width] at `places`, in order.

    Raises UsageError unless there are as many places as features.
    """
    places, width = places.expand_as(embeddings), embeddings.shape[-1]
    wanted, available = int(places.sum()), features.numel()
    if wanted != available:
        raise UsageError(
            f"the text has {wanted // width} places for pictures, not {available // width}",
            hint="make the inputs with the model's processor",
        )
    return embeddings.masked_scatter(places, features)


def count_places(program: Program) -> None:
    """Let a main graph check the number of places for pictures before filling them, in place."""
    for node in program.graph.nodes:
        if node.target is MERGE:
            node.target = put_pictures


def with_pictures(
    whole: Callable[..., Any], text: Callable[..., Any], inputs: tuple[Input, ...]
) -> Callable[..., Any]:
    """Make a function that calls `whole` if pictures are given, else `text`."""
    # arguments begin at 1: the module is argument 0
    places = {i: item for i, item in enumerate(inputs, 1) if item.role == ROLE}

    def main(*arguments: Any) -> Any:
        if any(arguments[i] is None for i in places):
            return text(*arguments)
        for i, item in places.items():
            _check_shape(item, arguments[i])
        return whole(*arguments)

    return main


def _check_shape(item: Input, pictures: Tensor) -> None:
    dims = item.type.shape
    sizes = zip(dims, pictures.shape, strict=False)
    if len(dims) != pictures.dim() or any(isinstance(d, int) and d != n for d, n in sizes):
        raise UsageError(
            f"it is {list(pictures.shape)}, and the model was captured with {list(dims)}",
            where=item.name,
            hint="p is any number of pictures" if "p" in dims else "one picture at a time",
        )
