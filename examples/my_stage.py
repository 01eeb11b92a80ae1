"""A stage of one's own, for recipes that have `- match_logits: {margin: 0.1}` among their stages.

reroll recover OUT RECOVERED --load FILE --recipe RECIPE --data TEXT --tokens 1M
"""

from reroll.bounds import NOT_NEGATIVE
from reroll.recover.losses import unpadded
from reroll.recover.stage import Batch, Loss, Models, Stage
from reroll.rewrite.pipeline.options import option


class MatchLogits(Stage):
    """Minimise the squared error of the logits, about their mean over the vocabulary.

    Adding a number to all logits of a position changes no probability, so that is taken out first.
    """

    name = "match_logits"

    margin: float = option(0.0, within=NOT_NEGATIVE, help="errors below it cost nothing")

    def loss(self, batch: Batch, models: Models) -> Loss:
        ours = unpadded(models.run(batch), batch.mask).float()
        theirs = unpadded(models.ask(batch), batch.mask).float()
        error = (ours - ours.mean(-1, keepdim=True)) - (theirs - theirs.mean(-1, keepdim=True))
        value = (error.abs() - self.margin).clamp(min=0).square().mean()
        return Loss(value, {"largest": error.abs().max().item()})
