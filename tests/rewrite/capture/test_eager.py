from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reroll.rewrite.analysis import tolerances
from reroll.rewrite.capture.raising import raise_idioms
from reroll.rewrite.capture.raising.attention import attention_arguments
from reroll.rewrite.ir.ops import ATTENTION
from tests.exported import calls, export, outputs
from tests.programs import F32

BATCH, HEADS, TIME, SIZE = 3, 4, 5, 8
LOW = torch.finfo(F32).min
DIMS = {
    "q": ("b", HEADS, "s", SIZE),
    "k": ("b", HEADS, "s", SIZE),
    "v": ("b", HEADS, "s", SIZE),
}


class Attention(nn.Module):
    """Attention of q, k, v [batch, heads, time, size] written out by a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, q, k, v, extra=None):
        out = self.function(q, k, v) if extra is None else self.function(q, k, v, extra)
        # as in a model: what follows is not part of the pattern
        return out * 2.0


def heads(kv_heads=HEADS, rows=BATCH):
    return (
        torch.randn(rows, HEADS, TIME, SIZE),
        torch.randn(rows, kv_heads, TIME, SIZE),
        torch.randn(rows, kv_heads, TIME, SIZE),
    )


def raised(function, *inputs, dims=None, tolerance=None):
    """The raised graph's ops and attentions, once it is certain that they compute the same."""
    program = export(Attention(function), *inputs, dims=dims)
    (expected,) = outputs(program, *inputs)
    result = raise_idioms(program)
    (actual,) = outputs(result, *inputs)
    tolerance = tolerance or tolerances.forward(expected.dtype)
    assert tolerances.relative_rms(actual, expected) <= tolerance
    nodes = [n for n in result.graph.nodes if n.target is ATTENTION]
    return calls(result.graph), [attention_arguments(n) for n in nodes]


