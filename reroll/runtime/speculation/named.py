"""Drafts by name: what needs no model beside the one that verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from reroll.errors import UsageError
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.pipeline_parser import parse_calls
from reroll.runtime.speculation.drafts import Draft, Lookup
from reroll.runtime.speculation.leaving import Del, DelOptions
from reroll.runtime.speculation.prompts import PROMPTS, Prompting
from reroll.runtime.speculation.reading import Reading
from reroll.runtime.speculation.skip_sets import (
    Clasp,
    ClaspOptions,
    StaticSkip,
    StaticSkipOptions,
)


class LookupOptions(Declared):
    """Options of `lookup`: none."""

    category = "draft"
    name = "lookup"


def _lookup(name: str, model: Reading, rows: Sequence[Tensor], options: Any) -> Draft:
    del name, model, rows, options
    return Lookup()


class PromptsOptions(Declared):
    """Options of `prompts`: none."""

    category = "draft"
    name = PROMPTS


def _prompts(name: str, model: Reading, rows: Sequence[Tensor], options: Any) -> Draft:
    del rows, options
    return Prompting(name, model)


# for each name, its options, and what makes the draft
NAMED: dict[str, tuple[type[Declared], Callable[..., Draft]]] = {
    "lookup": (LookupOptions, _lookup),
    "static-skip": (StaticSkipOptions, StaticSkip),
    "clasp": (ClaspOptions, Clasp),
    "del": (DelOptions, Del),
    PROMPTS: (PromptsOptions, _prompts),
}


def is_named(text: Any) -> bool:
    """Whether a text is a draft of this list, with options or without."""
    return isinstance(text, str) and text.partition("(")[0].strip() in NAMED


def named(text: str, model: Reading, rows: Sequence[Tensor]) -> Draft:
    """Make the draft of a name such as `clasp(skip=8)` for a model that has read rows [time].

    Raises UsageError for wrong options, and for models and batches that the draft is not for.
    """
    calls = parse_calls(text)
    if len(calls) != 1:
        raise UsageError(f"{text!r} is more than one draft", hint="give a list of them")
    (call,) = calls
    options, make = NAMED[call.name]
    return make(text, model, rows, options.make(call.options))
