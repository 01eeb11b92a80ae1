"""The original's own `generate`, for lowered models whose original does not use the common one.

transformers gives some models a class of their own between the model and the common generation: for
speech, it cuts long recordings, sets language and task, and makes timestamps. The lowered model
takes that class of transformers as a base, before the common one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin


def own_generation(architecture: str) -> type | None:
    """Return the class with which a model of transformers generates; None for the common one."""
    import transformers

    original = getattr(transformers, architecture, None)
    if not isinstance(original, type):
        return None
    return next(
        (
            base
            for base in original.__mro__
            if issubclass(base, GenerationMixin)
            and base is not GenerationMixin
            and not issubclass(base, PreTrainedModel)
        ),
        None,
    )


def take_own_generation(model: Any) -> None:
    """Let a lowered model generate as its original does, by the class of transformers for that.

    What such a class, and pipelines, do also depends on the type of the model, so the configuration
    gives the original's while it is in memory. In its file is the lowered model's.
    """
    architecture = model.program.origin.architecture
    own = own_generation(architecture)
    if own is None:
        return
    if not isinstance(model, own):
        made: Any = _with_base
        model.__class__ = made(type(model), architecture)
    model.config.model_type = model.config.original_model_type


@cache
def _with_base(kind: Any, architecture: str) -> Any:
    """Return a lowered model's class with the generation of an original as its first base."""
    own = own_generation(architecture)
    assert own is not None

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # the class is no member of a module, and is made anew
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _empty, (kind, architecture), *state

    members = {
        "__reduce_ex__": __reduce_ex__,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    # pipelines know models by the name of their class
    made: Any = type(kind.__name__, (own, kind), members)
    return made


def _empty(kind: Any, architecture: str) -> Any:
    """Make a model without attributes, to which a pickle or copy gives them."""
    made = _with_base(kind, architecture)
    return made.__new__(made)
