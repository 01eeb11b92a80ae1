from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reroll.rewrite.analysis import tolerances
from reroll.rewrite.capture.raising import idioms
from reroll.rewrite.capture.raising.driver import apply_rule, raise_idioms
from reroll.rewrite.capture.raising.idioms import RewriteRule
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import Op, Var
from reroll.rewrite.ir.patterns import Miss
from tests.captured import captured, flat
from tests.exported import calls, export, outputs
from tests.programs import F32, aten

WIDTH, EPS = 12, 1e-5
DIMS = {"x": ("b", "s", WIDTH)}


class Weighted(nn.Module):
    """A function of x [batch, time, WIDTH] and two weights that are neither zeros nor ones."""

    def __init__(self, function, shape=(WIDTH,)) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = (nn.Parameter(torch.randn(shape)) for _ in range(2))

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def raised(module, *inputs, dims=None):
    """The names of the ops after raising, once it is certain that they compute the same."""
    program = export(module, *inputs, dims=dims)
    expected = outputs(program, *inputs)
    result = raise_idioms(program)
    for actual, value in zip(outputs(result, *inputs), expected, strict=True):
        assert actual.dtype == value.dtype
        assert tolerances.relative_rms(actual, value) <= tolerances.forward(value.dtype)
    # the program that was given is as it was
    assert all(map(torch.equal, outputs(program, *inputs), expected))
    assert set(result.weights) == {str(n.target) for n in result.graph.nodes if n.op == "get_attr"}
    return calls(result.graph)


def norm(function, dtype=F32, shape=(WIDTH,)):
    module = Weighted(function, shape).to(dtype)
    return raised(module, torch.randn(3, 5, WIDTH, dtype=dtype), dims=DIMS)


# ---- root-mean-square norms


def llama(x, weight, _):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def gemma(x, weight, _):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (wide * (1.0 + weight.float())).type_as(x)


RMS_NORMS = {
    "llama": llama,
    "gemma": gemma,
    "square": lambda x, w, _: w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)),
    "product": lambda x, w, _: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w,
    "quotient": lambda x, w, _: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "power": lambda x, w, _: w * (x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5)),
    "reciprocal": lambda x, w, _: (
        w * (x * torch.sqrt(EPS + x.pow(2).mean(-1, keepdim=True)).reciprocal())
    ),
    "no weight": lambda x, w, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "fused": lambda x, w, _: F.rms_norm(x, (WIDTH,), w, EPS),
    "fused without eps": lambda x, w, _: F.rms_norm(x, (WIDTH,), w),
    "fused without weight": lambda x, w, _: F.rms_norm(x, (WIDTH,), eps=EPS),
}


@pytest.mark.parametrize("form", RMS_NORMS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rms_norms_are_raised(form, dtype):
    assert norm(RMS_NORMS[form], dtype) == ["reroll.rms_norm"]


def test_what_an_rms_norm_is_made_of_is_kept():
    program = raise_idioms(export(Weighted(gemma), torch.randn(3, 5, WIDTH), dims=DIMS))
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    x, weight, eps, offset = node.args
    assert (x.name, weight.op, eps, offset) == ("x", "get_attr", EPS, 1.0)
    assert node.meta["type"].shape == ("b", "s", WIDTH)


NO_RMS_NORMS = {
    "over time": lambda x, w, _: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)),
    "over both": lambda x, w, _: w * (x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS)),
    "of a sum": lambda x, w, _: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)),
    "of cubes": lambda x, w, _: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS)),
    "no root": lambda x, w, _: w * (x * (x.pow(2).mean(-1, keepdim=True) + EPS).reciprocal()),
    "another value": lambda x, w, b: (
        w * ((x + b) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
    ),
    "eps inside the mean": lambda x, w, _: (
        w * (x * torch.rsqrt((x.pow(2) + EPS).mean(-1, keepdim=True)))
    ),
    "eps outside": lambda x, w, _: w * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + EPS)),
    "fused over both": lambda x, w, _: F.rms_norm(x, (5, WIDTH), eps=EPS),
}


@pytest.mark.parametrize("form", NO_RMS_NORMS)
def test_what_is_no_rms_norm_stays(form):
    module = Weighted(NO_RMS_NORMS[form])
    x = torch.randn(3, 5, WIDTH)
    assert "reroll.rms_norm" not in raised(module, x)


@pytest.mark.parametrize("shape", [(1,), (5, 1), (5, WIDTH)])
def test_a_weight_that_is_not_over_the_last_dimension_stays_outside(shape):
    module = Weighted(RMS_NORMS["llama"], shape)
    assert raised(module, torch.randn(3, 5, WIDTH)) == ["reroll.rms_norm", "mul"]


