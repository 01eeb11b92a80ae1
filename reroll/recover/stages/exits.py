"""Exits: train the predictions after fewer trips without losing quality at full depth."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reroll.bounds import COUNT, NOT_NEGATIVE
from reroll.errors import UsageError
from reroll.recover.hooks import record_trips
from reroll.recover.losses import cross_entropy, unpadded
from reroll.recover.stage import Batch, Loss, Models, Stage, arguments
from reroll.recover.stages.distil import Distil
from reroll.rewrite.pipeline.options import option
from reroll.runtime.functions.loops import read_out


class Exits(Stage):
    """Train the predictions after some trips together with those at full depth.

    L_i is the loss after `at[i]` trips, by the exit's own norm and head or else the model's
    (`insert_exits(head=...)`). With L_B the loss at full depth,

        loss = (sum_i a_i L_i + a_B L_B) / (sum_i a_i + a_B)

    Relaxed Recursive Transformers (arXiv 2410.20672), section 3.4: `aggressive` has a_i =
    `coefficient` and a_B = 1, `weighted` a_i = i of 1, 2, .., B. With `distil`, the target of an
    exit is the detached distribution at full depth, and otherwise the text.
    """

    name = "exits"

    at: list[int] = option(
        within=COUNT, help="after how many trips of the last loop there are exits"
    )
    weights: Literal["aggressive", "weighted"] = option("aggressive", help="the coefficients")
    coefficient: float = option(
        0.1, within=NOT_NEGATIVE, help="of every exit but the last, when aggressive"
    )
    distil: bool = option(True, help="exits learn from the full depth instead of the text")
    target: Literal["original", "text"] = option(
        "original", help="what the full depth learns: the original's distribution, or the text"
    )

    def check(self) -> None:
        super().check()
        if sorted(set(self.at)) != self.at:
            raise UsageError("`at` is an ascending list", where="stage exits, option at")

    def check_models(self, models: Models) -> None:
        loop = models.module.program.loops[-1]
        if self.at[-1] >= loop.trips:
            raise UsageError(
                f"{loop.name} makes {loop.trips} trips, so the last exit is after "
                f"{loop.trips - 1} or fewer",
                where="stage exits, option at",
            )

    def loss(self, batch: Batch, models: Models) -> Loss:
        divergence = Distil.make({}).divergence
        trips = models.module.trip_modules()[-models.module.program.loops[-1].trips :]
        with record_trips([trips[number - 1] for number in self.at]) as exit_trips:
            logits = models.run(batch)
        full_logits = unpadded(logits, batch.mask)
        if self.target == "original":
            last = divergence(full_logits, unpadded(models.ask(batch), batch.mask))
        else:
            last = cross_entropy(logits, batch.labels)
        losses = []
        for stop, (_, hidden) in zip(self.at, exit_trips, strict=True):
            early = read_out(models.module, hidden, stop, **arguments(batch))
            if self.distil:
                losses.append(divergence(unpadded(early, batch.mask), full_logits.detach()))
            else:
                losses.append(cross_entropy(early, batch.labels))
        parts = {f"after_{n}": each.item() for n, each in zip(self.at, losses, strict=True)}
        value = self.combined([*losses, last])
        return Loss(value, {**parts, "full": last.item()})

    def combined(self, losses: list[Tensor]) -> Tensor:
        """Compute the weighted mean of the losses; that at full depth is the last."""
        if self.weights == "weighted":
            factors = [float(number) for number in range(1, len(losses) + 1)]
        else:
            factors = [self.coefficient] * (len(losses) - 1) + [1.0]
        total = torch.stack([a * loss for a, loss in zip(factors, losses, strict=True)]).sum()
        return total / sum(factors)
