from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.capture import capture
from reroll.rewrite.capture.raising import raise_idioms
from reroll.rewrite.capture.rolling import roll_loops
from reroll.rewrite.capture.rolling.roll import merge_equal
from reroll.rewrite.checkpoint import MemorySource
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Input, Origin, TensorType
from reroll.rewrite.ir.weights import Weight, WeightTable
from reroll.rewrite.ir.weights.expressions import Meta, Source
from tests.captured import SPECIAL, TEXT, captured, flat
from tests.exported import calls, export, outputs
from tests.programs import F32, aten, call, reroll, typed

WIDTH = 8
DIMS = {"x": ("b", "s", WIDTH)}


def rolled(module, *inputs, dims=None):
    """The rolled Program of a module, once it is certain that it computes the same to the bit."""
    program = raise_idioms(export(module, *inputs, dims=dims))
    result = roll_loops(program)
    expected = outputs(program, *inputs)
    assert all(map(torch.equal, outputs(result, *inputs), expected))
    assert result.parameters() == program.parameters()
    return result


def shape_of(program):
    return [(loop.trips, loop.period) for loop in program.loops]


def x():
    return torch.randn(3, 5, WIDTH)


class Layer(nn.Module):
    """A small residual layer."""

    def __init__(self, inner: int = 16, activation=F.gelu) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.activation = activation
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, h):
        return h + self.down(self.activation(self.up(self.norm(h))) * 0.5)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sin()


# ---- what is found


def test_layers_become_one_loop():
    program = rolled(Stack(*(Layer() for _ in range(5))), x(), dims=DIMS)
    (loop,) = program.loops
    assert (loop.trips, loop.period, len(loop.carry), loop.inputs) == (5, 1, 1, ())
    assert calls(loop.body.graph) == ["layer_norm", "linear", "gelu", "mul", "linear", "add"]
    assert [n.name for n in loop.body.graph.nodes if n.op == "placeholder"] == ["h"]
    assert all(len(w.index) == 5 for name, w in program.weights.items() if "*" in name)
    assert loop.body.graph.find_nodes(op="placeholder")[0].meta["type"].shape == ("b", "s", WIDTH)


def test_a_program_may_be_rolled_again():
    program = rolled(Stack(*(Layer() for _ in range(3))), x())
    assert str(roll_loops(program)) == str(program)


class Unnamed(nn.Module):
    """The same stack written as one function, over weights whose names say nothing."""

    def __init__(self, depth: int, seed: int) -> None:
        super().__init__()
        names = [f"{n:x}" for n in random.Random(seed).sample(range(10**6, 10**7), 5 * depth)]
        shapes = [(WIDTH,), (16, WIDTH), (16,), (WIDTH, 16), (WIDTH,)] * depth
        self.order = names
        made = dict(zip(names, (torch.randn(s) for s in shapes), strict=True))
        self.weights = nn.ParameterDict({name: made[name] for name in sorted(names)})

    def forward(self, x):
        for i in range(0, len(self.order), 5):
            norm, up, up_bias, down, down_bias = (self.weights[n] for n in self.order[i : i + 5])
            inner = F.linear(F.rms_norm(x, (WIDTH,), norm, 1e-5), up, up_bias)
            x = x + F.linear(F.silu(inner) * 0.5, down, down_bias)
        return x


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layers_are_found_by_structure_not_by_name(seed):
    program = rolled(Unnamed(6, seed), x(), dims=DIMS)
    assert [loop.trips for loop in program.loops] == [6]
    assert len(program.weights) == 5


def test_modules_with_other_names_are_found_as_well():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("stem", "middle", "late", "last"):
                self.add_module(name, Layer())

        def forward(self, x):
            return self.last(self.late(self.middle(self.stem(x))))

    assert [loop.trips for loop in rolled(Named(), x()).loops] == [4]


@pytest.mark.parametrize("kinds", [(F.gelu, F.silu), (F.gelu, F.gelu, F.relu), (F.silu,) * 3])
def test_layers_that_repeat_with_a_period(kinds):
    stack = Stack(*(Layer(activation=kind) for _ in range(4) for kind in kinds))
    period = len(kinds) if len(set(kinds)) > 1 else 1
    program = rolled(stack, x())
    assert shape_of(program) == [(4 * len(kinds) // period, period)]


def test_an_incomplete_last_period_stays_outside():
    kinds = [F.gelu, F.silu, F.relu] * 3 + [F.gelu, F.silu]
    program = rolled(Stack(*(Layer(activation=kind) for kind in kinds)), x())
    (loop,) = program.loops
    assert (loop.trips, loop.period) == (3, 3)
    assert calls(program.graph).count("layer_norm") == 2


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 1), (2, 2)])
def test_first_and_last_layers_that_differ_stay_outside(first, last):
    others = [Layer(inner=24 + i) for i in range(first + last)]
    program = rolled(
        Stack(*others[:first], *(Layer() for _ in range(4)), *others[first:]), x(), dims=DIMS
    )
    assert shape_of(program) == [(4, 1)]
    assert calls(program.graph).count("layer_norm") == first + last


