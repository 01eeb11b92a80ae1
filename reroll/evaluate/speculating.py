"""Drafts made by passes, and decoding with them: see `reroll.runtime.speculation`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

import reroll
from reroll.errors import UsageError
from reroll.runtime.speculation.decode import speculate
from reroll.runtime.speculation.sampling import Sampling
from reroll.runtime.speculation.twins import twin as lower_twin

if TYPE_CHECKING:
    from transformers import DynamicCache

    from reroll.rewrite.pipeline.pipeline import Pipeline

# names of drafts with their models; `lookup` needs none
Drafts: TypeAlias = list[tuple[str, Any]]
LOOKUP = "lookup"
# what "auto" tries beside `lookup`
WINDOW = "window(size=256, sinks=4)"


def twin(model: Any, passes: Pipeline, **options: Any) -> Any:
    """Rewrite a lowered model into another that shares its weights in memory.

    `passes` and `options` are those of `run_passes`, which measures nothing here. The twin adds
    only the weights that passes have added or changed. It can draft for the model:

        model = program.to_module()
        draft = reroll.twin(model, "window(size=256, sinks=4)")
        model.generate(**inputs, assistant_model=draft)

    Raises UsageError for a model that is not lowered, and what `run_passes` raises.
    """
    if not hasattr(model, "to_program"):
        raise UsageError(
            "only a lowered model has a twin",
            where=type(model).__name__,
            hint="capture it first: reroll.capture(model).to_module()",
        )
    present = model.to_program()
    program = reroll.run_passes(present, passes, **{"measure": "off"} | options)
    return lower_twin(model, present, program)


def generate(
    model: Any,
    input_ids: Tensor,
    draft: Any = "auto",
    *,
    max_new_tokens: int = 64,
    draft_tokens: int | None = None,
    ends: Collection[int] | None = None,
    cache: DynamicCache | None = None,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Continue one row of tokens, faster by a draft: the tokens are the model's own.

    Args:
        model: a lowered model that keeps a cache.
        input_ids: [1, time].
        draft: passes that make a draft of the model, a draft that is made already (see `twin`),
            "lookup" for the tokens that followed the same ones before, or "auto", which measures
            a window and this while it decodes, and uses what pays. Of a list of drafts it uses
            what pays as well. Passes are run at each call: for several, make the draft once.
        max_new_tokens: at most this many.
        draft_tokens: how many tokens are proposed at a time; what pays if None.
        ends: tokens after which nothing follows; the model's own if None.
        cache: one that the model has filled with the first of these tokens, which are not read
            again; `DynamicCache(config=model.config)` if it is the first call. It holds all tokens
            but the last afterwards, so that a conversation goes on with it.
        temperature: sample, at this temperature; greedy if None.
        top_k: sample from so many likeliest tokens; 0 for all.
        top_p: sample from the likeliest tokens with this share of the probability.

    Returns [1, time and new tokens], and sets `model.speculation_report`. Where the model's two
    best logits lie within rounding of each other, the choice may be another than without a draft;
    what is sampled has the model's distribution.
    Raises UsageError for more than one row, and for a model that keeps no cache.
    """
    tokens, model.speculation_report = speculate(
        model,
        input_ids,
        drafts_of(model, draft),
        max_new_tokens=max_new_tokens,
        count=draft_tokens,
        ends=own_ends(model) if ends is None else ends,
        cache=cache,
        sampling=Sampling(temperature, top_k, top_p),
    )
    return tokens


def drafts_of(model: Any, draft: Any) -> Drafts:
    """Return the drafts that `draft` names: see `generate`."""
    if isinstance(draft, list | tuple) and any(map(_is_made, draft)):
        made = [each for part in draft for each in drafts_of(model, part)]
        names = [name for name, _ in made]
        # those that have one name are told apart in the report
        return [
            (f"{name} {number}" if names.count(name) > 1 else name, module)
            for number, (name, module) in enumerate(made, 1)
        ]
    if _is_made(draft):
        return [(LOOKUP, None) if draft == LOOKUP else ("draft", draft)]
    if draft == "auto":
        return [(WINDOW, twin(model, WINDOW)), (LOOKUP, None)]
    return [(str(draft), twin(model, draft))]


def _is_made(draft: Any) -> bool:
    """Whether a draft is one already, and not passes that make one."""
    return draft == LOOKUP or hasattr(draft, "to_program")


def own_ends(model: Any) -> set[int]:
    """Return the tokens at which a model's own generation ends."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {int(i) for i in (ends if isinstance(ends, list) else [ends]) if i is not None}