# ---- layer norms

LAYER_NORMS = {
    "quotient": lambda x, w, b: (
        w * ((x - x.mean(-1, True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS)) + b
    ),
    "rsqrt": lambda x, w, b: (
        (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS) * w + b
    ),
    "squares": lambda x, w, b: (
        (x - x.mean(-1, True))
        * torch.rsqrt((x - x.mean(-1, True)).pow(2).mean(-1, keepdim=True) + EPS)
        * w
        + b
    ),
    "no bias": lambda x, w, b: (
        w * ((x - x.mean(-1, True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS))
    ),
    "no weight": lambda x, w, b: (
        (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    ),
    "in fp32": lambda x, w, b: (
        b
        + w
        * (
            (x.float() - x.float().mean(-1, True))
            * torch.rsqrt((x.float() - x.float().mean(-1, True)).pow(2).mean(-1, True) + EPS)
        ).to(x.dtype)
    ),
    "fused": lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, EPS),
}


@pytest.mark.parametrize("form", LAYER_NORMS)
def test_layer_norms_are_raised(form):
    assert norm(LAYER_NORMS[form]) == ["layer_norm"]


NO_LAYER_NORMS = {
    "unbiased": lambda x, w, b: (
        (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, correction=1, keepdim=True) + EPS)
    ),
    "over time": lambda x, w, b: (
        (x - x.mean(1, True)) / torch.sqrt(x.var(1, correction=0, keepdim=True) + EPS)
    ),
    "means of two": lambda x, w, b: (
        (x - x.mean(1, True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS)
    ),
    "eps outside": lambda x, w, b: (
        (x - x.mean(-1, True)) / (x.std(-1, correction=0, keepdim=True) + EPS)
    ),
    "no centre": lambda x, w, b: x / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS),
}


@pytest.mark.parametrize("form", NO_LAYER_NORMS)
def test_what_is_no_layer_norm_stays(form):
    assert not {"layer_norm", "reroll.rms_norm"} & set(norm(NO_LAYER_NORMS[form]))


# ---- rotary position embeddings


class Rope(nn.Module):
    def __init__(self, turn, size=8) -> None:
        super().__init__()
        self.turn, self.size = turn, size

    def forward(self, x, cos, sin):
        if self.size == x.shape[-1]:
            return x * cos + self.turn(x) * sin
        turned, rest = x[..., : self.size], x[..., self.size :]
        return torch.cat((turned * cos + self.turn(turned) * sin, rest), dim=-1)


def halves(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def pairs_reshaped(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)


def rope(turn, size=8, width=8):
    x = torch.randn(3, 2, 5, width)
    cos, sin = torch.randn(3, 1, 5, size), torch.randn(3, 1, 5, size)
    dims = {
        n: ("b", h, "s", w) for n, h, w in (("x", 2, width), ("cos", 1, size), ("sin", 1, size))
    }
    return raised(Rope(turn, size), x, cos, sin, dims=dims)


@pytest.mark.parametrize("turn", [halves, pairs, pairs_reshaped])
@pytest.mark.parametrize("width", [8, 12], ids=["whole", "partial"])
def test_rotary_embeddings_are_raised(turn, width):
    assert rope(turn, width=width) == ["reroll.rope"]


def test_both_arrangements_are_told_apart():
    found = {}
    for turn in (halves, pairs):
        x = torch.randn(3, 2, 5, 8)
        program = raise_idioms(export(Rope(turn), x, x, x))
        found[turn] = [n.args[3] for n in program.graph.nodes if n.op == "call_function"]
    assert found == {halves: [False], pairs: [True]}


NO_ROPES = {
    "halves swapped": lambda x: torch.cat((x[..., 4:], -x[..., :4]), dim=-1),
    "no sign": lambda x: torch.cat((x[..., 4:], x[..., :4]), dim=-1),
    "halves in place": lambda x: torch.cat((-x[..., :4], x[..., 4:]), dim=-1),
    "unequal parts": lambda x: torch.cat((-x[..., 2:], x[..., :2]), dim=-1),
    "pairs swapped": lambda x: torch.stack((x[..., ::2], -x[..., 1::2]), dim=-1).flatten(-2),
    "pairs with the sign of the other": lambda x: torch.stack(
        (x[..., 1::2], -x[..., ::2]), dim=-1
    ).flatten(-2),
    "pairs side by side": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-2).flatten(-2),
}


@pytest.mark.parametrize("form", NO_ROPES)
def test_what_is_no_rotary_embedding_stays(form):
    assert "reroll.rope" not in rope(NO_ROPES[form])


def test_turning_over_time_is_no_rotary_embedding():
    def turn(x):
        return torch.cat((-x[:, :, 2:], x[:, :, :2]), dim=2)

    x = torch.randn(3, 2, 4, 8)
    assert "reroll.rope" not in raised(Rope(turn), x, x, x)


def test_channels_that_pass_must_be_the_others():
    class Overlapping(Rope):
        def forward(self, x, cos, sin):
            turned = x[..., :8]
            return torch.cat((turned * cos + self.turn(turned) * sin, x[..., 4:]), dim=-1)

    x, cos = torch.randn(3, 2, 5, 12), torch.randn(3, 1, 5, 8)
    found = raised(Overlapping(halves), x, cos, cos)
    assert found.count("reroll.rope") == 1
    assert found[-1] == "cat"


# ---- gated linear units


class Gated(nn.Module):
    def __init__(self, activation, fused=False) -> None:
        super().__init__()
        self.activation = activation
        self.gate, self.up, self.both = (nn.Linear(WIDTH, n) for n in (16, 16, 32))
        self.fused = fused

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.activation(gate) * up


SCALE = math.sqrt(2 / math.pi)


def new_gelu(x, cubic=0.044715, scale=SCALE):
    return 0.5 * x * (1.0 + torch.tanh(scale * (x + cubic * torch.pow(x, 3.0))))


def bloom_gelu(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_gated_linear_units_are_raised(name, fused):
    module = Gated(ACTIVATIONS[name], fused)
    x = torch.randn(3, 5, WIDTH)
    assert raised(module, x, dims=DIMS)[-1] == "reroll.glu"
    program = raise_idioms(export(module, x, dims=DIMS))
    (node,) = (n for n in program.graph.nodes if n.target is torch.ops.reroll.glu.default)
    assert node.args[2] == name


@pytest.mark.parametrize("form", [new_gelu, bloom_gelu])
def test_the_tanh_form_of_gelu_is_read(form):
    assert raised(Gated(form), torch.randn(3, 5, WIDTH)) == ["linear", "linear", "reroll.glu"]
    assert raised(Weighted(lambda x, *_: form(x)), torch.randn(3, 5, WIDTH)) == ["gelu"]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: new_gelu(x, cubic=0.05),
        lambda x: new_gelu(x, scale=0.8),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 2.0)))),
        lambda x: 0.5 * x * torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3.0))),
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: F.leaky_relu(x),
        lambda x: x,
    ],
)
def test_other_activations_stay(form):
    found = raised(Gated(form), torch.randn(3, 5, WIDTH))
    assert not {"gelu", "reroll.glu"} & set(found)