def test_two_stacks_become_two_loops():
    layers = [Layer() for _ in range(4)] + [Layer(inner=24) for _ in range(3)]
    program = rolled(Stack(*layers), x())
    assert shape_of(program) == [(4, 1), (3, 1)]
    assert len(program.bodies) == 2


@pytest.mark.parametrize(
    "layers",
    [
        [Layer()],
        [Layer(), Layer(inner=24)],
        [Layer(inner=16 + i, activation=f) for i, f in enumerate([F.gelu, F.silu, F.relu])],
    ],
    ids=["one layer", "two unlike", "three unlike"],
)
def test_what_does_not_repeat_stays_flat(layers):
    program = rolled(Stack(*layers), x())
    assert program.loops == ()
    assert program.bodies == {}
    assert calls(program.graph).count("layer_norm") == len(layers)


def test_a_short_repetition_is_no_layer():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(WIDTH) for _ in range(5)])

        def forward(self, x):
            for weight in self.weights:
                x = torch.tanh(x * weight)
            return x

    assert rolled(Short(), x()).loops == ()


def test_repetition_without_weights_is_no_loop():
    class Weightless(nn.Module):
        def forward(self, x):
            for _ in range(4):
                x = x + (x.sin() * 0.5).cos().tanh().exp().neg()
            return x

    assert rolled(Weightless(), x()).loops == ()


# ---- weights


def test_weights_that_all_layers_share_are_one_entry():
    layer = Layer()
    program = rolled(Stack(layer, layer, layer, layer), x())
    assert shape_of(program) == [(4, 1)]
    assert all(len(w.entries) == 1 and w.index == (0,) * 4 for w in program.weights.values())


def test_weights_that_some_layers_share_are_as_many_entries():
    a, b = Layer(), Layer()
    program = rolled(Stack(a, b, a, b, b), x())
    assert shape_of(program) == [(5, 1)]
    assert all(w.index == (0, 1, 0, 1, 1) for w in program.weights.values())


def test_a_weight_that_is_read_after_the_loop_as_well_stays_one():
    class Tied(Stack):
        def forward(self, x):
            x = super().forward(x @ self.layers[0].up.weight.T @ self.layers[0].up.weight)
            return x @ self.layers[0].up.weight.T

    program = rolled(Tied(*(Layer() for _ in range(4))), x())
    assert [loop.trips for loop in program.loops] in ([4], [3])


def test_one_matrix_for_all_layers_and_the_head_is_an_input_of_the_loop():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
            self.table = nn.Parameter(torch.randn(16, WIDTH))

        def forward(self, x):
            for norm in self.norms:
                x = x + F.gelu(norm(x) @ self.table.T).tanh() @ self.table
            return x @ self.table.T

    program = rolled(Shared(), x())
    assert [loop.trips for loop in program.loops] == [4]


# ---- constants


def test_numbers_that_differ_from_layer_to_layer_are_inputs():
    class Scaled(Stack):
        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x) * (1.0 + 0.25 * i)
            return x

    program = rolled(Scaled(*(Layer() for _ in range(4))), x())
    (loop,) = program.loops
    assert (1.0, 1.25, 1.5, 1.75) in loop.inputs


