"""Lowered decoders: a forward with a cache, and the layers without a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache

from reroll.errors import UsageError
from reroll.runtime.functions.hidden import Wish, wanted_entries
from reroll.runtime.functions.loops import ForwardState
from reroll.runtime.models.backbone import last_hidden_output
from reroll.runtime.models.generation import without_cache
from reroll.runtime.models.modeling import RerollPreTrainedModel
from reroll.runtime.state.trees import check_planted, plant, tree_positions

# the arguments of a loss other than logits and labels
LOSS_OPTIONS = frozenset({"num_items_in_batch", "ignore_index", "shift_labels"})


class Run(NamedTuple):
    """What a forward has computed: outputs of a function, its state, the cache, entries."""

    outputs: tuple[Any, ...]
    state: ForwardState
    past_key_values: Any
    hidden_states: tuple[Tensor | None, ...] | None
    attentions: tuple[Tensor | None, ...] | None


class RerollDecoder(RerollPreTrainedModel):
    """A lowered model of text that can continue from a cache."""

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
        parents: Any = None,
        **kwargs: Any,
    ) -> Run:
        """Run a function of the assembly with the arguments of a forward, and with a cache.

        With `parents`, tokens are those of a tree: see `reroll.runtime.state.trees`.
        """
        self.refuse_unread({"position_ids": position_ids, **kwargs}, LOSS_OPTIONS)
        input_ids = self._tokens(input_ids, inputs_embeds)
        asked, past = use_cache, past_key_values
        use_cache = wants_cache(self, use_cache, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        check_span(self, past_key_values, input_ids)
        if parents is not None:
            tree = plant(self, past_key_values, parents, input_ids, attention_mask)
            position_ids = tree_positions(self, past_key_values, tree, position_ids)
        elif past_key_values is not None:
            check_planted(past_key_values)
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


class RerollDecoderModel(RerollDecoder):
    """The layers of a lowered language model: it gives hidden states, and keeps a cache."""

    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """Compute the last hidden state [batch, time, width], behind the last norm.

        The arguments are those of `RerollDecoder.run_forward`, in its order.
        """
        run = self.run_forward(self._assembly.main, *args, **kwargs)
        return last_hidden_output(self, run, return_dict)


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