def assert_raised(function, *inputs, dims=None):
    names, found = raised(function, *inputs, dims=dims)
    assert len(found) == 1
    assert not {"softmax", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention"} & set(names)
    return found[0]


def assert_stays(function, *inputs):
    names, found = raised(function, *inputs)
    assert not found
    assert "softmax" in names


def scores(q, k):
    return torch.matmul(q, k.transpose(-1, -2))


def causal(x):
    """Where a query [..., time, keys] may see a key."""
    return torch.ones(x.shape[-2:], dtype=torch.bool).tril()


# ---- scales

SCALES = {
    "no scale": (lambda q, k, v: F.softmax(scores(q, k), -1) @ v, 1.0),
    "factor": (lambda q, k, v: F.softmax(scores(q, k) * 0.3, -1) @ v, 0.3),
    "quotient": (lambda q, k, v: F.softmax(scores(q, k) / 4.0, -1) @ v, 0.25),
    "both": (lambda q, k, v: F.softmax(scores(q, k) * 3.0 / 4.0, dim=3) @ v, 0.75),
    "in fp32": (
        lambda q, k, v: F.softmax(scores(q, k) * 0.3, -1, dtype=torch.float32).to(q.dtype) @ v,
        0.3,
    ),
    "permuted keys": (lambda q, k, v: F.softmax(q @ k.permute(0, 1, 3, 2) * 0.3, -1) @ v, 0.3),
    "dropout": (lambda q, k, v: F.dropout(F.softmax(scores(q, k), -1), 0.1, False) @ v, 1.0),
}


def test_scores_in_fp32_beside_values_in_half_precision():
    def attention(q, k, v):
        weights = torch.softmax(scores(q.float(), k.float()) / 3.0, -1)
        return torch.matmul(weights.to(v.dtype), v)

    inputs = [each.bfloat16() for each in heads()]
    assert assert_raised(attention, *inputs)["scale"] == pytest.approx(1 / 3)
    # queries that were never rounded, as those of GPT-J, whose rotary tables are in fp32
    assert_raised(attention, inputs[0].float(), *inputs[1:])


@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("dims", [None, DIMS], ids=["fixed", "dynamic"])
def test_scales_are_read(form, dims):
    function, scale = SCALES[form]
    found = assert_raised(function, *heads(), dims=dims)
    assert found["scale"] == pytest.approx(scale)
    assert found["bias"] is None
    assert found["softcap"] is None
    assert not found["causal"]


# ---- masks and biases

ADDED = {
    "after the scale": lambda q, k, v, mask: F.softmax(scores(q, k) * 0.3 + mask, -1) @ v,
    "before the scale": lambda q, k, v, mask: F.softmax((scores(q, k) + mask) * 0.3, -1) @ v,
    "between": lambda q, k, v, mask: F.softmax((scores(q, k) * 0.5 + mask) / 2.0, -1) @ v,
    "first": lambda q, k, v, mask: F.softmax(mask + scores(q, k) * 0.3, -1) @ v,
    "twice": lambda q, k, v, mask: F.softmax((scores(q, k) + mask) * 0.3 + mask, -1) @ v,
    "cast": lambda q, k, v, mask: F.softmax(scores(q, k) * 0.3 + mask.float(), -1) @ v,
}
SHAPES = [(BATCH, 1, TIME, TIME), (1, HEADS, TIME, TIME), (BATCH, HEADS, TIME, TIME), (TIME, TIME)]


@pytest.mark.parametrize("form", ADDED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_terms_are_read(form, shape):
    # a size of 1 is written as a fixed one
    dims = {"extra": tuple("b" if i == 0 and n == BATCH else n for i, n in enumerate(shape))}
    found = assert_raised(ADDED[form], *heads(), torch.randn(shape), dims=dims)
    assert found["bias"] is not None


def keep_of(q):
    keep = torch.rand(q.shape[0], 1, TIME, TIME) < 0.6
    keep[..., 0] = True
    return keep


MASKED = {
    "masked_fill": lambda q, k, v, keep: (
        F.softmax((scores(q, k) * 0.3).masked_fill(~keep, LOW), -1) @ v
    ),
    "masked_fill with infinity": lambda q, k, v, keep: (
        F.softmax(scores(q, k).masked_fill(~keep, float("-inf")) * 0.3, -1) @ v
    ),
    "where": lambda q, k, v, keep: F.softmax(torch.where(keep, scores(q, k) * 0.3, LOW), -1) @ v,
    "where with a tensor": lambda q, k, v, keep: (
        F.softmax(torch.where(keep, scores(q, k) * 0.3, torch.full([], LOW)), -1) @ v
    ),
    "where and a term": lambda q, k, v, keep: (
        F.softmax(torch.where(keep, scores(q, k) / 2.0, LOW) + 0.5 * keep, -1) @ v
    ),
    "causal": lambda q, k, v, keep: (
        F.softmax(torch.where(causal(keep), scores(q, k) * 0.3, LOW), -1) @ v
    ),
}


@pytest.mark.parametrize("form", MASKED)
def test_conditions_are_read(form):
    q, k, v = heads()
    found = assert_raised(MASKED[form], q, k, v, keep_of(q))
    assert found["bias"] is not None
    assert found["scale"] in (pytest.approx(0.3), pytest.approx(0.5))


def test_soft_caps_are_read():
    def capped(q, k, v):
        return F.softmax(torch.tanh(scores(q, k) * 0.3 / 5.0) * 5.0, -1) @ v

    found = assert_raised(capped, *heads())
    assert found["softcap"] == 5.0
    assert found["scale"] == pytest.approx(0.3)


def test_soft_caps_under_a_mask_are_read():
    def capped(q, k, v, mask):
        return F.softmax(torch.tanh(scores(q, k) / 5.0) * 5.0 + mask, -1) @ v

    found = assert_raised(capped, *heads(), torch.randn(BATCH, 1, TIME, TIME))
    assert found["softcap"] == 5.0
    assert found["bias"] is not None


def test_the_cap_is_the_factor_after_it():
    def odd(q, k, v):
        return F.softmax(torch.tanh(scores(q, k) / 5.0) * 4.0, -1) @ v

    found = assert_raised(odd, *heads())
    assert found["softcap"] == 4.0
    assert found["scale"] == pytest.approx(0.8)


@pytest.mark.parametrize("inner", [1.0, 3.0])
def test_a_mask_under_a_soft_cap_is_no_bias(inner):
    def capped(q, k, v, mask):
        return F.softmax(torch.tanh(scores(q, k) * inner + mask) * 5.0, -1) @ v

    assert_stays(capped, *heads(), torch.randn(BATCH, 1, TIME, TIME))


# ---- heads

REPEATS = {
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "expand": lambda x: (
        x[:, :, None].expand(x.shape[0], 2, 2, x.shape[2], SIZE).reshape(-1, HEADS, TIME, SIZE)
    ),
    "stack": lambda x: torch.stack((x, x), dim=2).reshape(-1, HEADS, TIME, SIZE),
}


@pytest.mark.parametrize("form", ["repeat_interleave", "expand"])
def test_repeated_heads_are_grouped(form):
    repeat = REPEATS[form]

    def grouped(q, k, v):
        return F.softmax(scores(q, repeat(k)) * 0.3, -1) @ repeat(v)

    found = assert_raised(grouped, *heads(kv_heads=2))
    assert (found["k"].name, found["v"].name) == ("k", "v")


@pytest.mark.parametrize(
    "repeat",
    [
        REPEATS["stack"],
        # tiled heads: 0 1 0 1 in place of 0 0 1 1
        lambda x: x.repeat(1, 2, 1, 1),
        lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(-1, HEADS, TIME, SIZE),
    ],
    ids=["stacked", "tiled", "tiled by expand"],
)
def test_heads_that_are_repeated_in_another_way_stay_repeated(repeat):
    def other(q, k, v):
        return F.softmax(scores(q, repeat(k)) * 0.3, -1) @ repeat(v)

    found = assert_raised(other, *heads(kv_heads=2))
    assert found["k"].name != "k"


def test_only_keys_repeated_are_no_groups():
    def odd(q, k, v):
        return F.softmax(scores(q, k.repeat_interleave(2, dim=1)), -1) @ v

    q, k, _ = heads(kv_heads=2)
    raised(odd, q, k, q)


def flat(x):
    return x.reshape(-1, *x.shape[-2:])


def test_heads_flattened_into_the_batch_are_told_apart():
    def flattened(q, k, v):
        weights = F.softmax(torch.bmm(flat(q), flat(k).transpose(1, 2)) * 0.3, -1)
        return torch.bmm(weights, flat(v)).view(q.shape)

    assert_raised(flattened, *heads())


def alibi(beta, alpha):
    def function(q, k, v, slopes):
        product = torch.baddbmm(slopes, flat(q), flat(k).transpose(1, 2), beta=beta, alpha=alpha)
        weights = F.softmax(product.view(q.shape[0], HEADS, TIME, TIME), -1)
        return torch.bmm(weights.view(-1, TIME, TIME), flat(v)).view(q.shape)

    return function


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 0.3), (0.5, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("keys", [1, TIME])
def test_baddbmm_with_alibi_is_raised(beta, alpha, keys):
    slopes = torch.randn(BATCH * HEADS, keys, TIME)
    q, k, v = heads()

    def function(q, k, v, slopes):
        return alibi(beta, alpha)(q, k, v, slopes.reshape(-1, keys, TIME))

    found = assert_raised(function, q, k, v, slopes.view(BATCH, HEADS, keys, TIME))
    assert found["scale"] == pytest.approx(alpha)
    assert found["bias"] is not None


# ---- near misses

NO_ATTENTION = {
    # Inductor once rewrote these to the plain form: it did not look at the order of a permute
    "heads with time": lambda q, k, v: (
        F.softmax(q @ F.pad(k, (0, -3, 0, 3)).permute(0, 1, 2, 3), -1) @ v
    ),
    "keys not transposed": lambda q, k, v: (
        F.softmax(q[..., :TIME, :TIME] @ k[..., :TIME], -1) @ v[..., :SIZE, :]
    ),
    "softmax over queries": lambda q, k, v: F.softmax(scores(q, k), -2) @ v,
    "softmax over heads": lambda q, k, v: F.softmax(scores(q, k), 1) @ v,
    "no product": lambda q, k, v: (
        F.softmax(q.sum(-1, keepdim=True) + k.sum(-1)[..., None, :], -1) @ v
    ),
    "a product after the softmax": lambda q, k, v: (F.softmax(scores(q, k), -1) * 0.5) @ v,
    "a square of the scores": lambda q, k, v: F.softmax(scores(q, k).square(), -1) @ v,
    "the sum of two products": lambda q, k, v: F.softmax(scores(q, k) * scores(k, q), -1) @ v,
}


@pytest.mark.parametrize("form", NO_ATTENTION)
def test_what_is_no_attention_stays(form):
    assert_stays(NO_ATTENTION[form], *heads())


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 2, 1, 3), (0, 3, 2, 1), (0, 1, 2, 3)])
def test_a_different_permute_is_not_taken_for_a_transpose(order):
    """Sizes that all fit: heads, time and size are the same number."""
    q, k, v = (torch.randn(2, 4, 4, 4) for _ in range(3))

    def permuted(q, k, v):
        return F.softmax(q @ k.permute(order) * 0.3, -1) @ v

    names, found = raised(permuted, q, k, v)
    if found:
        # keys that are permuted before they are transposed are keys like any others
        assert {"permute", "transpose"} & set(names)
    plain, _ = raised(lambda q, k, v: F.softmax(scores(q, k) * 0.3, -1) @ v, q, k, v)
    assert names != plain