class PartPerLayer(nn.Module):
    """Layers that each add their own part of what was computed before them all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 4 * WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, h):
        parts = self.first(h).unflatten(-1, (4, WIDTH))
        for number, layer in enumerate(self.layers):
            h = layer(h) + parts[:, :, number]
        return h


def test_each_layer_may_take_its_part_of_one_value():
    program = rolled(PartPerLayer(), x(), dims=DIMS)
    assert shape_of(program) == [(4, 1)]
    (loop,) = program.loops
    assert [len(v) for v in loop.inputs if isinstance(v, tuple)] == [4]


def test_attributes_of_our_own_ops_may_differ():
    program = captured("gemma3")
    (loop,) = program.loops
    assert (loop.trips, loop.period) == (4, 1)
    assert (8, None, 8, None) in loop.inputs
    # two rotary tables, each as cosine and sine
    nodes = [v for v in loop.inputs if isinstance(v, tuple) and isinstance(v[0], fx.Node)]
    assert len(nodes) == 2
    assert all(v[0] is v[2] and v[1] is v[3] and v[0] is not v[1] for v in nodes)
    assert loop.input_for(loop.inputs.index((8, None, 8, None)), 1) is None


def test_shapes_that_differ_are_no_loop():
    class Reshaped(Stack):
        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x).unflatten(2, (2 ** (i % 4), -1)).softmax(-1).flatten(2)
            return x

    program = rolled(Reshaped(*(Layer() for _ in range(4))), x())
    assert program.loops == ()


# ---- values


def test_several_values_may_be_carried():
    class Streams(Stack):
        def forward(self, x):
            y = x.sin()
            for layer in self.layers:
                x, y = y + layer(x), x.tanh()
            return x + y

    program = rolled(Streams(*(Layer() for _ in range(4))), x())
    (loop,) = program.loops
    assert (loop.trips, len(loop.carry)) == (4, 2)


def test_a_value_inside_a_trip_that_is_used_after_it_is_not_lost():
    class Peeked(Stack):
        def forward(self, x):
            seen = []
            for layer in self.layers:
                x = layer(x)
                seen.append(x)
            return x + seen[1]

    program = rolled(Peeked(*(Layer() for _ in range(6))), x())
    # the loop is cut behind the layer whose value is used
    assert [loop.trips for loop in program.loops] == [2, 4]


def test_values_that_cross_trips_stay_right():
    """Later layers read what an earlier one has computed, as where keys and values are shared."""

    class Shared(Stack):
        def forward(self, x):
            kept = None
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i == 1:
                    kept = layer.norm(x)
                if kept is not None:
                    x = x * kept.tanh()
            return x

    program = rolled(Shared(*(Layer() for _ in range(6))), x())
    before, after = program.loops
    assert (before.trips, after.trips) == (2, 4)
    assert (len(before.inputs), len(after.inputs)) == (0, 1)


def test_a_sum_over_all_layers_is_carried():
    class Summed(Stack):
        def forward(self, x):
            total = torch.zeros_like(x)
            for layer in self.layers:
                x = layer(x)
                total = total + x.cos()
            return total

    program = rolled(Summed(*(Layer() for _ in range(4))), x())
    assert [loop.trips for loop in program.loops] == [4]
    assert len(program.loops[0].carry) == 2


def test_equal_computations_are_merged():
    graph = fx.Graph()
    a = graph.placeholder("a")
    twice = [call(graph, aten.mul.Tensor, call(graph, aten.sin.default, a), 2.0) for _ in range(2)]
    other = call(graph, aten.mul.Tensor, call(graph, aten.sin.default, a), 2)
    graph.output((*twice, other))
    merge_equal(graph)
    # 2 and 2.0 are not the same: they may give another dtype
    assert calls(graph) == ["sin", "mul", "mul"]


def test_random_numbers_and_states_are_not_merged():
    graph = fx.Graph()
    a = graph.placeholder("a")
    for target in (aten.bernoulli.default, aten.bernoulli.default):
        call(graph, target, a)
    caches = [call(graph, reroll.cache.default, a, a) for _ in range(2)]
    graph.output((*caches,))
    merge_equal(graph)
    assert calls(graph).count("bernoulli") == 2
    assert calls(graph).count("reroll.cache") == 2


# ---- models


@pytest.mark.parametrize(
    ("name", "loops"),
    [
        ("llama", [(4, 1)]),
        ("gemma3", [(4, 1)]),
        ("smollm3", [(3, 4)]),
        ("gpt2", [(4, 1)]),
        ("bloom", [(4, 1)]),
        ("bert", [(4, 1)]),
        ("vit", [(4, 1)]),
        ("t5", [(3, 1), (3, 1)]),
        ("whisper", [(3, 1), (3, 1)]),
    ],
)
def test_models_are_rolled(name, loops):
    program = captured(name)
    assert shape_of(program) == loops
    inputs = random_inputs(program, padded=True)
    expected = run(raise_idioms(flat(name)), inputs)
    assert all(torch.equal(t, expected[k]) for k, t in run(program, inputs).items())


def test_albert_shares_all_its_weights():
    config = transformers.AlbertConfig(**TEXT, embedding_size=16, intermediate_size=48)
    program = capture(transformers.AlbertModel(config).eval())
    (loop,) = program.loops
    assert loop.trips == 4
    stacked = [w for name, w in program.weights.items() if "*" in name]
    assert stacked
    assert all(len(w.entries) == 1 for w in stacked)


def test_mixtures_of_experts_roll_like_any_others():
    config = transformers.MixtralConfig(
        **{**TEXT, "num_hidden_layers": 3}, **SPECIAL, intermediate_size=24,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    unrolled = capture(model, roll=False)
    program = roll_loops(raise_idioms(unrolled))
    assert shape_of(program) == [(3, 1)]
    inputs = random_inputs(program, padded=True)
    actual, expected = run(program, inputs)["logits"], run(unrolled, inputs)["logits"]
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)


# ---- random stacks

OPS = st.sampled_from(["linear", "norm", "gelu", "tanh", "scale", "mask", "gate"])


class Maker:
    """Writes a stack of layers, each kind of layer a list of ops, into a flat graph."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = self.node(self.graph.placeholder("x"))
        self.side = self.node(call(self.graph, aten.cos.default, self.x))
        self.tensors: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    @staticmethod
    def node(node: fx.Node) -> fx.Node:
        return typed(node, "b", "s", WIDTH)

    def weight(self, *shape: int) -> fx.Node:
        # names in no order and without numbers
        name = "".join(random.Random(len(self.tensors)).choices("abcdefgh", k=12))
        self.tensors[name] = torch.randn(*shape, generator=self.generator) / 2
        return typed(self.graph.get_attr(name), *shape)

    def op(self, h: fx.Node, kind: str, layer: int) -> fx.Node:
        add = self.graph.call_function
        if kind == "linear":
            node = add(aten.linear.default, (h, self.weight(WIDTH, WIDTH)))
        elif kind == "norm":
            node = add(reroll.rms_norm.default, (h, self.weight(WIDTH), 1e-5))
        elif kind == "gelu":
            node = add(aten.gelu.default, (h,))
        elif kind == "tanh":
            node = add(aten.tanh.default, (h,))
        elif kind == "scale":
            node = add(aten.mul.Tensor, (h, 1.0 + layer / 8))
        elif kind == "mask":
            node = add(aten.mul.Tensor, (h, self.side))
        else:
            other = self.node(add(aten.sigmoid.default, (h,)))
            node = add(aten.mul.Tensor, (other, h))
        return self.node(node)

    def layer(self, h: fx.Node, kinds: list[str], number: int) -> fx.Node:
        inner = h
        for kind in kinds:
            inner = self.op(inner, kind, number)
        return self.node(call(self.graph, aten.add.Tensor, h, inner))

    def program(self, h: fx.Node) -> Program:
        self.graph.output((self.node(call(self.graph, aten.neg.default, h)),))
        weights = {
            name: Weight((Source(name, Meta(tuple(t.shape), F32)),))
            for name, t in self.tensors.items()
        }
        return Program(
            self.graph, {}, WeightTable(weights), MemorySource(self.tensors),
            (Input("x", TensorType(F32, ("b", "s", WIDTH))),), ("out",), F32, Origin("random"),
        )  # fmt: skip


