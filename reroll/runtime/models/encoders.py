"""Lowered models that run once over their input: encoders of text, images and audio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reroll.errors import UsageError
from reroll.rewrite.ir.hidden import marked_names
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.hidden import Wish, wanted_entries
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.inputs import naming
from reroll.runtime.models.modeling import RerollPreTrainedModel
from reroll.runtime.models.outputs import output_class

# inputs of a loss for question answering: the position of the answer
_LOSS_INPUTS = frozenset({"start_positions", "end_positions"})


class RerollModel(RerollPreTrainedModel):
    """A lowered model without generation; its outputs are those of the Program, by name."""

    def __init__(self, config: RerollConfig, program: Program | None = None) -> None:
        super().__init__(config, program)
        self._make_output_class()

    def _make_output_class(self) -> None:
        """Make the class of the outputs: before a forward, as compiled code cannot make a class."""
        names = marked_names(self.program)
        self._output_class = output_class(("loss", *self.program.outputs, *names))

    def __getstate__(self) -> dict[str, Any]:
        # the class is made again where a pickle is opened
        return {k: v for k, v in self.__dict__.items() if k != "_output_class"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_output_class()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: Wish = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the Program's outputs as a `ModelOutput`, with `loss` first for `labels`.

        The main input may be given by position, whatever its name. `inputs_embeds` [batch, time,
        width] replace the embeddings of `input_ids`. `output_hidden_states` requests the original's
        hidden states: all, or by number. `output_attentions` requests its attention weights [batch,
        heads, queries, keys].
        """
        values = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "pixel_values": pixel_values,
            "input_features": input_features,
            "input_values": input_values,
            **kwargs,
        }
        if self.main_input_name != "input_ids" and values.get(self.main_input_name) is None:
            values[self.main_input_name] = values.pop("input_ids")
        self.refuse_unread(values, _LOSS_INPUTS)
        if inputs_embeds is not None:
            values[self.main_input_name] = self._tokens(values[self.main_input_name], inputs_embeds)
        entries = wanted_entries(self, output_hidden_states, output_attentions)
        documents = self.documents(values, kwargs.get("use_cache"), None)
        outputs, _ = self.run_program(
            values, hidden=entries, embeddings=self._given(inputs_embeds), documents=documents
        )
        loss = None
        if labels is not None or "start_positions" in kwargs:
            loss = self.loss(outputs, labels, kwargs)
        given = {} if entries is None else {name: entries.of(name) for name in entries.entries}
        result = self._output_class(loss=loss, **outputs, **given)
        return self.returned(result, return_dict)

    def loss(
        self, outputs: dict[str, Tensor], labels: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Compute the loss of the model's task."""
        raise UsageError(f"{type(self).__name__} has no loss", hint="compute one from its outputs")


class RerollForMaskedLM(RerollModel):
    """A lowered masked language model."""

    def loss(
        self, outputs: dict[str, Tensor], labels: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        logits = outputs["logits"]
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return loss


class RerollForSequenceClassification(RerollModel):
    """A lowered classifier of sequences."""

    def loss(
        self, outputs: dict[str, Tensor], labels: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        loss: Tensor = self.loss_function(labels, outputs["logits"], self.config)
        return loss


class RerollForImageClassification(RerollForSequenceClassification):
    """A lowered classifier of images."""


class RerollForTokenClassification(RerollModel):
    """A lowered classifier of tokens."""

    def loss(
        self, outputs: dict[str, Tensor], labels: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        loss: Tensor = self.loss_function(outputs["logits"], labels, self.config)
        return loss


class RerollForQuestionAnswering(RerollModel):
    """A lowered model that finds the span of an answer in a text."""

    @naming("start_positions", "end_positions", like=RerollModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run `RerollModel.forward`; `start_positions` and `end_positions` [batch] give a loss."""
        return super().forward(*args, **kwargs)

    def loss(
        self, outputs: dict[str, Tensor], labels: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        positions = (kwargs.get("start_positions"), kwargs.get("end_positions"))
        loss: Tensor = self.loss_function(
            outputs["start_logits"], outputs["end_logits"], *positions
        )
        return loss
