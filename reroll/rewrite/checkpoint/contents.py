"""What a checkpoint holds beside what its configuration says: heads of their own, unread tensors.

transformers decides by the checkpoint: two weights that are stored with different values are not
tied, whatever the configuration says, and a tensor that no parameter takes is left out with a
warning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from reroll.rewrite.ir.weights.expressions import TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# how many names a remark lists
_LISTED = 4
# buffers that older versions of transformers stored, and that are computed today
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class Checkpoint(TensorSource, Protocol):
    """The tensors of a checkpoint under the names of a model, and those that it has no name for."""

    @property
    def held(self) -> Collection[str]:
        """The model's tensors that are stored under their own names, not under a tied one."""
        ...

    @property
    def unread(self) -> Collection[str]:
        """Names in the file of the tensors that fill nothing of the model."""
        ...

    @property
    def beyond(self) -> Collection[str]:
        """Those among them that belong to layers beyond the number in the configuration."""
        ...


def fit_to_checkpoint(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Untie the parameters of `model` that are stored apart; returns remarks on the checkpoint.

    The remarks say what was untied, which layers are left out, and which tensors nothing reads. Two
    tied weights that are both stored are read, to compare them.
    """
    remarks = [_untie(model, *pair) for pair in _stored_apart(model, checkpoint)]
    ignored = re.compile("|".join((*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))))
    beyond = list(checkpoint.beyond)
    others = [n for n in checkpoint.unread if n not in beyond and not ignored.search(n)]
    if beyond:
        remarks.append(
            "the checkpoint has more layers than the configuration says, which are left out: "
            + _list(beyond)
        )
    if others:
        remarks.append("nothing reads these tensors of the checkpoint: " + _list(others))
    return tuple(remarks)


def _stored_apart(model: PreTrainedModel, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """(name, the name that it would be tied to) of weights that are stored with other values."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    both = [(n, t) for n, t in ties.items() if n in checkpoint.held and t in checkpoint.held]
    return [(n, t) for n, t in both if not _equal(checkpoint.load(n), checkpoint.load(t))]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b.to(a.dtype))


def _untie(model: PreTrainedModel, name: str, tied_to: str) -> str:
    owner, _, leaf = name.rpartition(".")
    old = model.get_parameter(name)
    new = nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
    setattr(model.get_submodule(owner), leaf, new)
    model.all_tied_weights_keys.pop(name)
    return (
        f"{name} is not tied to {tied_to}, though the configuration says so: the checkpoint holds "
        "another tensor"
    )


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
