"""Build the optimizer of a stage, and compute its learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from reroll.recover.stage import Stage


class Both(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, as one optimizer.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) replaces each update by
    the nearest orthogonal matrix. With `match_rms_adamw` its size is that of AdamW's updates, so
    that one learning rate serves both (Liu et al., 2025, arXiv 2502.16982).
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([g for p in parts for g in p.param_groups], {})
        # the parts' own group objects, so that a learning rate set here takes effect there
        self.param_groups = [g for p in parts for g in p.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, object]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])  # type: ignore[arg-type]
        self.param_groups = [g for p in self.parts for g in p.param_groups]


def make_optimizer(stage: Stage, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the stage's optimizer over the trainable parameters."""
    wanted = [p for p in parameters if p.requires_grad]
    matrices = [p for p in wanted if p.ndim == 2 and stage.optimizer == "muon"]
    rest = [p for p in wanted if p.ndim != 2 or stage.optimizer != "muon"]
    common: dict[str, Any] = {"lr": stage.lr, "weight_decay": stage.weight_decay}
    parts: list[torch.optim.Optimizer] = []
    if rest:
        first, second = stage.betas
        parts.append(torch.optim.AdamW(rest, betas=(first, second), **common))
    if matrices:
        parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **common))
    return parts[0] if len(parts) == 1 else Both(parts)


def rate(stage: Stage, step: int, steps: int) -> float:
    """Compute the learning rate of step `step` of `steps`: it rises in the warmup, then falls."""
    rising = math.ceil(stage.warmup * steps)
    if step < rising:
        return stage.lr * (step + 1) / (rising + 1)
    done = (step - rising) / max(steps - rising, 1)
    if stage.schedule == "constant":
        return stage.lr
    fall = (1 + math.cos(math.pi * done)) / 2 if stage.schedule == "cosine" else 1 - done
    return stage.lr * (stage.final + (1 - stage.final) * fall)
