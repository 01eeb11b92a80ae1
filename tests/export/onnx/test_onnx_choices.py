"""What a graph chooses among equal scores, and the module that it is compared with."""

from __future__ import annotations

from contextlib import nullcontext

import onnx
import pytest
import torch
from torch import Tensor, nn

import reroll
from reroll.errors import ExportError
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.check import check_graph
from reroll.export.onnx.emit.choices import Choices, as_good
from reroll.export.onnx.graph import nodes_of
from tests.exported import export


class Sparse(nn.Module):
    """The sum of the rows whose scores are the largest; many scores are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 1)

    def forward(self, rows: Tensor) -> Tensor:
        scores = (self.scores(rows)[..., 0] - 1).relu()
        # of equal ones, torch and ONNX take others
        chosen = scores.topk(5, dim=-1).indices
        return rows.gather(1, chosen[..., None].expand(-1, -1, 4)).sum(1)


@pytest.fixture(scope="module")
def sparse() -> reroll.Program:
    torch.manual_seed(0)
    return export(Sparse(), torch.randn(3, 40, 4))


def test_choices_among_equal_scores_are_followed(sparse, tmp_path):
    Onnx(graphs=("unrolled",)).write(sparse, tmp_path)
    path = tmp_path / "unrolled.onnx"
    before = path.read_bytes()
    assert check_graph(path, sparse, sparse.to_module())["relative_rms_error"] < 1e-6
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.glob("*.onnx")] == ["unrolled.onnx"]


def test_without_that_they_part(sparse, tmp_path, monkeypatch):
    monkeypatch.setattr(Choices, "taken", lambda self, outputs: nullcontext())
    with pytest.raises(ExportError, match="differs from the torch module"):
        Onnx(graphs=("unrolled",), check=True).write(sparse, tmp_path)


def test_other_choices_are_not(sparse, tmp_path):
    """A graph that takes the smallest is wrong."""
    Onnx(graphs=("unrolled",)).write(sparse, tmp_path)
    path = tmp_path / "unrolled.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (top,) = (node for node in nodes_of(model.graph) if node.op_type == "TopK")
    next(a for a in top.attribute if a.name == "largest").i = 0
    onnx.save(model, str(path))
    with pytest.raises(ExportError, match="differs from the torch module"):
        check_graph(path, sparse, sparse.to_module())


LOW = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("scores", "chosen", "good"),
    [
        ([0.5, 0.0, 0.0, -1.0], [0, 2], True),
        ([0.5, 1e-7, 0.0, -1.0], [2, 0], True),
        ([0.5, 1e-2, 0.0, -1.0], [0, 2], False),
        ([0.5, LOW, LOW, LOW], [0, 3], True),
        ([0.5, LOW, LOW, LOW], [1, 3], False),
        ([0.5, -torch.inf, -torch.inf, -torch.inf], [0, 3], True),
        ([0.5, 0.2, LOW, -torch.inf], [0, 2], False),
    ],
)
def test_a_choice_is_as_good_within_rounding(scores: list[float], chosen: list[int], good: bool):
    values = torch.tensor([scores])
    best = values.topk(2).values
    assert as_good(values[:, chosen], best, values, -1, 1e-4) is good
