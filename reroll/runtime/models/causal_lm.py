"""Lowered causal language models."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from reroll.errors import UsageError
from reroll.rewrite.capture.pictures import picture_inputs
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.exits import DepthReport, depth_report
from reroll.runtime.functions.hidden import Wish, wanted_entries
from reroll.runtime.functions.loops import ForwardState, keep_positions
from reroll.runtime.functions.losses import language_loss
from reroll.runtime.models.backbone import place_backbone
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.generation import RerollGenerationMixin, without_cache
from reroll.runtime.models.modeling import RerollPreTrainedModel, naming
from reroll.runtime.models.outputs import DepthOutput

log = logging.getLogger(__name__)

# the arguments of a loss other than logits and labels
_LOSS_OPTIONS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})


class Run(NamedTuple):
    """What a forward has computed: outputs of a function, its state, the cache, entries."""

    outputs: tuple[Any, ...]
    state: ForwardState
    past_key_values: Any
    hidden_states: tuple[Tensor | None, ...] | None
    attentions: tuple[Tensor | None, ...] | None


class RerollForCausalLM(RerollPreTrainedModel, RerollGenerationMixin):
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
        **kwargs: Any,
    ) -> Any:
        """Compute the logits [batch, time, vocabulary] of the next token.

        `attention_mask` [batch, past + time] is 0 at padding. Without it and without a cache,
        `position_ids` that start again within a row begin a new document, as in transformers.
        `inputs_embeds` [batch, time, width] replace the embeddings of `input_ids`. `labels` are the
        input ids, -100 where they do not count. `logits_to_keep` is the number of last positions to
        compute logits for, or a tensor of positions. `output_hidden_states` requests the original's
        hidden states: all, or by number. `output_attentions` requests its attention weights [batch,
        heads, time, keys].
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
            **kwargs,
        )
        outputs = self.named_outputs(run.outputs)
        logits = outputs.pop("logits")
        if not self._assembly.interface.keeps_positions:
            logits = keep_positions(logits, run.state)
        loss = None
        if labels is not None:
            extra = {k: v for k, v in kwargs.items() if k in _LOSS_OPTIONS}
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

    def run_forward(
        self,
        function: Callable[..., tuple[Any, ...]],
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: Wish = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Run:
        """Run a function of the assembly with the arguments of a forward, and with a cache."""
        self.refuse_unread({"position_ids": position_ids, **kwargs}, _LOSS_OPTIONS)
        input_ids = self._tokens(input_ids, inputs_embeds)
        asked, past = use_cache, past_key_values
        use_cache = wants_cache(self, use_cache, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        check_span(self, past_key_values, input_ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **{k: v for k, v in kwargs.items() if k in self._input_names},
        }
        entries = wanted_entries(self, output_hidden_states, output_attentions)
        outputs, state = self.run_function(
            function,
            inputs,
            past_key_values,
            keep=logits_to_keep,
            hidden=entries,
            embeddings=self._given(inputs_embeds),
            documents=self.documents(inputs, asked, past),
        )
        names = ("hidden_states", "attentions")
        given = (None if entries is None else entries.of(name) for name in names)
        return Run(outputs, state, past_key_values if use_cache else None, *given)

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


def wants_cache(model: RerollPreTrainedModel, asked: bool | None, past: Any) -> bool:
    """Whether a forward uses a cache: as requested, and by default when not training.

    Raises UsageError if a model without a cache is asked for one.
    """
    if not model.keeps_cache:
        if asked or past is not None:
            raise without_cache(
                model,
                "a forward can neither take nor return one",
                "leave use_cache out, and pass all tokens",
            )
        return False
    if model.training and model.is_gradient_checkpointing:
        return False
    if asked is None:
        asked = past is not None or (not model.training and model.config.use_cache)
    return bool(asked)


def check_span(model: RerollPreTrainedModel, past: Any, tokens: Tensor | None) -> None:
    """Raise UsageError where the original's cache would have dropped tokens still visible."""
    span = model.program.origin.cache_span
    before = 0 if span is None or past is None else past.get_seq_length()
    if span is not None and tokens is not None and before and before + tokens.shape[1] > span:
        raise UsageError(
            f"the original's cache keeps {span} tokens, and {before + tokens.shape[1]} are asked "
            "for: with a cache it computes something else than without, which is not captured",
            where=type(model).__name__,
            hint="use_cache=False gives what the original gives with use_cache=False",
        )
