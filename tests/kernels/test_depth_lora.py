"""Linear layers with a low-rank term for each row's depth, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from reroll.kernels.depth_lora import depth_lora, depth_lora_reference, tiles_by_depth
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import poisoned

TILES = {"BM": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_has_the_term_of_its_depth(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight, down, up = torch.randn(50, 72), torch.randn(5, 6, 72), torch.randn(5, 50, 6)
    x = poisoned(torch.randn(rows, 72).to(dtype))
    weight, down, up = (t.to(dtype) for t in (weight, down, up))
    depth = torch.randint(0, 5, (rows,))
    order, table = tiles_by_depth(depth, 5, TILES["BM"])
    found = depth_lora(x, weight, down, up, order, table, TILES)
    exact = dtype == torch.float32
    tolerance = tolerances.FORWARD_TRITON_FP32 if exact else tolerances.FORWARD[dtype]
    assert_close(found, depth_lora_reference(x, weight, down, up, depth), tolerance, "y")


def test_tiles_hold_every_row_once() -> None:
    depth = torch.tensor([2, 0, 2, -1, 2, 0, 2, 2])
    order, tiles = tiles_by_depth(depth, 4, 2)
    assert len(tiles) == 4 + 4
    seen = []
    for at, first, count in tiles.tolist():
        if at >= 0:
            rows = order[first : first + count].tolist()
            assert rows
            assert all(depth[row] == at for row in rows)
            seen += rows
    assert sorted(seen) == [0, 1, 2, 4, 5, 6, 7]
