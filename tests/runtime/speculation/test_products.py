"""Products of few rows, and linear layers in int8."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reroll
from reroll.errors import UsageError
from reroll.runtime.speculation.products import FewRows, Int8Linear, few_rows, to_int8
from tests.runtime.speculation.test_speculation import IDS, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8), (1, 7, 8), (3, 4, 8)])
def test_few_rows_are_a_linear_layer(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 33).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        found = few_rows(x, linear.weight, linear.bias)
    assert found.dtype is dtype
    assert found.shape == (*shape[:-1], 33)
    torch.testing.assert_close(found, linear(x))


def test_converted_weights_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reroll.runtime.speculation.products._BLOCK", 40)
    x, weight = torch.randn(7, 8).bfloat16(), torch.randn(33, 8).bfloat16()
    expected = (x.float() @ weight.float().t()).bfloat16()
    torch.testing.assert_close(few_rows(x, weight), expected)


def test_one_row_and_many_are_left_alone() -> None:
    linear = nn.Linear(64, 96)
    for rows in (1, 17):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            expected = linear(x)
            with FewRows():
                assert torch.equal(linear(x), expected)
    # where gradients flow, it is PyTorch's own
    x = torch.randn(4, 64, requires_grad=True)
    with FewRows():
        linear(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_near(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 64).to(dtype)
    with torch.no_grad():
        # a row of zeros has no scale
        linear.weight[3] = 0
    x = torch.randn(2, 5, 256, dtype=dtype)
    expected, found = linear(x).float(), Int8Linear(linear)(x)
    assert found.dtype is dtype
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_a_shared_layer_stays_one() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    module[2].weight = module[0].weight
    to_int8(module)
    assert isinstance(module[0], Int8Linear)
    assert module[0] is module[2]


class TestTwins:
    def test_it_leaves_the_model_alone(self) -> None:
        module = model()
        before = module(IDS).logits
        made = reroll.twin(module, "int8")
        assert any(isinstance(each, Int8Linear) for each in made.modules())
        assert not any(isinstance(each, Int8Linear) for each in module.modules())
        assert torch.equal(module(IDS).logits, before)
        found = made(IDS).logits
        assert (found - before).norm() < 0.1 * before.norm()
        assert not torch.equal(found, before)

    def test_passes_come_before(self) -> None:
        made = reroll.twin(model(), "window(size=4), int8")
        assert [layer.layer_type for layer in made._assembly.layers] == ["sliding_attention"] * 4
        assert any(isinstance(each, Int8Linear) for each in made.modules())

    def test_a_draft_is_made_again_when_weights_have_changed(self) -> None:
        from reroll.evaluate.speculating import drafts_of

        module = reroll.twin(model(), "window(size=32)")
        ((_, first),) = drafts_of(module, "int8")
        assert drafts_of(module, "int8")[0][1] is first
        with torch.no_grad():
            next(module.parameters()).add_(0.0)
        assert drafts_of(module, "int8")[0][1] is not first

    def test_on_another_device_it_is_refused(self) -> None:
        module = model().program.to_module().to("meta")
        with pytest.raises(UsageError, match="a draft in int8 runs on a processor"):
            reroll.twin(module, "int8")
