"""The JSON and text forms of weights: exact round trips, readable folding, hostile input."""

from __future__ import annotations

import contextlib
import json
import random
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.errors import ProgramError
from reroll.rewrite.ir import weights as w
from reroll.rewrite.ir.weights.ranges import fold, indices_from_text, indices_to_text, unfold
from tests.rewrite.ir.weight_strategies import expressions, tables

BF16 = torch.bfloat16


def layer(number: int) -> w.Source:
    return w.Source(f"layers.{number}.w", w.Meta((8, 8), BF16))


def relaxed(layers: int, blocks: int) -> w.WeightTable:
    """Layers tied in a cycle to the average of their block, with low-rank residuals."""
    shared = tuple(w.mean([layer(i) for i in range(b, layers, blocks)]) for b in range(blocks))
    residuals = [w.sub(layer(i), shared[i % blocks]) for i in range(layers)]
    trips = tuple(range(layers))
    return w.WeightTable(
        {
            "layers.*.w": w.Weight(shared, tuple(i % blocks for i in trips)),
            "layers.*.up": w.Weight(tuple(w.svd_up(r, 4) for r in residuals), trips),
            "layers.*.down": w.Weight(tuple(w.svd_down(r, 4) for r in residuals), trips),
        }
    )


class TestRoundTrip:
    @given(expressions())
    def test_expression(self, expr: w.Expr) -> None:
        assert w.expr_from_json(json.loads(json.dumps(w.expr_to_json(expr)))) == expr
        assert w.expr_from_text(w.expr_to_text(expr)) == expr

    @given(tables())
    def test_table(self, table: w.WeightTable) -> None:
        assert w.table_from_json(json.loads(json.dumps(w.table_to_json(table)))) == table
        assert w.table_from_text(w.table_to_text(table)) == table

    @given(st.text(min_size=1), st.lists(st.integers(0, 99), max_size=3))
    def test_any_source_name(self, name: str, shape: list[int]) -> None:
        expr = w.Source(name, w.Meta(tuple(shape), torch.int64))
        assert w.expr_from_text(w.expr_to_text(expr)) == expr
        assert w.expr_from_json(w.expr_to_json(expr)) == expr

    @given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**40), 2**40))
    def test_any_number(self, number: float, integer: int) -> None:
        x = w.Source("x", w.Meta((2,), torch.float32))
        for expr in (w.scale(x, number), w.scale(x, float(integer))):
            assert w.expr_from_text(w.expr_to_text(expr)) == expr
            assert w.expr_from_json(json.loads(json.dumps(w.expr_to_json(expr)))) == expr

    @given(st.lists(st.text("a0179.-", max_size=6), max_size=8))
    def test_folding(self, texts: list[str]) -> None:
        assert [t for folded in fold(texts) for t in unfold(folded)] == texts

    @given(st.lists(st.integers(0, 5), max_size=12))
    def test_indices(self, values: list[int]) -> None:
        assert indices_from_text(indices_to_text(values)) == tuple(values)

    @pytest.mark.parametrize(("layers", "blocks"), [(6, 1), (6, 2), (12, 4)])
    def test_relaxed(self, layers: int, blocks: int) -> None:
        table = relaxed(layers, blocks)
        assert w.table_from_text(w.table_to_text(table)) == table
        assert w.table_from_json(w.table_to_json(table)) == table


