"""Ops whose use in models is rare, each alone against its reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from reroll.errors import ExportError
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.session import Session
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.lowerings import op_name
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


# ---- ATen operators, each beside torch: x [b, s, 6], y [6], n integers and m booleans [b, s]

F = torch.nn.functional
FLOATS: dict[str, Callable[..., Tensor]] = {
    "aten::expm1.default": lambda x, y, n, m: torch.expm1(x * 1e-3) * 1e3,
    "aten::log1p.default": lambda x, y, n, m: torch.log1p(x.abs() * 1e-3) * 1e3,
    "aten::square.default": lambda x, y, n, m: torch.square(x),
    "aten::exp2.default": lambda x, y, n, m: torch.exp2(x),
    "aten::log2.default": lambda x, y, n, m: torch.log2(x.abs()),
    "aten::erfinv.default": lambda x, y, n, m: torch.erfinv((x / 3).clamp(-0.999, 0.999)),
    "aten::round.default": lambda x, y, n, m: torch.round(x * 2),
    "aten::ceil.default": lambda x, y, n, m: torch.ceil(x),
    "aten::trunc.default": lambda x, y, n, m: torch.trunc(x * 2),
    "aten::sign.default": lambda x, y, n, m: torch.sign(x),
    "aten::rsub.Scalar": lambda x, y, n, m: torch.rsub(x, 2.5, alpha=2),
    "aten::rsub.Tensor": lambda x, y, n, m: torch.rsub(x, y),
    "aten::remainder.Scalar": lambda x, y, n, m: torch.remainder(x, -0.75),
    "aten::fmod.Scalar": lambda x, y, n, m: torch.fmod(x, 0.75),
    "aten::addcmul.default": lambda x, y, n, m: torch.addcmul(x, x, y, value=0.5),
    "aten::addcdiv.default": lambda x, y, n, m: torch.addcdiv(x, x, y.abs() + 1, value=0.5),
    "aten::lerp.Scalar": lambda x, y, n, m: torch.lerp(x, y.expand_as(x), 0.3),
    "aten::elu.default": lambda x, y, n, m: F.elu(x, alpha=0.7),
    "aten::leaky_relu.default": lambda x, y, n, m: F.leaky_relu(x, 0.2),
    "aten::hardtanh.default": lambda x, y, n, m: F.hardtanh(x, -0.5, 0.25),
    "aten::relu6.default": lambda x, y, n, m: F.relu6(x * 5),
    "aten::hardsigmoid.default": lambda x, y, n, m: F.hardsigmoid(x * 2),
    "aten::hardswish.default": lambda x, y, n, m: F.hardswish(x * 2),
    "aten::mish.default": lambda x, y, n, m: F.mish(x),
    "aten::clamp.Tensor": lambda x, y, n, m: torch.clamp(x, -y.abs(), y.abs()),
    "aten::masked_fill.Scalar": lambda x, y, n, m: x.masked_fill(m[..., None], 3.0),
    "aten::where.ScalarOther": lambda x, y, n, m: torch.where(x > 0, x, 0.5),
    "aten::nan_to_num.default": lambda x, y, n, m: torch.nan_to_num(torch.log(x), neginf=1.0),
    "aten::logsumexp.default": lambda x, y, n, m: torch.logsumexp(x, -1),
    "aten::prod.dim_int": lambda x, y, n, m: torch.prod(x, -1),
    "aten::var.correction": lambda x, y, n, m: torch.var(x, dim=(1, 2), correction=2),
    "aten::std.correction": lambda x, y, n, m: torch.std(x, dim=-1, correction=0),
    "aten::linalg_vector_norm.default": lambda x, y, n, m: torch.linalg.vector_norm(x, dim=-1),
    "aten::max.dim": lambda x, y, n, m: x.max(-1).values,
    "aten::min.default": lambda x, y, n, m: x.min() + x,
    "aten::cumsum.default": lambda x, y, n, m: x.cumsum(1),
    "aten::einsum.default": lambda x, y, n, m: torch.einsum("b s i, b t i -> b t s", x, x),
    "aten::layer_norm.default": lambda x, y, n, m: F.layer_norm(x.tanh() + x, (6,), y),
    "aten::group_norm.default": lambda x, y, n, m: F.group_norm(x.transpose(1, 2), 2, y, y),
}
WHOLES: dict[str, Callable[..., Tensor]] = {
    "aten::floor_divide.default": lambda x, y, n, m: n // 3,
    "aten::div.Tensor_mode": lambda x, y, n, m: torch.div(n, -3, rounding_mode="trunc"),
    "aten::remainder.Scalar": lambda x, y, n, m: n % 3,
    "aten::__and__.Scalar": lambda x, y, n, m: n & 6,
    "aten::bitwise_not.default": lambda x, y, n, m: ~n,
    "aten::__or__.Tensor": lambda x, y, n, m: m | (n > 0),
    "aten::logical_xor.default": lambda x, y, n, m: torch.logical_xor(m, n > 0),
    "aten::mul.Tensor": lambda x, y, n, m: m * (n > 0),
    "aten::eq.Tensor": lambda x, y, n, m: m == (n > 0),
    "aten::any.dim": lambda x, y, n, m: m.any(-1),
    "aten::all.dim": lambda x, y, n, m: (n > -7).all(-1, keepdim=True),
    "aten::isnan.default": lambda x, y, n, m: torch.log(x).isnan(),
    "aten::argmax.default": lambda x, y, n, m: x.argmax(-1),
    "aten::one_hot.default": lambda x, y, n, m: F.one_hot(n.abs(), 9),
    "aten::bucketize.Tensor": lambda x, y, n, m: torch.bucketize(x, y.sort().values, right=True),
    "aten::searchsorted.Tensor": lambda x, y, n, m: torch.searchsorted(
        x.sort(-1).values, n.float()[..., None]
    ),
    "aten::to.dtype": lambda x, y, n, m: x[..., 0].type_as(n) + n,
    "aten::argsort.default": lambda x, y, n, m: x.argsort(-1, descending=True),
    "aten::scatter.value": lambda x, y, n, m: torch.zeros_like(n).scatter(1, n.abs() % 3, 1),
    "aten::item.default": lambda x, y, n, m: n.sum().item() + n,
    "aten::histc.default": lambda x, y, n, m: n.float().histc(7, 0, 6) + n.float().histc(1, 0, 0),
}
MOVES: dict[str, Callable[..., Tensor]] = {
    "aten::repeat.default": lambda x, y, n, m: x.repeat(2, 1, 1, 3),
    "aten::repeat_interleave.self_int": lambda x, y, n, m: x.repeat_interleave(3, dim=1),
    "aten::unbind.int": lambda x, y, n, m: x.unbind(-1)[2],
    "aten::flip.default": lambda x, y, n, m: x.flip(1, 2),
    "aten::roll.default": lambda x, y, n, m: x.roll((1, -2), (1, 2)),
    "aten::triu.default": lambda x, y, n, m: x.triu(1),
    "aten::tril.default": lambda x, y, n, m: (x > 0).tril(-1),
    "aten::unfold.default": lambda x, y, n, m: x.unfold(2, 3, 2),
    "aten::squeeze.dims": lambda x, y, n, m: x[:, :, None, :, None].squeeze((2, 4)),
    "aten::mT.default": lambda x, y, n, m: x.mT,
    "aten::movedim.int": lambda x, y, n, m: x.movedim(-1, 0),
    "aten::narrow.default": lambda x, y, n, m: x.narrow(2, 1, 3),
    "aten::expand_as.default": lambda x, y, n, m: y.expand_as(x),
    "aten::new_ones.default": lambda x, y, n, m: x.new_ones(x.shape[0], 3) + x[:, :1, 0],
    "aten::arange.start_step": lambda x, y, n, m: x[..., :4] + torch.arange(0.5, 2.5, 0.5),
    "aten::linspace.default": lambda x, y, n, m: x + torch.linspace(0.0, 1.0, 6),
    "aten::broadcast_tensors.default": lambda x, y, n, m: torch.broadcast_tensors(
        n[..., None], y, x[:, :1]
    )[1],
    "aten::meshgrid.indexing": lambda x, y, n, m: torch.meshgrid(y, n[0] * 0.5, indexing="xy")[1],
    "aten::concat.default": lambda x, y, n, m: torch.concat((x, x * y), -1),
    "aten::cat.default": lambda x, y, n, m: torch.cat((torch.tensor([]), x, x), -2),
    "aten::slice_scatter.default": lambda x, y, n, m: x.slice_scatter(
        y[:2].expand(*n.shape, 2), 2, 1, 5, 2
    ),
    "aten::select_scatter.default": lambda x, y, n, m: x.select_scatter(n.float(), 2, -2),
}
LOOKS: dict[str, Callable[..., Tensor]] = {
    "aten::topk.default": lambda x, y, n, m: x.topk(3, dim=-1).values,
    "aten::sort.default": lambda x, y, n, m: x.sort(1).values,
    "aten::gather.default": lambda x, y, n, m: x.gather(-1, n.abs()[..., None] % 6),
    "aten::index_select.default": lambda x, y, n, m: x.index_select(2, torch.tensor([4, 0])),
    "aten::index.Tensor": lambda x, y, n, m: x[:, n[0, :2].abs() % 3, n[0, :2].abs() % 6],
    "aten::index_put.default": lambda x, y, n, m: torch.index_put(
        x.new_zeros(*x.shape[:2], 6), (n[:, 0].abs() % 2, n[:, 1].abs() % 3), y, accumulate=True
    ),
    "aten::scatter.src": lambda x, y, n, m: torch.zeros_like(x).scatter(
        2, x.argsort(-1)[..., :4], x * 2
    ),
    "aten::scatter_add.default": lambda x, y, n, m: x.scatter_add(2, n.abs()[..., None] % 6, x),
    "aten::scatter_reduce.two": lambda x, y, n, m: x.scatter_reduce(
        2, n.abs()[..., None] % 6, x, "amax"
    ),
    "aten::index_add.default": lambda x, y, n, m: x.index_add(1, n[0].abs() % 3, x, alpha=0.5),
    "aten::polar.default": lambda x, y, n, m: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.polar(torch.ones(3), y[:3])
    ).flatten(-2),
    "aten::fft_fftn.default": lambda x, y, n, m: torch.fft.fftn(x, dim=(1, 2)).real,
    "aten::scaled_dot_product_attention.default": lambda x, y, n, m: F.scaled_dot_product_attention(
        x[:, None], x[:, None] * 2, x[:, None], m[:, None, None, :] | (n[:, None, None, :] > -9)
    ),
    "aten::_conj.default": lambda x, y, n, m: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (3, 2)))[:, :, None]
        .transpose(1, 2)
        .conj()
        .resolve_conj()
    ),
}
K3 = torch.linspace(-1, 1, 6 * 2 * 3).reshape(6, 2, 3)
K33 = torch.linspace(-1, 1, 2 * 9).reshape(2, 1, 3, 3)
IMAGES: dict[str, Callable[..., Tensor]] = {
    "aten::conv1d.padding": lambda x, y, n, m: F.conv1d(x.mT, K3, y, padding="same", groups=3),
    "aten::conv2d.default": lambda x, y, n, m: F.conv2d(x[:, None], K33, stride=2, padding=1),
    "aten::conv_transpose1d.default": lambda x, y, n, m: F.conv_transpose1d(
        x.mT, K3, stride=2, padding=1, output_padding=1
    ),
    "aten::max_pool2d.default": lambda x, y, n, m: F.max_pool2d(x[:, None], 2, padding=1),
    "aten::avg_pool1d.default": lambda x, y, n, m: F.avg_pool1d(x, 3, stride=2, padding=1),
    "aten::adaptive_avg_pool1d.default": lambda x, y, n, m: F.adaptive_avg_pool1d(x, 3),
    "aten::adaptive_avg_pool2d.default": lambda x, y, n, m: F.adaptive_avg_pool2d(x[:, None], 1),
    "aten::im2col.default": lambda x, y, n, m: F.unfold(x[:, None], (3, 2), padding=(1, 0)),
    "aten::upsample_nearest2d.vec": lambda x, y, n, m: F.interpolate(x[:, None], (7, 9)),
    "aten::upsample_bilinear2d.vec": lambda x, y, n, m: F.interpolate(
        x[:, None], (7, 9), mode="bilinear"
    ),
    "aten::upsample_bicubic2d.vec": lambda x, y, n, m: F.interpolate(
        x[:, None], (7, 9), mode="bicubic", align_corners=True
    ),
    "aten::glu.default": lambda x, y, n, m: F.glu(x),
    "aten::_weight_norm.default": lambda x, y, n, m: torch._weight_norm(x, x.mean((1, 2), True), 0),
}


class Table(nn.Module):
    """Several functions of the same inputs."""

    def __init__(self, functions: list[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x, y, n, m) for function in self.functions)


def operands(batch: int, time: int) -> dict[str, Tensor]:
    """The inputs of a table."""
    generator = torch.Generator().manual_seed(batch)
    return {
        "x": torch.randn(batch, time, 6, generator=generator),
        "y": torch.randn(6, generator=generator),
        "n": torch.randint(-8, 9, (batch, time), generator=generator),
        "m": torch.rand(batch, time, generator=generator) > 0.5,
    }


DIMS = {"x": ("b", "s", 6), "y": (6,), "n": ("b", "s"), "m": ("b", "s")}


@pytest.mark.parametrize(
    "table",
    [FLOATS, WHOLES, MOVES, LOOKS, IMAGES],
    ids=["floats", "wholes", "moves", "looks", "images"],
)
def test_operators_compute_what_torch_does(table, tmp_path):
    module = Table(list(table.values()))
    program = export(module, *operands(2, 5).values(), dims=DIMS)
    assert set(table) <= {op_name(n.target) for n in program.graph.nodes}
    Onnx(graphs=("unrolled",)).write(program, tmp_path)
    onnx.checker.check_model(str(tmp_path / "unrolled.onnx"), full_check=True)
    session = Session(tmp_path / "unrolled.onnx")
    for size in ((2, 5), (3, 7)):
        inputs = operands(*size)
        found = session.run(inputs)
        for number, (name, expected) in enumerate(zip(table, module(**inputs), strict=True)):
            actual = found[f"out{number}"]
            assert actual.shape == expected.shape, name
            if expected.dtype.is_floating_point:
                assert (
                    tolerances.relative_rms(actual, expected) <= tolerances.FORWARD[torch.float32]
                ), name
            else:
                assert torch.equal(actual, expected), name


class Unknown(nn.Module):
    """An operator that has no lowering, behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(self.project(x).square() + 1)


