"""Drafts made by passes, and decoding with them: see `reroll.runtime.speculation`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import StopStringCriteria

import reroll
from reroll.errors import UsageError
from reroll.rewrite.ir.drafts import check_draft
from reroll.rewrite.ir.program import Program
from reroll.runtime.speculation.decode import Ends, speculate
from reroll.runtime.speculation.named import is_named
from reroll.runtime.speculation.products import to_int8
from reroll.runtime.speculation.reading import Reading
from reroll.runtime.speculation.sampling import Sampling
from reroll.runtime.speculation.twins import twin as lower_twin
from reroll.runtime.state.prefixes import PrefixCache

if TYPE_CHECKING:
    from transformers import DynamicCache

    from reroll.rewrite.pipeline.pipeline import Pipeline

# names of drafts with their models; `lookup` and `prompts` need none
Drafts: TypeAlias = list[tuple[str, Any]]
LOOKUP = "lookup"
# what a model drafts with that has an exit with an adapter
EXIT = "exit"
# the name of the draft that was saved with a model
SAVED = "draft"
# what "auto" tries beside `lookup`; in int8 where products of int8 are fast
WINDOW = "window(size=256, sinks=4)"
_INT8 = re.compile(r"(^|,)\s*int8\s*$")
# the drafts that were made of a model's present weights, by their passes
_made: WeakKeyDictionary[Any, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


def twin(model: Any, passes: Pipeline | Program, **options: Any) -> Any:
    """Rewrite a lowered model into another that shares its weights in memory.

    `passes` and `options` are those of `run_passes`, which measures nothing here; or `passes` is
    what `Program.twin` has made of the model's Program. The twin adds only the weights that passes
    have added or changed. With `int8` behind the passes, or alone, its linear layers are copied to
    int8 (on a processor). It can draft for the model:

        model = program.to_module()
        draft = reroll.twin(model, "window(size=256, sinks=4), int8")
        model.generate(**inputs, assistant_model=draft)

    Raises UsageError for a model that is not lowered, a Program that was not made from its, or int8
    on another device, and what `run_passes` raises.
    """
    if not hasattr(model, "to_program"):
        raise UsageError(
            "only a lowered model has a twin",
            where=type(model).__name__,
            hint="capture it first: reroll.capture(model).to_module()",
        )
    if isinstance(passes, Program):
        check_draft(model.program, passes)
        return lower_twin(model, model.program, passes)
    int8 = isinstance(passes, str) and _INT8.search(passes) is not None
    if int8:
        passes = _INT8.sub("", str(passes))
        if model.device.type != "cpu":
            raise UsageError(
                f"a draft in int8 runs on a processor, and the model is on {model.device}",
                where="int8",
                hint="leave int8 out",
            )
    present = model.to_program()
    program = present
    if not int8 or str(passes).strip():
        program = reroll.run_passes(present, passes, **{"measure": "off"} | options)
    made = lower_twin(model, present, program)
    return to_int8(made) if int8 else made


def generate(
    model: Any,
    input_ids: Tensor,
    draft: Any = "auto",
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    draft_tokens: int | None = None,
    exact: bool = False,
    ends: Collection[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    cache: DynamicCache | PrefixCache | None = None,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    branches: int = 1,
) -> Tensor:
    """Continue rows of tokens, faster by a draft: the tokens are the model's own.

    Args:
        model: a lowered model that keeps a cache.
        input_ids: [rows, time].
        draft: passes that make a draft of the model, a draft that is made already (see `twin` and
            `Program.twin`), "draft" for the one that was saved with the model, "lookup" for the
            tokens that followed the same ones before, "clasp(skip=8)", "static-skip(skip=8)" or
            "del" for the model itself with fewer layers, "prompts" for its prompt tokens (see
            `reroll.runtime.speculation.named`), "exit" for its exit for drafts, or "auto", which
            measures the saved draft, or else a window, and "lookup" while it decodes, and uses what
            pays. Of a list of drafts it uses what pays as well. A draft that passes have made is
            kept for later calls, until the model's weights change.
        attention_mask: [rows, time], 0 at padding on the left.
        max_new_tokens: at most this many.
        draft_tokens: how many tokens are proposed at a time; what pays if None.
        exact: where the two best logits of several tokens lie within rounding of each other, let a
            step of one token choose.
        ends: tokens after which nothing follows; the model's own if None.
        stop_strings: texts after which nothing follows; they need the `tokenizer`.
        tokenizer: of the model, for `stop_strings`.
        cache: a `reroll.PrefixCache(model)`, with which later calls read only what they do not have
            in common with earlier ones. Or a cache of transformers that the model has filled with
            the first of these tokens; it holds all tokens but the last afterwards. For one row.
        temperature: sample, at this temperature; greedy if None.
        top_k: sample from so many likeliest tokens; 0 for all.
        top_p: sample from the likeliest tokens with this share of the probability.
        branches: so many tokens are proposed for one place, as a tree that the model verifies in
            one step: a draft's best at the first places, or so many matches of "lookup". For one
            row.

    Returns [rows, time and new tokens], with the model's padding token behind rows that ended, and
    sets `model.speculation_report`, which lists the near ties: where the model's two best logits
    lie within rounding of each other, the choice may be another than without a draft, unless it is
    `exact`. What is sampled has the model's distribution.
    Raises UsageError for padding on the right, several rows with a cache, stop strings without a
    tokenizer, for a model that keeps no cache, and for branches that it would mix.
    """
    rows = _rows(input_ids, attention_mask)
    if cache is not None and len(rows) > 1:
        raise UsageError(
            f"a cache goes on with one row of tokens, and there are {len(rows)}",
            where="cache",
            hint="leave the cache out, or give each row alone",
        )
    prefix, cache = (cache, None) if isinstance(cache, PrefixCache) else (None, cache)
    if prefix is not None:
        cache = _read_prefix(model, rows[0], prefix)
    own, criteria = own_ends(model), stop_criteria(stop_strings, tokenizer)
    scores: Any = None
    also = None if criteria is None else lambda row: bool(criteria(row[None], scores))
    tokens, model.speculation_report = speculate(
        model,
        rows,
        drafts_of(model, draft),
        max_new_tokens=max_new_tokens,
        count=draft_tokens,
        ends=Ends(own if ends is None else ends, also),
        cache=cache,
        sampling=Sampling(temperature, top_k, top_p),
        exact=exact,
        branches=branches,
    )
    if prefix is not None:
        prefix.mark(tokens[0][:-1])
    pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return joined(input_ids, rows, tokens, min(own, default=0) if pad is None else int(pad))


def joined(input_ids: Tensor, rows: Sequence[Tensor], tokens: Sequence[Tensor], pad: int) -> Tensor:
    """Put what was added to each row behind `input_ids`, and padding behind what ended earlier."""
    added = [all_[len(row) :] for row, all_ in zip(rows, tokens, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(added, batch_first=True, padding_value=pad)
    return torch.cat([input_ids, padded], 1)


def stop_criteria(strings: Sequence[str], tokenizer: Any) -> StopStringCriteria | None:
    """Return what says which rows end with one of some texts, as transformers does."""
    if not strings:
        return None
    if tokenizer is None:
        raise UsageError(
            "texts that end a row need a tokenizer",
            where="stop_strings",
            hint="give tokenizer=AutoTokenizer.from_pretrained(MODEL)",
        )
    return StopStringCriteria(tokenizer, list(strings))


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
    if isinstance(draft, Program):
        return [("draft", twin(model, draft))]
    if hasattr(draft, "to_program"):
        return [("draft", draft)]
    if draft == EXIT:
        return [(EXIT, _kept_twin(model, "cut_at_exit"))]
    if is_named(draft):
        return [(draft, None)]
    saved = getattr(getattr(model, "program", None), "draft", None)
    if draft == SAVED and saved is None:
        raise UsageError(
            "no draft was saved with the model",
            where=type(model).__name__,
            hint="reroll convert MODEL OUT --draft PASSES saves one; or name passes here",
        )
    if saved is not None and draft in (SAVED, "auto"):
        found: Drafts = [(SAVED, _kept_twin(model, SAVED))]
        return [*found, (LOOKUP, None)] if draft == "auto" else found
    if draft == "auto":
        window = f"{WINDOW}, int8" if model.device.type == "cpu" else WINDOW
        return [(window, _kept_twin(model, window)), (LOOKUP, None)]
    return [(str(draft), _kept_twin(model, draft))]


def _kept_twin(model: Any, passes: Any) -> Any:
    """Return the twin of a model's present weights, made at the first call; SAVED for its draft."""
    if not isinstance(passes, str) or not hasattr(model, "parameters"):
        return twin(model, passes)
    weights = tuple((p.data_ptr(), p._version) for p in model.parameters())
    known, made = _made.get(model, (None, {}))
    if known != weights:
        made = {}
        _made[model] = weights, made
    if passes not in made:
        made[passes] = twin(model, model.program.draft if passes == SAVED else passes)
    return made[passes]