class TestReadable:
    def test_plain_stack(self) -> None:
        table = w.WeightTable(
            {
                "embed.weight": w.Weight((w.Source("embed", w.Meta((5, 8), BF16)),), None, False),
                "layers.*.w": w.Weight(tuple(map(layer, range(30))), tuple(range(30))),
                "layers.*.tied": w.Weight((layer(0), layer(1)), (0, 0, 0, 1, 1, 1)),
            }
        )
        assert w.table_to_text(table) == (
            'weight embed.weight : bf16[5, 8] = source("embed", bf16[5, 8]) frozen\n'
            "weight layers.*.w : bf16[8, 8] = "
            '[source("layers.{0..29}.w", bf16[8, 8])] trips [0..29]\n'
            "weight layers.*.tied : bf16[8, 8] = "
            '[source("layers.{0..1}.w", bf16[8, 8])] trips [0 x3, 1 x3]\n'
        )

    def test_shared_subtrees_are_let(self) -> None:
        assert w.table_to_text(relaxed(6, 1)) == (
            'let %0 = mean(source("layers.<0..5>.w", bf16[8, 8]))\n'
            'let %{1..6} = svd(sub(source("layers.{0..5}.w", bf16[8, 8]), %0), 4, "exact")\n'
            "weight layers.*.w : bf16[8, 8] = [%0] trips [0 x6]\n"
            "weight layers.*.up : bf16[8, 4] = [slice(%{1..6}, 0, 0, 8)] trips [0..5]\n"
            "weight layers.*.down : bf16[4, 8] = "
            "[transpose(slice(%{1..6}, 0, 8, 16))] trips [0..5]\n"
        )

    def test_size_does_not_grow_with_depth(self) -> None:
        few, many = (w.table_to_text(relaxed(4 * blocks, blocks)) for blocks in (3, 30))
        assert few.count("\n") == many.count("\n")

    def test_comments_and_blank_lines(self) -> None:
        text = w.table_to_text(relaxed(6, 2))
        assert w.table_from_text(f"# made by hand\n\n{text}") == relaxed(6, 2)


SOURCE = {"source": "a", "dtype": "f32", "shape": [2]}
WEIGHT = {"name": "a", "entries": [0], "index": None, "trainable": True}


class TestHostileJson:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, "object is needed"),
            ({}, "'nodes' is missing"),
            ({"nodes": 3, "weights": []}, "nodes: 3 is not of type list"),
            ({"nodes": [{"op": "add", "args": [{"node": 0}, {"node": 0}]}]}, "node 0 is not one"),
            ({"nodes": [SOURCE, {"op": "scale", "args": [{"node": 2}, 1.0]}]}, r"nodes\[1\]"),
            ({"nodes": [SOURCE, {"op": "scale", "args": [{"node": -1}, 1.0]}]}, "node -1"),
            ({"nodes": [SOURCE, {"op": "scale", "args": [{"node": True}, 1.0]}]}, "type int"),
            ({"nodes": [SOURCE, {"op": "scale", "args": [{"node": 0}, None]}]}, "argument"),
            ({"nodes": [SOURCE, {"op": "scale", "args": [{"node": 0}, 1e400]}]}, "type float"),
            ({"nodes": [SOURCE, {"op": "scale", "args": [{"node": 0}, 10**400]}]}, "type float"),
            ({"nodes": [{"op": "os.system", "args": ["true"]}]}, "unknown weight function"),
            ({"nodes": [{"op": ["add"], "args": []}]}, "not of type str"),
            ({"nodes": [{"op": "zeros", "args": [[2**41], "f32"]}]}, "absurdly large"),
            ({"nodes": [{"op": "zeros", "args": [[[[]]], "f32"]}]}, "not of type int"),
            ({"nodes": [{**SOURCE, "shape": [-1]}]}, "not a size"),
            ({"nodes": [{**SOURCE, "shape": [1] * 99}]}, "absurdly large"),
            ({"nodes": [{**SOURCE, "dtype": "f128"}]}, "unknown dtype 'f128'"),
            ({"nodes": [{**SOURCE, "source": ""}]}, "not a tensor name"),
            ({"nodes": [SOURCE], "weights": [WEIGHT, WEIGHT]}, r"weights\[1\]: there are two"),
            ({"nodes": [SOURCE], "weights": [{**WEIGHT, "entries": [1]}]}, "node 1"),
            ({"nodes": [SOURCE], "weights": [{**WEIGHT, "entries": []}]}, "at least one"),
            ({"nodes": [SOURCE], "weights": [{**WEIGHT, "index": [0]}]}, "not a name"),
            ({"nodes": [SOURCE], "weights": [{**WEIGHT, "trainable": 1}]}, "type bool"),
            (
                {"nodes": [SOURCE], "weights": [{**WEIGHT, "name": "a.*", "index": [0, 7]}]},
                r"index \[0, 7\]",
            ),
        ],
    )
    def test_is_refused(self, data: object, message: str) -> None:
        with pytest.raises(ProgramError, match=message):
            w.table_from_json(data)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(["nodes", "weights", "op", "args", "node", "source", "name"]),
                    inner,
                    max_size=4,
                )
            ),
        )
    )
    def test_any_json_is_read_or_refused(self, data: object) -> None:
        with contextlib.suppress(ProgramError):
            w.table_from_json(data)


