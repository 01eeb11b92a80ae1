"""The loss of a lowered language model: the one that the original computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reroll.errors import UsageError

# names of transformers' losses by `origin.loss`
_NAMES = {"shifted": "ForCausalLM", "aligned": "ForMaskedLM"}


def language_loss(model: Any, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Compute the cross entropy of logits and labels, a scalar.

    `logits` are [batch, time, vocabulary], `labels` [batch, time]. The loss is the original's,
    unless the model's `loss_function` was set. `options` are those of losses in transformers.
    Raises UsageError if the original's loss is not known.
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