def test_only_projections_are_gated():
    """Two activations multiplied are no gated linear unit: neither factor is the plain one."""

    class Product(Gated):
        def forward(self, x):
            return F.silu(self.gate(x)) * torch.tanh(self.up(x))

    assert "reroll.glu" not in raised(Product(F.silu), torch.randn(3, 5, WIDTH))


# ---- linear


class Product(nn.Module):
    def __init__(self, function, *shape) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(16))

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def conv1d(x, weight, bias):
    out = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return out.view(*x.shape[:-1], weight.shape[-1])


LINEARS = {
    "matmul": (lambda x, w, _: x @ w, WIDTH, 16),
    "transposed": (lambda x, w, _: x @ w.t(), 16, WIDTH),
    "permuted": (lambda x, w, _: torch.matmul(x, w.permute(1, 0)), 16, WIDTH),
    "conv1d": (conv1d, WIDTH, 16),
    "flattened": (
        lambda x, w, b: F.linear(x.reshape(-1, WIDTH), w, b).view(x.shape[0], x.shape[1], 16),
        16,
        WIDTH,
    ),
    "linear": (F.linear, 16, WIDTH),
}


@pytest.mark.parametrize("form", LINEARS)
def test_products_with_a_weight_are_linear(form):
    function, *shape = LINEARS[form]
    found = raised(Product(function, *shape), torch.randn(3, 5, WIDTH), dims=DIMS)
    assert found == ["linear"]


@pytest.mark.parametrize("form", ["matmul", "conv1d"])
def test_a_matrix_is_transposed_in_the_weight_table(form):
    function, *shape = LINEARS[form]
    program = raise_idioms(export(Product(function, *shape), torch.randn(3, 5, WIDTH), dims=DIMS))
    (weight,) = (w for name, w in program.weights.items() if name.endswith("weight"))
    assert weight.meta.shape == (16, WIDTH)
    assert weight.trainable
    node = next(n for n in program.graph.nodes if str(n.target).endswith("weight"))
    assert node.meta["type"].shape == (16, WIDTH)