class TestHostileText:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no expression"),
            ("add(" * 5000, "line 1: column 257: expressions may nest 64 deep"),
            ("[" * 5000, "integer|number"),
            ("%0", "line 1: column 1: %0 is not bound"),
            ("let %0 = %0\n%0", "%0 is not bound before its use"),
            ('let %0 = source("a", f32[2])\nlet %0 = source("a", f32[2])\n%0', "line 2.*twice"),
            ('source("a", f32[2]) extra', "column 21"),
            ('source("a", f32[2])\nsource("a", f32[2])', "line 2: nothing may follow"),
            ('source("a", f33[2])', "line 1: column 13: unknown dtype 'f33'"),
            ('source("a<0..3>", f32[2])', "not one expression"),
            ('source("a", f32[1099511627777])', "absurdly large"),
            (f'source("a", f32[{"9" * 5000}])', "needed"),
            ('add(source("a", f32[2]), source("b", f32[3]))', "column 1: add: shapes"),
            ('mean(source("a<0..99999999>", f32[2]))', "too long a range"),
            ('mean(source("a<0..3>.<0..4>", f32[2]))', "different lengths"),
            ('mean(source("a<0..3..2>", f32[2]))', "not a range"),
            ('__import__("os")', "unknown weight function '__import__'"),
            ('source("a\\q", f32[2])', "not a string"),
            ('source("a', "cannot be read"),
        ],
    )
    def test_expression_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(ProgramError, match=message):
            w.expr_from_text(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("weigh a", "not a let or weight line"),
            ('weight a : f32[3] = source("a", f32[2])', "declared f32"),
            ('weight a : f32[2] = [source("a", f32[2])', "not closed"),
            ('weight a.* : f32[2] = [source("a", f32[2])]', "trips .* is missing"),
            ('weight a.* : f32[2] = [source("a", f32[2])] trips [0..99999999]', "possible number"),
            ('weight a.* : f32[2] = [source("a", f32[2])] trips [0 x99999999]', "possible number"),
            ('weight a.* : f32[2] = [source("a", f32[2])] trips [x]', "not a trip"),
            ('weight a.* : f32[2] = [source("a{0..65536}", f32[2])] trips [0]', "too long"),
            ('weight a : f32[2] = source("a", f32[2])\n' * 2, "line 2: there are two"),
            (
                f'weight a.* : f32[2] = [source("a{{0..65535}}{"b" * 9000}", f32[2])] trips [0]',
                "unfold to too much",
            ),
        ],
    )
    def test_table_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(ProgramError, match=message):
            w.table_from_text(text)

    @given(st.data())
    @settings(max_examples=200)
    def test_damaged_text_is_read_or_refused(self, data: st.DataObject) -> None:
        text = list(w.table_to_text(relaxed(6, 2)))
        generator = random.Random(data.draw(st.integers()))
        for _ in range(data.draw(st.integers(1, 5))):
            text[generator.randrange(len(text))] = generator.choice(string.printable)
        with contextlib.suppress(ProgramError):
            w.table_from_text("".join(text))
