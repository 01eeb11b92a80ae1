"""The kernels of single layers as ops, and whether they are chosen."""

from __future__ import annotations

import pytest
import torch

from reroll.errors import UsageError
from reroll.kernels import dispatch, layers
from reroll.kernels.confidence import confidence_reference
from reroll.kernels.depth_lora import ROWS, depth_lora_reference, tiles_by_depth
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_of_rows_at_different_depths(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # neither the weights nor the rows lie together
    x, weight = torch.randn(7, 80)[:, ::2].to(dtype), torch.randn(40, 50).to(dtype).T
    down, up = torch.randn(3, 4, 40).to(dtype), torch.randn(3, 50, 4).to(dtype)
    depth = torch.tensor([0, 0, 2, 1, 2, 2, 0])
    arguments = (x, weight, down, up, *tiles_by_depth(depth, 3, ROWS), "ieee")
    torch.library.opcheck(torch.ops.reroll_kernels.depth_lora, arguments)
    exact = dtype == torch.float32
    tolerance = tolerances.FORWARD_TRITON_FP32 if exact else tolerances.FORWARD[dtype]
    wanted = depth_lora_reference(x, weight, down, up, depth)
    assert_close(layers.depth_lora(*arguments), wanted, tolerance, "y")


def test_how_sure_a_head_is() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 80)[:, ::2], torch.randn(300, 40)
    torch.library.opcheck(torch.ops.reroll_kernels.confidence, (hidden, weight, "ieee"))
    found = layers.confidence(hidden, weight, "ieee")
    for one, wanted in zip(found, confidence_reference(hidden, weight), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=2e-5)


def test_what_has_no_tiles_is_left_to_pytorch_or_refused() -> None:
    x = torch.zeros(1, 40)
    assert not dispatch.runs("depth_lora", x, 8)
    with dispatch.use("triton"):
        assert dispatch.runs("depth_lora", x, 8)
        assert dispatch.runs("confidence", x)
        with pytest.raises(UsageError, match=r"no tiles for torch\.float32, rank 65"):
            dispatch.runs("depth_lora", x, 65)
        with pytest.raises(UsageError, match=r"no tiles for torch\.float64"):
            dispatch.runs("confidence", x.double())
    with dispatch.use("eager"):
        assert not dispatch.runs("confidence", x)
    with pytest.raises(UsageError, match="no tiles"):
        layers.confidence(x.double(), x.double(), "ieee")
