"""The loss of a lowered language model: the one that its original computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reroll.errors import UsageError

# by the program's loss, the name that it has in transformers
_NAMES = {"shifted": "ForCausalLM", "aligned": "ForMaskedLM"}


def language_loss(model: Any, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The cross entropy of logits [batch, time, vocabulary] and labels [batch, time], a scalar.

    It is that of the original, unless the model's `loss_function` was set. `options` are those of
    losses in transformers. Raises UsageError if the original's is not known.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING

    origin = model.program.origin
    compute = getattr(model, "_loss_function", None)
    if compute is None and origin.loss is None:
        raise UsageError(
            f"the loss that {origin.architecture} computes from labels is not known",
            hint="leave the labels out and compute one from the logits, or set loss_function",
        )
    compute = compute or LOSS_MAPPING[_NAMES[origin.loss]]
    value: Tensor = compute(logits, labels, vocab_size=logits.shape[-1], **options)
    return value
