"""Lower a Program to a torch module that transformers can run, train and save."""

from __future__ import annotations

from typing import Any

import torch

from reroll.rewrite.ir.dtypes import retype
from reroll.rewrite.ir.program import Program
from reroll.runtime.models.config import RerollConfig


def lower(
    program: Program,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    meta: bool = False,
) -> Any:
    """Make a `transformers.PreTrainedModel` that runs a Program, in eval mode.

    `dtype` is the Program's own, or a wider one. With `meta`, its parameters have no data. Raises
    UsageError for a dtype that would change what the Program computes.
    """
    from reroll.runtime.models.auto import model_class

    program = retype(program, dtype)
    model = model_class(program)(RerollConfig.from_program(program), program)
    if not meta:
        model.load_weights(device)
    return model.eval()
