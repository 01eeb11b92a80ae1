"""The loss of a converted language model is that of its original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel

import reroll
from reroll.errors import UsageError
from tests import tiny
from tests.tiny import types as tiny_types


class AlignedLlama(LlamaForCausalLM):
    """Compares logits and labels position by position, on a part of each row if it is asked to."""

    skipped = 0
    weight = 1.0

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if labels is not None:
            at = slice(self.skipped, None)
            loss = F.cross_entropy(out.logits[:, at].flatten(0, 1), labels[:, at].flatten())
            out.loss = loss if self.weight == 1.0 else self.weight * loss
        return out


def loss(model: Any, ids: torch.Tensor) -> float:
    labels = ids.masked_fill(ids % 5 == 0, -100)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize(
    ("name", "door", "kind"),
    [
        ("llama", "object", "shifted"),
        ("mbart", "directory", "aligned"),
        ("megatron-bert", "object", "shifted"),
    ],
)
def test_labels_are_shifted_where_the_original_shifts_them(
    name: str, door: str, kind: str, tmp_path: Path
) -> None:
    model: Any = tiny_types.build(name, kind="causal")
    model.save_pretrained(tmp_path / "original")
    program = reroll.capture(model if door == "object" else str(tmp_path / "original"))
    assert program.origin.loss == kind
    program.save(str(tmp_path / "converted"))
    opened = reroll.load(str(tmp_path / "converted")).to_module()
    ids = torch.randint(5, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    assert loss(opened, ids) == pytest.approx(loss(model, ids), rel=1e-6)


@pytest.mark.parametrize("change", [{"skipped": 2}, {"weight": 0.5}])
def test_a_loss_of_its_own_is_refused_and_another_may_be_set(change: dict[str, float]) -> None:
    model = aligned(**change)
    module: Any = reroll.capture(model).to_module()
    ids = torch.arange(8, 40).reshape(2, 16)
    with pytest.raises(UsageError, match="the loss that AlignedLlama computes from labels"):
        loss(module, ids)
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=ids).logits, model(input_ids=ids).logits)
    module.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7.0
    assert loss(module, ids) == 7.0


def test_a_loss_without_a_loss_function_is_recognised() -> None:
    model = aligned()
    module = reroll.capture(model).to_module()
    ids = torch.arange(8, 40).reshape(2, 16)
    assert loss(module, ids) == pytest.approx(loss(model, ids), rel=1e-6)


def aligned(**attributes: float) -> PreTrainedModel:
    """A tiny Llama with a loss of its own."""
    model = AlignedLlama(tiny.llama(layers=2).config).eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model
