"""Exit adapter: train an exit for drafts to predict what the whole model predicts."""

from __future__ import annotations

from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.recover.losses import unpadded
from reroll.recover.stage import Batch, Loss, Models, Stage, arguments
from reroll.recover.stages.distil import Distil
from reroll.rewrite.ir.drafting import EXIT_ADAPTER, EXIT_HIDDEN
from reroll.rewrite.pipeline.options import option
from reroll.runtime.functions.loops import read_out


class ExitAdapter(Stage):
    """Train the adapter of an exit for drafts, and nothing else.

    `insert_exits(adapter=attention)` makes such exits. The loss is KL(p || q), with p the model's
    own distribution of the next token and q that at the exit (Kangaroo, arXiv 2404.18911). Both
    come from one run of the model, so that no other model is loaded.
    """

    name = "exit_adapter"
    teaches = False

    train: str | list[str] = option(
        EXIT_ADAPTER, help="what is trained: the adapter's weights have this in their names"
    )

    def check_models(self, models: Models) -> None:
        if EXIT_HIDDEN not in models.module.program.outputs:
            raise UsageError(
                "the model has no exit with an adapter",
                where="stage exit_adapter",
                hint="insert_exits(at=[2], adapter=attention) inserts one",
            )
        if models.module._assembly.interface.head is None:
            raise UsageError("no module computes the logits", where="stage exit_adapter")

    def loss(self, batch: Batch, models: Models) -> Loss:
        out = models.student(**arguments(batch))
        full = unpadded(out.logits.detach(), batch.mask)
        early = unpadded(_logits(models, out[EXIT_HIDDEN], batch), batch.mask)
        value = Distil.make({}).divergence(early, full)
        same = (early.argmax(-1) == full.argmax(-1)).float().mean()
        return Loss(value, {"kl": value.item(), "same": same.item()})


def _logits(models: Models, hidden: Tensor, batch: Batch) -> Tensor:
    """Compute logits from what the head is to read, with all that follows the head."""
    head: nn.Module = models.module.get_submodule(models.module._assembly.interface.head)
    handle = head.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]))
    try:
        return read_out(models.module, hidden, **arguments(batch))
    finally:
        handle.remove()
