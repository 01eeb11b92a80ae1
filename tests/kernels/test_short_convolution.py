"""Short convolutions in Triton's interpreter, against the op behind the inputs of its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reroll.kernels import configurations
from reroll.kernels.short_convolution import forward, step
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.ops import short_convolution
from tests.conformance.mixer_suite import assert_close
from tests.kernels.inputs import poisoned

# several blocks of channels and of tokens, the last ones in part
CHANNELS, TILES = 37, {"BC": 16, "BM": 8}


def draw(
    time: int, size: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Inputs whose channels lie together, filter, bias and state."""
    seed = torch.Generator().manual_seed(time + 7 * size)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed).to(dtype)

    x = poisoned(random(2, time, CHANNELS)).transpose(1, 2)
    weight = poisoned(random(CHANNELS, size))
    return x, weight, random(CHANNELS) if bias else None, random(2, CHANNELS, size - 1)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor) -> tuple[Tensor, ...]:
    """In fp32, and the last inputs as they are."""
    whole, time = torch.cat((start, x), -1), x.shape[-1]
    wide = short_convolution(whole.float(), weight.float(), None if bias is None else bias.float())
    return wide[..., wide.shape[-1] - time :], whole[..., time:]


def agree(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, ...]) -> None:
    dtype = found[0].dtype
    exact = dtype == torch.float32
    tolerance = tolerances.FORWARD_TRITON_FP32 if exact else tolerances.FORWARD[dtype]
    assert_close(found[0], wanted[0], tolerance, "y")
    assert found[1].dtype == dtype
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 2, 8, 19])
@pytest.mark.parametrize("begins", [True, False])
def test_it_is_the_op_at_any_length(time: int, size: int, begins: bool) -> None:
    x, weight, bias, start = draw(time, size, bias=begins)
    wanted = reference(x, weight, bias, torch.zeros_like(start) if begins else start)
    agree(forward(x, weight, bias, None if begins else start, TILES), wanted)


def test_a_prompt_with_its_channels_apart() -> None:
    x, weight, bias, start = draw(19, 4)
    x = poisoned(x)
    agree(forward(x, weight, bias, start, TILES), reference(x, weight, bias, start))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_narrow_numbers(dtype: torch.dtype) -> None:
    x, weight, bias, start = draw(19, 4, dtype)
    wanted = reference(x, weight, bias, start)
    agree(forward(x, weight, bias, start, TILES), wanted)
    state = start.clone()
    y = step(x[..., 0], weight, bias, state, tiles={"BC": 16})
    agree((y[..., None], state), reference(x[..., :1], weight, bias, start))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_go_on_from_a_prompt(size: int, bias: bool) -> None:
    x, weight, added, start = draw(9, size, bias=bias)
    wanted, last = reference(x, weight, added, start)
    begun, state = forward(x[..., :4], weight, added, start, TILES)
    outs = [step(x[..., t], weight, added, state, tiles={"BC": 16}) for t in range(4, 9)]
    agree((torch.cat([begun, torch.stack(outs, -1)], -1), state), (wanted, last))


def test_steps_take_the_slots_of_their_rows() -> None:
    x, weight, bias, start = draw(1, 4)
    pool = torch.full((5, CHANNELS, 3), torch.nan)
    pool[[3, 1]] = start
    y = step(x[..., 0], weight, bias, pool, torch.tensor([3, 1]), tiles={"BC": 16})
    wanted, last = reference(x, weight, bias, start)
    agree((y[..., None], pool[[3, 1]]), (wanted, last))
    assert pool[[0, 2, 4]].isnan().all()


def test_a_row_without_a_slot_changes_nothing() -> None:
    x, weight, bias, start = draw(1, 4)
    pool = start.clone()
    step(x[..., 0], weight, bias, pool, torch.tensor([-1, 0]), tiles={"BC": 16})
    assert torch.equal(pool[1], start[1])
    assert torch.equal(pool[0], reference(x[1:], weight, bias, start[:1])[1][0])


@pytest.mark.parametrize("target", configurations.TARGETS)
def test_there_are_tiles_for_every_gpu(target: str) -> None:
    for size in (1, 3, 4, 9):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = configurations.convolution_tiles(target, dtype, size)
            assert set(found) == {"short_convolution_part", "short_convolution_step"}
    assert configurations.convolution_tiles(target, torch.float32, 17) is None
    assert configurations.convolution_tiles(target, torch.float64, 4) is None
