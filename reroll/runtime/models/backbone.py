"""The part of a lowered language model below its head, as a module that can be called."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from reroll.runtime.lowering.modules import Scope
from reroll.runtime.models.config import RerollConfig


class Backbone(Scope):
    """The module that holds all weights but the head's; calling it gives the last hidden state.

    `base_model` and `get_decoder()` return it. It has no code of its own: it runs the model that it
    belongs to, without the head.
    """

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

    def get_decoder(self) -> nn.Module:
        """Return this module: it has no encoder."""
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that looks up the tokens."""
        module: nn.Module = self.owner.get_input_embeddings()
        return module

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Compute the last hidden state [batch, time, width], behind the last norm.

        The arguments are those of `RerollForCausalLM.run_forward`, in its order.
        """
        run = self.owner.run_forward(self.owner._assembly.backbone, *args, **kwargs)
        return last_hidden_output(run, return_dict)


def last_hidden_output(run: Any, return_dict: bool | None) -> Any:
    """Return the output of transformers' decoders for a `Run` that gives the last hidden state."""
    result = BaseModelOutputWithPast(
        last_hidden_state=run.outputs[0],
        past_key_values=run.past_key_values,
        hidden_states=run.hidden_states,
        attentions=run.attentions,
    )
    return result if return_dict is not False else result.to_tuple()


def place_backbone(model: Any) -> None:
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
    module.__class__ = Backbone
    # no submodule: the model would be a part of itself
    module.__dict__["owner"] = model
    model.base_model_prefix = root