def _read_prefix(model: Any, row: Tensor, prefix: PrefixCache) -> DynamicCache:
    """Let a cache read all tokens but the last that it does not have, and return it."""
    past = prefix.go_back(row)
    if past < len(row) - 1:
        with torch.no_grad():
            reading = Reading(model, prefix.cache, lengths=torch.tensor([past]))
            reading.read(row[None, past:-1], keep=1)
        prefix.mark(row[:-1])
    return prefix.cache


def _rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Return the rows without padding, which is on the left."""
    if attention_mask is None:
        return list(input_ids)
    mask = attention_mask.bool()
    if mask.shape != input_ids.shape or not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise UsageError(
            "padding is on the left of each row, and of the shape of the tokens",
            where="attention_mask",
            hint='pad with tokenizer.padding_side = "left"',
        )
    return [row[seen] for row, seen in zip(input_ids, mask, strict=True)]


def _is_made(draft: Any) -> bool:
    """Whether a draft is one already, or a name of one, and not passes that make one."""
    if isinstance(draft, str):
        return draft in (EXIT, SAVED) or is_named(draft)
    return isinstance(draft, Program) or hasattr(draft, "to_program")


def own_ends(model: Any) -> set[int]:
    """Return the tokens at which a model's own generation ends."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {int(i) for i in (ends if isinstance(ends, list) else [ends]) if i is not None}
