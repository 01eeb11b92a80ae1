"""Mixtures of experts: each group of rows by its own matrix, and a model that routes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reroll
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.check import STEPS
from reroll.export.onnx.emit.session import Session
from reroll.export.onnx.graph import nodes_of
from reroll.rewrite.ir.program import Program
from tests.captured import SPECIAL, TEXT
from tests.export.onnx.prompted import check_pieces
from tests.exported import export

pytestmark = pytest.mark.usefixtures("captured_once")

EXPERTS = 4


class Grouped(nn.Module):
    """Rows by the matrix of their expert, stored as projections are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 5, 3))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        mm = torch.ops.transformers.grouped_mm_fallback
        return mm(rows, self.weight.transpose(-2, -1), ends)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> tuple[nn.Module, Session]:
    torch.manual_seed(0)
    module, directory = Grouped(), tmp_path_factory.mktemp("grouped")
    rows, ends = torch.randn(6, 3), torch.tensor([1, 2, 3, 6])
    program = export(module, rows, ends, dims={"rows": ("b", 3), "ends": (EXPERTS,)})
    Onnx(graphs=("unrolled",)).write(program, directory)
    model = onnx.load(str(directory / "unrolled.onnx"), load_external_data=False)
    # the matrices lie in the file as they are multiplied
    assert "Transpose" not in {n.op_type for n in nodes_of(model.graph)}
    return module, Session(directory / "unrolled.onnx")


@settings(max_examples=25)
@given(st.lists(st.integers(0, 4), min_size=EXPERTS, max_size=EXPERTS), st.integers(0, 2))
def test_groups_of_any_size(grouped, sizes, rest):
    """Experts without rows, and rows without an expert, which are zero."""
    module, session = grouped
    ends = torch.tensor(sizes).cumsum(0)
    rows = torch.randn(sum(sizes) + rest, 3, generator=torch.Generator().manual_seed(1))
    actual = session.run({"rows": rows, "ends": ends})["out0"]
    expected = module(rows, ends)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Halves(nn.Module):
    """The same in bfloat16, for which PyTorch has an operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 8, 16, dtype=torch.bfloat16))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        return nn.functional.grouped_mm(rows.bfloat16(), self.weight.transpose(-2, -1), offs=ends)


def test_bfloat16_experts_are_computed_in_fp32(tmp_path: Path):
    torch.manual_seed(0)
    module = Halves()
    rows, ends = torch.randn(6, 16), torch.tensor([1, 2, 2, 6], dtype=torch.int32)
    program = export(module, rows, ends, dims={"rows": ("b", 16), "ends": (EXPERTS,)})
    Onnx(graphs=("unrolled",)).write(program, tmp_path)
    actual = Session(tmp_path / "unrolled.onnx").run({"rows": rows, "ends": ends})["out0"]
    parts = zip(rows.tensor_split(ends[:-1].long()), module.weight.float(), strict=True)
    expected = torch.cat([part @ matrix.T for part, matrix in parts])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@cache
def mixtral() -> Program:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **TEXT | {"num_hidden_layers": 2},
        **SPECIAL,
        intermediate_size=24,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    return reroll.capture(model)


def test_a_model_routes_as_the_module_does(tmp_path: Path):
    """The prompt and every token after it, by a Loop over trips with a Loop over experts in it."""
    assert mixtral().loops
    found = Onnx(check=True).write(mixtral(), tmp_path)
    for kind in ("loop", "unrolled"):
        assert found["graphs"][kind]["check"]["relative_rms_error"] < 1e-5
    check_pieces(mixtral(), tmp_path / "loop.onnx", [7, 1, 16])


def test_a_token_reads_its_own_experts_alone(tmp_path: Path):
    """Nothing but the look-up of one matrix reads the stack of all of them."""
    Onnx(graphs=("loop",)).write(mixtral(), tmp_path)
    model = onnx.load(str(tmp_path / "loop.onnx"), load_external_data=False)
    stacks = [t.name for t in model.graph.initializer if ".experts." in t.name]
    assert len(stacks) == 2
    readers = [n for n in nodes_of(model.graph) if set(n.input) & set(stacks)]
    assert [n.op_type for n in readers] == ["GatherND", "GatherND"]


def test_half_precision_routes_alike(tmp_path: Path):
    found = Onnx(graphs=("loop",), precision="fp16", check=True).write(mixtral(), tmp_path)
    assert found["graphs"]["loop"]["check"]["decode_steps"] == STEPS
