"""Define what a stage of recovery is: a loss, the weights that it trains, and its length.

    class Tune(Stage):
        '''Cross-entropy of the next token.'''

        name = "tune"

        def loss(self, batch: Batch, models: Models) -> Loss: ...

A new stage is one file in `reroll/recover/stages`, or a class that
`reroll.rewrite.pipeline.registry` finds in another package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from reroll.bounds import NOT_NEGATIVE, POSITIVE, SHARE, SIZE, Range
from reroll.errors import UsageError
from reroll.recover.data import Rows
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import option
from reroll.rewrite.pipeline.registry import Registry


@dataclass(frozen=True)
class Batch:
    """Rows of one step: tokens, or images.

    `data` are token ids [rows, length], or the values of the model's `input`, [rows, ...]. `mask`
    [rows, length] is the padding mask: 0 at padding, which is on the right, and 1 at the positions
    of an image. `progress` is the part of the stage that is done, from 0 to 1. `seed` is for random
    choices of this step, equal in all processes.
    """

    data: Tensor
    mask: Tensor
    progress: float = 0.0
    seed: int = 0
    input: str = "input_ids"

    @property
    def labels(self) -> Tensor:
        """Token ids, and -100 at padding: [rows, length]."""
        return self.data.masked_fill(self.mask == 0, -100)

    def tokens(self) -> int:
        """Count the tokens that are not padding."""
        return int(self.mask.sum())


@dataclass
class Models:
    """Student and teacher of a run.

    `student` is the model that a stage calls: the lowered model `module`, or that with adapters.
    `teacher` is the lowered original, which is not trained.
    """

    student: nn.Module
    module: Any
    teacher: Any | None

    def run(self, batch: Batch) -> Tensor:
        """Compute the student's logits [rows, length, vocabulary]."""
        logits: Tensor = self.student(**arguments(batch)).logits
        return logits

    def ask(self, batch: Batch) -> Tensor:
        """Compute the teacher's logits [rows, length, vocabulary], without gradients."""
        assert self.teacher is not None
        with torch.no_grad():
            logits: Tensor = self.teacher(**arguments(batch)).logits
        return logits

    def run_teacher_for_hooks(self, batch: Batch) -> None:
        """Run the teacher without gradients, only for the hooks on its modules."""
        assert self.teacher is not None
        with torch.no_grad():
            self.teacher(**arguments(batch), **self._least())

    def run_student_for_hooks(self, batch: Batch) -> None:
        """Run the student only for the hooks on its modules."""
        self.student(**arguments(batch), **self._least())

    def _least(self) -> dict[str, int]:
        return {"logits_to_keep": 1} if self.module.can_generate() else {}


def batch_of(module: Any, rows: Rows, progress: float = 0.0, seed: int = 0) -> Batch:
    """Make a batch of rows on a model's device, without columns that are padding in all rows."""
    device, name = next(module.parameters()).device, module.main_input_name
    data, mask = rows.data.to(device), rows.mask.to(device)
    if name == "input_ids":
        width = int(mask.sum(1).max())
        data, mask = data[:, :width], mask[:, :width]
    return Batch(data, mask, progress, seed, name)


def arguments(batch: Batch) -> dict[str, Any]:
    """Return the arguments to call a lowered model with."""
    if batch.input != "input_ids":
        return {batch.input: batch.data}
    return {"input_ids": batch.data, "attention_mask": batch.mask, "use_cache": False}


@dataclass
class Loss:
    """Mean over the batch's tokens of the minimised quantity, and further values to log."""

    value: Tensor
    parts: dict[str, float] = field(default_factory=dict)


class Stage(Declared, ABC):
    """Base of all stages. A subclass sets `name`, and `teaches` if it needs the original."""

    category: ClassVar[str] = "stage"
    teaches: ClassVar[bool] = True

    share: float = option(
        1.0,
        within=NOT_NEGATIVE,
        help="its share of the run's tokens, beside the other stages'; 0 for no step at all",
    )
    lr: float = option(1e-4, within=POSITIVE, help="the largest learning rate")
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", help="how the learning rate falls after the warmup"
    )
    warmup: float = option(
        0.03,
        within=Range(least=0, below=1),
        help="share of the steps in which the learning rate rises",
    )
    final: float = option(
        0.1, within=SHARE, help="the last learning rate, as a share of the largest"
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", help="muon is for matrices; the rest takes adamw"
    )
    betas: list[float] = option(
        [0.9, 0.95], within=Range(least=0, below=1), help="adamw's decay rates"
    )
    weight_decay: float = option(0.0, within=NOT_NEGATIVE, help="decoupled weight decay")
    clip: float = option(
        1.0, within=NOT_NEGATIVE, help="the largest norm of the gradient; 0 for none"
    )
    train: str | list[str] = option(
        "all", help="all, new (what the original does not have), lora, names, or a list of these"
    )
    lora_rank: int = option(8, within=SIZE, help="with train=lora: the rank")
    lora_alpha: float = option(
        16.0, within=POSITIVE, help="with train=lora: the scale, over the rank"
    )
    lora_on: list[str] = option(
        ["q_proj", "k_proj", "v_proj", "o_proj"], help="with train=lora: names of linear layers"
    )

    def check(self) -> None:
        if len(self.betas) != 2:
            raise UsageError("betas are two numbers", where=f"stage {self.name}, option betas")

    @abstractmethod
    def loss(self, batch: Batch, models: Models) -> Loss:
        """Compute the mean loss over a batch's tokens, with gradients into the student."""

    def check_models(self, models: Models) -> None:
        """Check the models, whenever the stage begins or continues; raise if they do not fit."""

    def initialise(self, models: Models, rows: Callable[[int], list[Batch]]) -> dict[str, float]:
        """Set weights without training, once before the first step.

        `rows(n)` returns the stage's first n training tokens, in batches. The returned values are
        logged.
        """
        return {}


STAGES = Registry(Stage, "reroll.recover.stages", "reroll.stages", "recipe")  # type: ignore[type-abstract]

# all known stages; the one of a name
stages, find = STAGES.all, STAGES.find