OTHER_PRODUCTS = {
    "weight on the left": (lambda x, w, _: w @ x, 16, 5),
    "weight read elsewhere": (lambda x, w, _: (x @ w) + w.sum(), WIDTH, 16),
    "weight with itself": (lambda x, w, _: x.sum() + w @ w, WIDTH, WIDTH),
    "a stack of matrices": (lambda x, w, _: x @ w, 3, WIDTH, 16),
    "scaled": (lambda x, w, b: torch.addmm(b, x[0], w, alpha=2.0), WIDTH, 16),
    "bias per row": (lambda x, w, b: torch.addmm(w[:5, :16], x[0], w[:, :16]), WIDTH, 20),
}


@pytest.mark.parametrize("form", OTHER_PRODUCTS)
def test_other_products_stay(form):
    function, *shape = OTHER_PRODUCTS[form]
    assert "linear" not in raised(Product(function, *shape), torch.randn(3, 5, WIDTH))


# ---- the check of each replacement


def swap(graph, root, match):
    return Builder(graph).call(aten.gelu.default, match["x"])


def test_a_replacement_that_computes_something_else_is_taken_back(caplog):
    module = Weighted(lambda x, w, b: F.silu(x) * w + b)
    program = export(module, torch.randn(3, 5, WIDTH))
    before = str(program.graph)
    wrong = RewriteRule("wrong", Op("aten.silu.default", Var("x")), swap)
    with caplog.at_level(logging.DEBUG, "reroll"):
        assert apply_rule(program.graph, wrong, {}) == 0
    program.graph.lint()
    assert str(program.graph) == before
    assert "wrong: the replacement computes something else" in caplog.text


def test_a_replacement_that_cannot_be_checked_is_taken_back():
    program = export(Weighted(lambda x, w, b: F.silu(x) * w + b), torch.randn(3, 5, WIDTH))
    silu = aten.silu.default
    right = RewriteRule(
        "right", Op(str(silu), Var("x")), lambda g, _, m: Builder(g).call(silu, m["x"])
    )
    x = next(n for n in program.graph.nodes if n.op == "placeholder")
    kind = x.meta.pop("type")
    before = str(program.graph)
    assert apply_rule(program.graph, right, {}) == 0
    assert str(program.graph) == before
    x.meta["type"] = kind
    assert apply_rule(program.graph, right, {}) == 1


def test_the_nearest_miss_is_logged(caplog):
    program = export(Weighted(NO_RMS_NORMS["over time"]), torch.randn(3, 5, WIDTH))
    rule = next(rule for rule in idioms.RULES if rule.name == "rms_norm")
    with caplog.at_level(logging.DEBUG, "reroll"):
        apply_rule(program.graph, rule, {})
    assert "rms_norm: no match; the nearest: rms_norm: expected -1, found 1" in caplog.text


def test_a_rewrite_may_refuse():
    program = export(Weighted(lambda x, w, b: F.silu(x)), torch.randn(3, 5, WIDTH))
    rule = RewriteRule("never", Op("aten.silu.default", Var("x")), lambda *_: Miss("not today"))
    assert apply_rule(program.graph, rule, {}) == 0


def test_equal_regions_are_tried_once(monkeypatch):
    from reroll.rewrite.capture.raising import driver as raising

    tried = []
    agree = raising._agree
    monkeypatch.setattr(raising, "_agree", lambda *args: tried.append(args) or agree(*args))
    raise_idioms(flat("llama"))
    # norms, rotary embedding of queries and of keys, gated unit: once each, not once per layer
    assert len(tried) <= 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"reroll.rms_norm": 9, "reroll.rope": 8, "reroll.glu": 4, "reroll.attention": 4}),
        ("gemma3", {"reroll.rms_norm": 25, "reroll.rope": 8, "reroll.glu": 4}),
        ("gpt_neox", {"reroll.rope": 8, "layer_norm": 9, "reroll.attention": 4}),
        ("gpt2", {"linear": 17, "layer_norm": 9, "reroll.attention": 4}),
        ("bloom", {"layer_norm": 10, "reroll.attention": 4}),
    ],
)
def test_models_are_raised(name, expected):
    found = calls(raise_idioms(flat(name)).graph)
    assert {op: found.count(op) for op in expected} == expected
    assert not {"rsqrt", "softmax", "addmm", "mm"} & set(found)


def test_masks_are_read_into_the_attention():
    program = captured("gemma3")
    assert not any("mask" in name for _, graph in program.graphs() for name in calls(graph))
