"""Lowered causal language models."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from reroll.rewrite.capture.pictures import picture_inputs
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.exits import DepthReport, depth_report
from reroll.runtime.functions.hidden import Wish
from reroll.runtime.functions.loops import keep_positions
from reroll.runtime.functions.losses import language_loss
from reroll.runtime.models.backbone import place_backbone
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.decoder import LOSS_OPTIONS, RerollDecoder
from reroll.runtime.models.generation import RerollGenerationMixin
from reroll.runtime.models.inputs import naming
from reroll.runtime.models.outputs import DepthOutput

log = logging.getLogger(__name__)


class RerollForCausalLM(RerollDecoder, RerollGenerationMixin):
    """A lowered causal language model: `generate`, losses and caches as in transformers."""

    def __init__(self, config: RerollConfig, program: Program | None = None) -> None:
        super().__init__(config, program)
        place_backbone(self)

    @naming("token_type_ids", "pixel_values")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: Wish = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        parents: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits [batch, time, vocabulary] of the next token.

        `attention_mask` [batch, past + time] is 0 at padding. Without it and without a cache,
        `position_ids` that start again within a row begin a new document, as in transformers.
        `inputs_embeds` [batch, time, width] replace the embeddings of `input_ids`. `labels` are the
        input ids, -100 where they do not count. `logits_to_keep` is the number of last positions to
        compute logits for, or a tensor of positions. `output_hidden_states` requests the original's
        hidden states: all, or by number. `output_attentions` requests its attention weights [batch,
        heads, time, keys]. With `parents` [time], the tokens behind a cache are those of a tree:
        each follows the token of that number, or the last one of the cache if it is -1. Then
        `reroll.runtime.state.growing.keep` says which of them stay.
        """
        run = self.run_forward(
            self._assembly.main,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            parents=parents,
            **kwargs,
        )
        outputs = self.named_outputs(run.outputs)
        logits = outputs.pop("logits")
        if not self._assembly.interface.keeps_positions:
            logits = keep_positions(logits, run.state)
        loss = None
        if labels is not None:
            extra = {k: v for k, v in kwargs.items() if k in LOSS_OPTIONS}
            loss = language_loss(self, logits, labels, **extra)
        # a class that has every output, so that exported graphs can return it
        result = (DepthOutput if "depth" in outputs else CausalLMOutputWithPast)(
            loss=loss,
            logits=logits,
            past_key_values=run.past_key_values,
            hidden_states=run.hidden_states,
            attentions=run.attentions,
        )
        for name, value in outputs.items():
            result[name] = value
        return self.returned(result, return_dict)

    # the depths of new tokens in the running `generate`, and the report of the last `generate`
    _depths: list[Tensor] | None = None
    depth_report: DepthReport | None = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as in transformers; for a model with exits, set `depth_report` afterwards."""
        if "depth" not in self.program.outputs:
            return super().generate(*args, **kwargs)
        self._depths = []
        try:
            result = super().generate(*args, **kwargs)
            self.depth_report = depth_report(self._depths)
            log.info("generated with %s", self.depth_report)
        finally:
            self._depths = None
        return result

    def _update_model_kwargs_for_generation(
        self, outputs: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # here, and not in `forward`, which `generate` may compile
        if self._depths is not None and "depth" in outputs:
            self._depths.append(outputs["depth"][:, -1])
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, *args, **kwargs
        )
        return updated

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # transformers reads from this signature that `inputs_embeds` are accepted
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if "position_ids" not in self._input_names:
            # transformers makes them for every forward that has them in its signature
            inputs.pop("position_ids", None)
        if not kwargs.get("is_first_iteration") and kwargs.get("use_cache"):
            # after the first step, the features of the pictures are in the cache
            for name in picture_inputs(self.program.inputs):
                inputs.pop(name, None)
        return inputs


class RerollForConditionalGeneration(RerollForCausalLM):
    """A lowered language model that reads text, with or without pictures in the prompt."""
