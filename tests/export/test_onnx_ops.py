"""Ops whose use in models is rare, each alone against its reference."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from reroll.export.onnx import Onnx
from reroll.export.onnx.session import Session
from reroll.rewrite import ops
from reroll.rewrite.passes import tolerances
from tests.exported import export

TIME = 9


class Blocks(nn.Module):
    """Attention whose tokens also see their own block, such as an image."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, blocks: Tensor, padding: Tensor) -> Tensor:
        return ops.attention(q, q, q, 0.3, blocks=blocks, padding=padding, **self.options)


def computed(module: nn.Module, directory: Path, *values: Tensor) -> tuple[Tensor, Tensor]:
    """What the exported graph and the module make of the same inputs."""
    names = ("q", "blocks", "padding")
    dims = {"q": ("b", 2, "s", 8), "blocks": ("b", "s"), "padding": ("b", "s")}
    program = export(module, *values, dims=dims)
    Onnx(graphs=("unrolled",)).write(program, directory)
    onnx.checker.check_model(str(directory / "unrolled.onnx"), full_check=True)
    session = Session(directory / "unrolled.onnx")
    found = session.run(dict(zip(names, values, strict=True)))
    return found["out0"], module(*values)


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 3}])
def test_tokens_see_their_own_block(options, tmp_path):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 2, TIME, 8, generator=generator)
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 1, 1], [-1] * 4 + [3] * 4 + [-1]])
    padding = torch.ones(2, TIME, dtype=torch.long)
    padding[1, :2] = 0
    actual, expected = computed(Blocks(**options), tmp_path, q, blocks, padding)
    shown = padding.bool()
    assert tolerances.relative_rms(actual[shown], expected[shown]) < 1e-6
    without = ops.attention(q, q, q, 0.3, padding=padding, **options)
    assert tolerances.relative_rms(actual[shown], without[shown]) > 0.1
