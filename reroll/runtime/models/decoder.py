"""Lowered language models without their head."""

from __future__ import annotations

from typing import Any

from reroll.runtime.models.backbone import last_hidden_output
from reroll.runtime.models.causal_lm import RerollForCausalLM


class RerollDecoderModel(RerollForCausalLM):
    """The layers of a lowered language model: it gives hidden states, and keeps a cache."""

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: there is no head to generate with."""
        return False

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Compute the last hidden state [batch, time, width], behind the last norm.

        The arguments are those of `RerollForCausalLM.run_forward`, in its order.
        """
        run = self.run_forward(self._assembly.main, *args, **kwargs)
        return last_hidden_output(self, run, return_dict)