def test_a_refusal_names_the_op_the_node_and_the_module(tmp_path):
    program = export(Unknown(), torch.randn(2, 6))
    with pytest.raises(ExportError) as refused:
        Onnx().write(program, tmp_path)
    assert "i0.default has no lowering" in str(refused.value)
    assert "(after " in str(refused.value.where)
    assert "project)" in str(refused.value.where)
    assert "@lowering" in str(refused.value.hint)


def test_masks_that_choose_elements(tmp_path):
    """As many as the data have; one number at all their places is a choice between two tensors."""
    functions = {
        "chosen": lambda x, y, n, m: x[m] * 2,
        "written": lambda x, y, n, m: x.index_put((m,), x[m] * y),
        "one": lambda x, y, n, m: x.index_put((n > 0,), y[0]),
    }
    module = Table(list(functions.values()))
    program = export(module, *operands(2, 5).values(), dims=DIMS)
    Onnx(graphs=("unrolled",)).write(program, tmp_path)
    found = Session(tmp_path / "unrolled.onnx").run(operands(3, 7))
    for number, expected in enumerate(module(**operands(3, 7))):
        torch.testing.assert_close(found[f"out{number}"], expected)


class Picked(nn.Module):
    """Takes one of several heads by a list of indices, as Falcon takes its keys, and repeats it."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (3, 2))
        key = heads[:, :, [-2]]
        return (heads[:, :, :-2] + key.expand(-1, -1, 1, -1)).flatten(2)


def test_a_list_of_indices_is_known_to_shape_inference(tmp_path):
    program = export(Picked(), torch.randn(2, 5, 6), dims={"x": ("b", "s", 6)})
    Onnx(graphs=("unrolled",)).write(program, tmp_path)
    stored = onnx.load(str(tmp_path / "unrolled.onnx"), load_external_data=False)
    integers = [each for each in stored.graph.initializer if each.data_type == TensorProto.INT64]
    assert integers
    assert all(each.data_location == TensorProto.DEFAULT for each in integers)
    x = torch.randn(3, 7, 6)
    found = Session(tmp_path / "unrolled.onnx").run({"x": x})
    torch.testing.assert_close(found["out0"], Picked()(x))