KINDS = st.lists(OPS, min_size=5, max_size=9).map(lambda kinds: ["linear", *kinds])


@settings(max_examples=60)
@given(
    st.lists(KINDS, min_size=1, max_size=3),
    st.integers(2, 6),
    st.lists(KINDS, max_size=2),
    st.lists(KINDS, max_size=2),
)
def test_random_stacks_are_rolled_to_the_bit(period, depth, before, after):
    maker = Maker()
    h = maker.x
    for number, kinds in enumerate([*before, *(period * depth), *after]):
        h = maker.layer(h, kinds, number)
    program = maker.program(h)
    result = roll_loops(program)
    inputs = torch.randn(2, 3, WIDTH)
    assert torch.equal(outputs(result, inputs)[0], outputs(program, inputs)[0])
    assert result.parameters() == program.parameters()
    # at least the stretch that was written to repeat is inside loops
    inside = sum(loop.trips * len(calls(loop.body.graph)) for loop in result.loops)
    assert inside >= depth * sum(len(kinds) + 1 + kinds.count("gate") for kinds in period)


@settings(max_examples=30)
@given(st.lists(KINDS, min_size=2, max_size=5), st.data())
def test_random_graphs_of_layers_stay_right(layers, data):
    """Layers that read any value that there is, not only the last one's."""
    maker = Maker()
    values = [maker.x]
    for number, kinds in enumerate(layers * 2):
        inner = data.draw(st.sampled_from(values[-2:]))
        for kind in kinds:
            inner = maker.op(inner, kind, number)
        values.append(maker.node(call(maker.graph, aten.add.Tensor, values[-1], inner)))
    program = maker.program(values[-1])
    result = roll_loops(program)
    inputs = torch.randn(2, 3, WIDTH)
    assert torch.equal(outputs(result, inputs)[0], outputs(program, inputs)[0])
