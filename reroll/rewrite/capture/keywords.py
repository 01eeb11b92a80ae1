"""Keyword arguments that models pass on to functions of attention and of recurrences."""

from __future__ import annotations

from typing import Any

from reroll.errors import CaptureError

# keywords that do not change what eager attention or a recurrence computes: the mask already
# includes the window and the causality, and the rest concerns caches, outputs and other kernels
_NO_EFFECT = frozenset(
    "sliding_window is_causal position_ids cache_position past_key_values past_key_value use_cache "
    "output_attentions output_hidden_states output_router_logits return_dict num_items_in_batch "
    "position_embeddings deterministic target_dtype layer_idx dropout training logits_to_keep "
    "head_mask".split()
)


def refuse_unmodelled(called: str, op: str, keywords: dict[str, Any], where: str | None) -> None:
    """Raise CaptureError for a keyword that has a value and that an op does not model."""
    unknown = [
        name
        for name, argument in keywords.items()
        if name not in _NO_EFFECT and argument is not None and argument is not False
    ]
    if unknown:
        raise CaptureError(
            f"{called} is called with {', '.join(sorted(unknown))}, which {op} does not model",
            where=where,
        )