@pytest.mark.parametrize("value", [0.0, -1.0, 5.0])
def test_scores_that_are_filled_but_not_masked_stay(value):
    def filled(q, k, v, keep):
        return F.softmax(scores(q, k).masked_fill(~keep, value), -1) @ v

    q, k, v = heads()
    assert_stays(filled, q, k, v, keep_of(q))


def test_a_mask_turned_around_is_not_taken_for_the_mask():
    def inverted(q, k, v, keep):
        return F.softmax(scores(q, k).masked_fill(keep, LOW), -1) @ v

    q, k, v = heads()
    keep = keep_of(q)
    keep[..., 1] = False
    assert_raised(inverted, q, k, v, keep)


# ---- fused attention

FUSED = {
    "plain": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), SIZE**-0.5, False),
    "scale": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        0.3,
        False,
    ),
    "causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        SIZE**-0.5,
        True,
    ),
}


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("dims", [None, DIMS], ids=["fixed", "dynamic"])
def test_fused_attention_is_raised(form, dims):
    function, scale, is_causal = FUSED[form]
    found = assert_raised(function, *heads(), dims=dims)
    assert found["scale"] == pytest.approx(scale)
    assert found["causal"] is is_causal


@pytest.mark.parametrize("kind", ["condition", "term"])
def test_fused_attention_with_a_mask_is_raised(kind):
    q, k, v = heads()
    mask = keep_of(q) if kind == "condition" else torch.randn(BATCH, 1, TIME, TIME)
    found = assert_raised(
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, scale=0.3),
        q, k, v, mask,
    )  # fmt: skip
    assert found["bias"] is not None


def test_fused_attention_over_groups_is_raised():
    found = assert_raised(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        *heads(kv_heads=2),
    )
    assert found["k"].name == "k"


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        # causal from the upper left, with fewer queries than keys
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :2], k, v, is_causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]),
    ],
    ids=["dropout", "causal upper left", "no heads"],
)
def test_other_fused_attention_stays(function):
    program = export(Attention(function), *heads())
    names = calls(raise_idioms(program).graph)
    assert "scaled_dot_product_attention" in names
    assert "reroll.attention" not in names
