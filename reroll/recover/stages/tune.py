"""Tune: train on the cross-entropy of the text itself, without the original."""

from __future__ import annotations

from typing import ClassVar

from reroll.recover.losses import cross_entropy
from reroll.recover.stage import Batch, Loss, Models, Stage


class Tune(Stage):
    """Minimise the cross-entropy of the next token."""

    name = "tune"
    teaches: ClassVar[bool] = False

    def loss(self, batch: Batch, models: Models) -> Loss:
        return Loss(cross_entropy(models.run(batch), batch.labels))
