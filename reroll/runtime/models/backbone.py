"""The parts of a lowered model below its head, as modules that can be called.

`base_model`, `get_encoder()` and `get_decoder()` return them. They have no code of their own: they
run the model that they belong to, without the head.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)

from reroll.runtime.functions.weights import Scope
from reroll.runtime.models.config import RerollConfig

# the input that has the decoder's tokens
DECODER_TOKENS = "decoder_input_ids"


class Part(nn.Module):
    """A module that holds weights of a lowered model, and runs that part of it."""

    owner: Any

    @property
    def config(self) -> RerollConfig:
        """The model's configuration."""
        config: RerollConfig = self.owner.config
        return config

    @property
    def dtype(self) -> Any:
        """The dtype of the model's weights."""
        return self.owner.dtype

    @property
    def device(self) -> Any:
        """The device of the model's weights."""
        return self.owner.device

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that looks up the tokens."""
        module: nn.Module = self.owner.get_input_embeddings()
        return module


class Backbone(Part):
    """The module that holds all weights but the head's; calling it gives the last hidden state."""

    def get_decoder(self) -> nn.Module:
        """Return this module: it has no encoder."""
        return self

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Compute the last hidden state [batch, time, width], behind the last norm.

        The arguments are those of `RerollDecoder.run_forward`, in its order. As of every
        scope, the name of a weight gives that weight.
        """
        if args and isinstance(args[0], str):
            return super().forward(*args)
        run = self.owner.run_forward(self.owner._assembly.backbone, *args, **kwargs)
        return last_hidden_output(self.owner, run, return_dict)


def last_hidden_output(model: Any, run: Any, return_dict: bool | None) -> Any:
    """Return the output of transformers' decoders for a `Run` that gives the last hidden state."""
    result = BaseModelOutputWithPast(
        last_hidden_state=run.outputs[0],
        past_key_values=run.past_key_values,
        hidden_states=run.hidden_states,
        attentions=run.attentions,
    )
    return model.returned(result, return_dict)


class PairBackbone(Part):
    """The module that holds all weights of an encoder and a decoder but the head's."""

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder."""
        module: nn.Module = self.owner.get_encoder(modality)
        return module

    def get_decoder(self) -> nn.Module:
        """Return the decoder."""
        module: nn.Module = self.owner.get_decoder()
        return module

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Compute the decoder's last hidden state [batch, time, width], behind the last norm.

        The arguments are those of `RerollForSeq2SeqLM.run_forward`, in its order.
        """
        run = self.owner.run_forward(self.owner._assembly.encoder_decoder.backbone, *args, **kwargs)
        result = Seq2SeqModelOutput(
            last_hidden_state=run.outputs[0],
            past_key_values=run.past_key_values,
            decoder_hidden_states=run.hidden_states,
            encoder_last_hidden_state=run.encoded[0],
            decoder_attentions=run.attentions,
            cross_attentions=run.cross_attentions,
            encoder_hidden_states=run.encoded.get("hidden_states"),
            encoder_attentions=run.encoded.get("attentions"),
        )
        return self.owner.returned(result, return_dict)


class Encoder(Part):
    """The encoder of a lowered model."""

    main_input_name: str

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Encode the encoder's inputs: the main one by position, or all by keyword.

        The output also has what the decoder derives from the last hidden state alone.
        """
        if args:
            kwargs[self.main_input_name] = args[0]
        result = self.owner.run_encoder(**kwargs)
        return self.owner.returned(result, return_dict)


class Decoder(Part):
    """The decoder of a lowered model, without its head."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that looks up the decoder's tokens."""
        path = self.owner._assembly.interface.embeddings[DECODER_TOKENS]
        module: nn.Module = self.owner.get_submodule(path)
        return module

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the last hidden state [batch, time, width], behind the last norm.

        `encoder_hidden_states` [batch, encoder's time, width] is the encoder's last hidden state.
        """
        run = self.owner.run_forward(
            self.owner._assembly.encoder_decoder.backbone,
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            decoder_attention_mask=attention_mask,
            decoder_inputs_embeds=inputs_embeds,
            decoder_position_ids=position_ids,
            encoder_outputs=(encoder_hidden_states,),
            past_key_values=past_key_values,
            **kwargs,
        )
        result = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=run.outputs[0],
            past_key_values=run.past_key_values,
            hidden_states=run.hidden_states,
            attentions=run.attentions,
            cross_attentions=run.cross_attentions,
        )
        return self.owner.returned(result, return_dict)


def place_backbone(model: Any, kind: type[Part] = Backbone) -> None:
    """Make the module that holds all weights but the head's the model's backbone, if there is one.

    Sets `base_model_prefix` to its name.
    """
    if not model._assembly.interface.keeps_positions:
        return
    head = model._assembly.interface.head
    names = [n for n, _ in model.named_parameters() if head is None or not n.startswith(f"{head}.")]
    roots = Counter(name.partition(".")[0] for name in names)
    root = next(iter(roots), "")
    module = model._modules.get(root)
    if len(roots) != 1 or type(module) is not Scope:
        return
    place(module, kind, model)
    model.base_model_prefix = root


def place_pair(model: Any) -> None:
    """Make the modules of encoder and decoder callable, and their common one if there is one.

    As in transformers, they are named `encoder` and `decoder`, of the model or of its base model.
    Where the weights are elsewhere, modules without weights take their place.
    """
    place_backbone(model, PairBackbone)
    for name, kind in (("encoder", Encoder), ("decoder", Decoder)):
        module = next(
            (m._modules.get(name) for m in (model, model.base_model) if name in m._modules), None
        )
        part: nn.Module = module if type(module) is Scope else Scope()
        place(part, kind, model)
        if kind is Encoder:
            part.main_input_name = model.main_input_name
        model.__dict__[f"_{name}_part"] = part


def place(module: Any, kind: type[Part], model: Any) -> None:
    """Give a module of a lowered model the class of a part."""
    module.__class__ = kind
    # no submodule: the model would be a part of itself
    module.__dict__["owner"] = model
