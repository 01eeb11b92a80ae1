"""Generation by a lowered model: the original's settings, with a cache or without one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin, GenerationMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reroll.errors import UsageError
from reroll.rewrite.capture.side_files import GENERATION_FILE
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import NO_CACHE

log = logging.getLogger(__name__)


def generation_config(program: Program) -> GenerationConfig | None:
    """Return the original's generation settings, from its file or else its configuration."""
    path = program.origin.files.get(GENERATION_FILE)
    if path is not None and Path(path).is_file():
        try:
            return GenerationConfig.from_pretrained(Path(path).parent, Path(path).name)
        # transformers then uses the configuration, too
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s cannot be read, and is ignored: %s", path, error)
    original = dict(program.origin.config)
    try:
        config = CONFIG_MAPPING[original.get("model_type")].from_dict(original)
    except (KeyError, TypeError, ValueError):
        return None
    return GenerationConfig.from_model_config(config)


class RerollGenerationMixin(GenerationMixin):
    """transformers' `generate` for lowered models, with a cache or without.

    A model that was captured without a cache processes all tokens again for each new one.
    """

    @property
    def keeps_cache(self) -> bool:
        """Whether a cache can hold all that new tokens need of earlier ones."""
        raise NotImplementedError

    @property
    def masks_keys_only(self) -> bool:
        """Whether the padding of tokens is read by attentions and recurrences alone."""
        raise NotImplementedError

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if self.program.origin.adds_tokens:
            raise UsageError(
                "the original's generate reads tokens beside those that it is given, such as a "
                "mask token at the end, and reroll does not add them",
                where=type(self).__name__,
                hint="add them yourself, and take the next token from the logits of a call",
            )
        if generation_config.assistant_early_exit is not None:
            # transformers would change the configuration, which a lowered model does not read
            raise UsageError(
                "a lowered model does not draft with its own first layers",
                where="assistant_early_exit",
                hint="give a draft as assistant_model: any model of the same tokens, such as a "
                "rewriting of this one with fewer trips",
            )
        if self.keeps_cache:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, *rest, **kwargs
            )
        drafts = generation_config.is_assistant
        if drafts or generation_mode == GenerationMode.ASSISTED_GENERATION:
            role = "draft for another model" if drafts else "check what a draft model proposes"
            raise without_cache(self, f"it cannot {role}", "generate without an assistant")
        if model_kwargs.get("past_key_values") is not None:
            raise without_cache(self, "it cannot use past_key_values", "pass all tokens")
        if model_kwargs.get("inputs_embeds") is not None:
            hint = "give it input_ids"
            raise without_cache(self, "it cannot generate after embeddings", hint)
        if generation_config.use_cache and self.program.origin.cache_span == 0:
            hint = "use_cache=False gives what the original gives with use_cache=False"
            raise without_cache(self, "it does not generate as the original does with one", hint)
        generation_config.use_cache, generation_config.cache_implementation = False, None
        return None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raise UsageError: transformers' paged attention takes the place of a model's own."""
        raise UsageError(
            "a lowered model has its own attention and recurrences, which keep no pages of a cache",
            where="continuous batching",
            hint="generate takes a batch of prompts, padded on the left",
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """Prepare inputs as in transformers.

        Drops the cache at the length at which the original drops its own.
        """
        limit = self.program.origin.rereads_at
        crossed = limit is not None and input_ids.shape[1] >= limit
        if crossed and past_key_values and past_key_values.get_seq_length() < limit:
            past_key_values = kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, **kwargs
        )

    def create_masks_for_generate(
        self,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the padding mask for a static cache: the model makes its own masks.

        Behind the prompt, it is as long as the cache, with zeros behind the last token: a mask that
        grew with every token would have each step compiled again.
        """
        del kwargs
        if attention_mask is None or is_first_iteration or not self.masks_keys_only:
            return attention_mask
        # layers of constant size have no maximum; `generate` notes that of the caches it makes
        longest = getattr(self, "_previous_max_cache_length", 0)
        longest = max(longest, past_key_values.get_max_length())
        missing = longest - attention_mask.shape[1]
        return F.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask


def without_cache(model: Any, consequence: str, hint: str) -> UsageError:
    """Make the error for a cache that is requested of a model captured without one."""
    remarks = model.program.origin.remarks
    why = "".join(f" ({remark})" for remark in remarks if remark.startswith(NO_CACHE))
    return UsageError(
        f"the model keeps no cache, so {consequence}{why}", where=type(model).__name__, hint=hint
    )
