"""Write a run's metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from reroll.errors import UsageError


def tensorboard(folder: str | Path) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that writes the metrics of each step to a folder that TensorBoard reads.

    For `recover(..., on_step=tensorboard(folder))`. Raises UsageError if TensorBoard is not
    installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "TensorBoard is not installed", hint="pip install 'reroll[tensorboard]'"
        ) from error

    # opened at the first call, so that only the process that writes opens a file
    @cache
    def writer() -> Any:
        return SummaryWriter(str(folder))

    def write(step: Mapping[str, Any]) -> None:
        for name, value in step.items():
            if isinstance(value, int | float) and name != "steps":
                writer().add_scalar(name, value, step["steps"])
        if step["steps"] == step["total_steps"]:
            writer().close()

    return write
