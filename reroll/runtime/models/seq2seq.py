"""Lowered encoder-decoder models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from reroll.errors import UsageError
from reroll.runtime.functions.hidden import Wish, wanted_entries
from reroll.runtime.functions.loops import ForwardState, keep_positions
from reroll.runtime.functions.losses import language_loss
from reroll.runtime.lowering.assembly import EncoderDecoder
from reroll.runtime.models.causal_lm import check_span, wants_cache
from reroll.runtime.models.generation import RerollGenerationMixin
from reroll.runtime.models.modeling import RerollPreTrainedModel
from reroll.runtime.state.caches import layers_of


class RerollForSeq2SeqLM(RerollPreTrainedModel, RerollGenerationMixin):
    """A lowered encoder-decoder model, whose encoder runs once in generation."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: Wish = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits [batch, time, vocabulary] of the decoder's next token.

        `encoder_outputs` is the result of `get_encoder()`, or any output whose first item is the
        encoder's last hidden state. `labels` are the decoder's tokens, -100 where they do not
        count. Without `decoder_input_ids`, the decoder gets the labels shifted right by one.
        """
        self.refuse_unread(kwargs)
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self._shifted(labels)
        asked, past = use_cache, past_key_values
        use_cache = wants_cache(self, use_cache, past_key_values)
        if use_cache and past_key_values is None:
            self_attention, cross = (DynamicCache(config=self.config) for _ in range(2))
            past_key_values = EncoderDecoderCache(self_attention, cross)
        check_span(self, _self_attention(past_key_values), decoder_input_ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_position_ids": decoder_position_ids,
            "input_features": input_features,
            "input_values": input_values,
            **{k: v for k, v in kwargs.items() if k in self._input_names},
        }
        if inputs.get(self.main_input_name) is None:
            # if given by position, the main input is the first argument, whatever its name
            inputs[self.main_input_name] = input_ids
        if encoder_outputs is None:
            encoder_outputs = self.encode(inputs, output_hidden_states, output_attentions)
        entries = wanted_entries(self, output_hidden_states, output_attentions)
        state = ForwardState(
            self._assembly.loops,
            layers_of(_self_attention(past_key_values), self._assembly.layers),
            keep=logits_to_keep,
            hidden=entries,
            documents=self.documents(inputs, asked, past),
        )
        outputs = self._decode(inputs, encoder_outputs, state)
        logits = outputs["logits"]
        if not self._assembly.interface.keeps_positions:
            logits = keep_positions(logits, state)
        loss = None
        if labels is not None:
            loss = language_loss(self, logits, labels)
        names = ("decoder_hidden_states", "decoder_attentions", "cross_attentions")
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            **({} if entries is None else {name: entries.of(name) for name in names}),
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )
        return result if return_dict is not False else result.to_tuple()

    def encode(
        self,
        inputs: Mapping[str, Tensor | None],
        output_hidden_states: Wish = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Compute the encoder's last hidden state, and what the decoder derives from it alone."""
        values = self._part_arguments(inputs, "encoder")
        entries = wanted_entries(self, output_hidden_states, output_attentions)
        state = ForwardState(self._assembly.loops, hidden=entries)
        try:
            (hidden,) = self._functions.encode(self, *values, state)
        except (IndexError, RuntimeError) as error:
            raise self.explained(error, inputs, None) from error
        output = BaseModelOutput(last_hidden_state=hidden)
        for name in ("hidden_states", "attentions"):
            if entries and (given := entries.of(f"encoder_{name}")) is not None:
                output[name] = given
        state = ForwardState(self._assembly.loops)
        for number, value in enumerate(self._functions.extend(self, hidden, *values, state)):
            output[f"for_decoder_{number}"] = value
        return output

    def _decode(
        self, inputs: Mapping[str, Tensor | None], encoded: Any, state: ForwardState
    ) -> dict[str, Tensor]:
        values = self._part_arguments(inputs, "decoder", state)
        hidden = encoded[0]
        rest = []
        if isinstance(encoded, Mapping):
            rest = [v for k, v in encoded.items() if k.startswith("for_decoder_")]
        if not rest:
            rest = list(self._functions.extend(self, hidden, *values, state))
        try:
            outputs = self._functions.decode(self, hidden, *rest, *values, state)
        except (IndexError, RuntimeError) as error:
            reads = {k: v for k, v in inputs.items() if k.startswith("decoder_")}
            raise self.explained(error, reads, state.layers) from error
        return dict(zip(self.program.outputs, outputs, strict=True))

    @property
    def _functions(self) -> EncoderDecoder:
        assert self._assembly.encoder_decoder is not None
        return self._assembly.encoder_decoder

    def _part_arguments(
        self, inputs: Mapping[str, Tensor | None], part: str, state: ForwardState | None = None
    ) -> list[Tensor | None]:
        """Return all inputs in order; those of the other part are None unless given."""
        past: Any = 0
        if state is not None and state.layers is not None:
            past = state.layers[0].get_seq_length()
        values: dict[str, Tensor | None] = {i.name: inputs.get(i.name) for i in self.program.inputs}
        items = [
            i for i in self.program.inputs if i.name.startswith("decoder_") == (part == "decoder")
        ]
        return self._completed(values, items, past)

    def _shifted(self, labels: Tensor) -> Tensor:
        """Shift labels right by one, behind the start token or their own last token.

        Their last token comes first where the original wraps labels. Raises UsageError if no start
        token is known.
        """
        pad = self.config.pad_token_id
        if self.program.origin.wraps_labels and pad is not None:
            filled = labels.masked_fill(labels == -100, pad)
            last = filled.ne(pad).sum(1, keepdim=True) - 1
            return torch.cat([filled.gather(1, last), filled[:, :-1]], dim=1)
        start = getattr(self.config, "decoder_start_token_id", None)
        if start is None:
            start = self.generation_config.decoder_start_token_id
        if start is None:
            raise UsageError(
                "labels alone need decoder_start_token_id", hint="or give decoder_input_ids"
            )
        first = torch.full_like(labels[:, :1], start)
        shifted = torch.cat([first, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, start if pad is None else pad)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = inputs.get("decoder_attention_mask")
        if mask is not None and "decoder_position_ids" in self._input_names:
            # positions count from the first token that is not padding
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            length = inputs["decoder_input_ids"].shape[1]
            inputs.setdefault("decoder_position_ids", positions[:, -length:])
        return inputs

    def get_encoder(self, modality: str | None = None) -> Any:
        """Return the encoder as a callable that takes the encoder's inputs."""
        del modality
        return Encoder(self)


class RerollForSpeechSeq2Seq(RerollForSeq2SeqLM):
    """A lowered model from speech to text; `decoder_input_ids` are its prompt, without changes."""

    def _prepare_decoder_input_ids_for_generation(
        self,
        batch_size: int,
        model_input_name: str,
        model_kwargs: dict[str, Any],
        *rest: Any,
        **kw: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        # transformers prepends the start token to all prompts except those of its own speech models
        prompt = model_kwargs.pop("decoder_input_ids", None)
        if prompt is not None:
            return prompt, model_kwargs
        return super()._prepare_decoder_input_ids_for_generation(  # type: ignore[no-any-return]
            batch_size, model_input_name, model_kwargs, *rest, **kw
        )


class Encoder:
    """The encoder of a lowered model."""

    def __init__(self, model: RerollForSeq2SeqLM) -> None:
        self.model = model
        self.main_input_name = model.main_input_name

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """Encode the encoder's inputs: the main one by position, or all by keyword."""
        inputs = dict(kwargs)
        wishes = [inputs.pop(f"output_{name}", None) for name in ("hidden_states", "attentions")]
        if args:
            inputs[self.main_input_name] = args[0]
        return self.model.encode(inputs, *wishes)

    __call__ = forward


def _self_attention(past: Any) -> Cache | None:
    return past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
