"""Lowered encoder-decoder models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from reroll.errors import UsageError
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.hidden import Wish, wanted_entries
from reroll.runtime.functions.loops import ForwardState, keep_positions
from reroll.runtime.functions.losses import language_loss
from reroll.runtime.lowering.assembly import EncoderDecoder
from reroll.runtime.models.backbone import DECODER_TOKENS, place_pair
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.decoder import check_span, wants_cache
from reroll.runtime.models.generation import RerollGenerationMixin
from reroll.runtime.models.modeling import RerollPreTrainedModel
from reroll.runtime.models.own_generation import take_own_generation
from reroll.runtime.state.caches import layers_of


class Run(NamedTuple):
    """What a forward has computed: outputs of a function, its state, and what a caller can get."""

    outputs: tuple[Any, ...]
    state: ForwardState
    encoded: BaseModelOutput
    past_key_values: Any
    hidden_states: tuple[Tensor | None, ...] | None
    attentions: tuple[Tensor | None, ...] | None
    cross_attentions: tuple[Tensor | None, ...] | None


class RerollForSeq2SeqLM(RerollPreTrainedModel, RerollGenerationMixin):
    """A lowered encoder-decoder model, whose encoder runs once in generation."""

    def __init__(self, config: RerollConfig, program: Program | None = None) -> None:
        super().__init__(config, program)
        place_pair(self)
        take_own_generation(self)

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
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits [batch, time, vocabulary] of the decoder's next token.

        `encoder_outputs` is the result of `get_encoder()`, or any output whose first item is the
        encoder's last hidden state. `labels` are the decoder's tokens, -100 where they do not
        count. Without tokens of the decoder, it gets the labels shifted right by one.
        `inputs_embeds` and `decoder_inputs_embeds` [batch, time, width] replace the embeddings of
        `input_ids` and `decoder_input_ids`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        run = self.run_forward(
            self._functions.decode,
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            input_features=input_features,
            input_values=input_values,
            decoder_position_ids=decoder_position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
            **kwargs,
        )
        logits = self.named_outputs(run.outputs)["logits"]
        if not self._assembly.interface.keeps_positions:
            logits = keep_positions(logits, run.state)
        loss = None
        if labels is not None:
            loss = language_loss(self, logits, labels)
        result = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=run.past_key_values,
            decoder_hidden_states=run.hidden_states,
            decoder_attentions=run.attentions,
            cross_attentions=run.cross_attentions,
            encoder_last_hidden_state=run.encoded[0],
            encoder_hidden_states=run.encoded.get("hidden_states"),
            encoder_attentions=run.encoded.get("attentions"),
        )
        return self.returned(result, return_dict)

    def run_forward(
        self,
        function: Callable[..., tuple[Any, ...]],
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        *,
        decoder_position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: Wish = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Run:
        """Run the encoder, if need be, and a function of the decoder, with a cache."""
        self.refuse_unread(kwargs)
        self._refuse_mask(attention_mask)
        asked, past = use_cache, past_key_values
        use_cache = wants_cache(self, use_cache, past_key_values)
        if use_cache and past_key_values is None:
            self_attention, cross = (DynamicCache(config=self.config) for _ in range(2))
            past_key_values = EncoderDecoderCache(self_attention, cross)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_position_ids": decoder_position_ids,
            **{k: v for k, v in kwargs.items() if k in self._input_names},
        }
        if inputs.get(self.main_input_name) is None:
            # if given by position, the main input is the first argument, whatever its name
            inputs[self.main_input_name] = input_ids
        embeddings = self._given(decoder_inputs_embeds, DECODER_TOKENS)
        inputs[DECODER_TOKENS] = self._tokens(
            decoder_input_ids, decoder_inputs_embeds, DECODER_TOKENS
        )
        check_span(self, _self_attention(past_key_values), inputs[DECODER_TOKENS])
        if encoder_outputs is None:
            encoded = self.encode(inputs, output_hidden_states, output_attentions, inputs_embeds)
        else:
            encoded = _as_output(encoder_outputs)
        entries = wanted_entries(self, output_hidden_states, output_attentions)
        state = ForwardState(
            self._assembly.loops,
            layers_of(_self_attention(past_key_values), self._assembly.layers),
            keep=logits_to_keep,
            hidden=entries,
            embeddings=embeddings,
            documents=self.documents(inputs, asked, past),
        )
        if inputs_embeds is not None and encoder_outputs is None:
            self._refuse_derived(inputs)
        outputs = self._decode(function, inputs, encoded, state)
        names = ("decoder_hidden_states", "decoder_attentions", "cross_attentions")
        given = (None if entries is None else entries.of(name) for name in names)
        return Run(outputs, state, encoded, past_key_values if use_cache else None, *given)

    def run_encoder(
        self,
        *,
        output_hidden_states: Wish = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **inputs: Any,
    ) -> BaseModelOutput:
        """Run the encoder alone, on its inputs by keyword."""
        self.refuse_unread(inputs)
        return self.encode(inputs, output_hidden_states, output_attentions, inputs_embeds)

    def encode(
        self,
        inputs: Mapping[str, Tensor | None],
        output_hidden_states: Wish = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> BaseModelOutput:
        """Compute the encoder's last hidden state, and what the decoder derives from it alone."""
        main = self.main_input_name
        inputs = {**inputs, main: self._tokens(inputs.get(main), inputs_embeds)}
        values = self._part_arguments(inputs, "encoder")
        entries = wanted_entries(self, output_hidden_states, output_attentions)
        embeddings = self._given(inputs_embeds)
        state = ForwardState(self._assembly.loops, hidden=entries, embeddings=embeddings)
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
        self,
        function: Callable[..., tuple[Any, ...]],
        inputs: Mapping[str, Tensor | None],
        encoded: BaseModelOutput,
        state: ForwardState,
    ) -> tuple[Any, ...]:
        values = self._part_arguments(inputs, "decoder", state)
        hidden = encoded[0]
        rest = [v for k, v in encoded.items() if k.startswith("for_decoder_")]
        if not rest:
            rest = list(self._functions.extend(self, hidden, *values, state))
        try:
            return function(self, hidden, *rest, *values, state)
        except (IndexError, RuntimeError) as error:
            reads = {k: v for k, v in inputs.items() if k.startswith("decoder_")}
            raise self.explained(error, reads, state.layers) from error

    def _refuse_mask(self, mask: Tensor | None) -> None:
        """Raise UsageError for a mask that the model does not read, unless it hides nothing."""
        if mask is not None and not torch.compiler.is_compiling() and not mask.all():
            self.refuse_unread({"attention_mask": mask})

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

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels [batch, time] right by one, behind the start token or their own last token.

        Labels of -100 become padding, as in the original. Their last token comes first where the
        original wraps labels. Raises UsageError if no start token is known.
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
        """Return the encoder, a module that takes the encoder's inputs."""
        del modality
        return self._encoder_part

    def get_decoder(self) -> Any:
        """Return the decoder, a module without the head."""
        return self._decoder_part


class RerollForSpeechSeq2Seq(RerollForSeq2SeqLM):
    """A lowered model from speech to text."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as in transformers.

        Called by the original's own `generate`, which takes the cache of each row apart, it returns
        no cache: keys and values of cross-attention are beside it.
        """
        result = super().generate(*args, **kwargs)
        own = type(self).generate is not RerollForSpeechSeq2Seq.generate
        if not own or not isinstance(result, Mapping):
            return result
        kind: Any = type(result)
        return kind(**{k: v for k, v in result.items() if k != "past_key_values"})


def _as_output(encoded: Any) -> BaseModelOutput:
    """Return an encoder's output by name: one that is a tuple begins with the last hidden state."""
    if isinstance(encoded, BaseModelOutput):
        return encoded
    if isinstance(encoded, Mapping):
        return BaseModelOutput(
            **{k: encoded.get(k) for k in ("last_hidden_state", "hidden_states")}
        )
    return BaseModelOutput(encoded[0], encoded[1] if len(encoded) > 1 else None)


def _self_attention(past: Any) -> Cache | None:
    return past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
