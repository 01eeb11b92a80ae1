"""Fit a model to its checkpoint: untie weights stored separately, and report unread tensors.

transformers decides by the checkpoint. Two weights that are stored with different values are not
tied, whatever the configuration says. A tensor for which there is no parameter is left out with a
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
# buffers that older versions of transformers stored, and that are now computed
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


class Checkpoint(TensorSource, Protocol):
    """Source of a checkpoint's tensors under a model's names, and the names of unread ones."""

    @property
    def stored(self) -> Collection[str]:
        """Names of the tensors that are stored under their own names, not under a tied one."""
        ...

    @property
    def unread(self) -> Collection[str]:
        """Names in the file of the tensors that no parameter or buffer of the model takes."""
        ...

    @property
    def beyond(self) -> Collection[str]:
        """Names among `unread` that belong to layers beyond the number in the configuration."""
        ...


def fit_to_checkpoint(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Untie parameters of `model` that are stored with different values; return remarks.

    The remarks name the untied weights, the layers left out, and the unread tensors. If two tied
    weights are both stored, both are read and compared.
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
    """Return (name, tied name) of tied weights that are stored with different values."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    both = [(n, t) for n, t in ties.items() if n in checkpoint.stored and t in checkpoint.stored]
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
