"""Weight expressions: content addressing, shape rules, evaluation and its memory."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reroll.errors import CheckpointError, ProgramError
from reroll.rewrite.checkpoint import MemorySource
from reroll.rewrite.ir import weights as w
from tests.rewrite.ir.weight_strategies import SOURCES, expressions, tables

F32 = torch.float32


def leaf(name: str, *shape: int, dtype: torch.dtype = F32) -> w.Source:
    return w.Source(name, w.Meta(shape, dtype))


def evaluate_one(expr: w.Expr, tensors: dict[str, Tensor] = SOURCES) -> Tensor:
    table = w.WeightTable({"x": w.Weight((expr,))})
    [(name, entry, tensor)] = w.evaluate(table, MemorySource(tensors))
    assert (name, entry) == ("x", 0)
    return tensor


def naive(expr: w.Expr) -> Tensor:
    """The value of an expression by plain recursion, written apart from the library's."""
    if isinstance(expr, w.Source):
        return SOURCES[expr.name].to(expr.meta.dtype)
    assert isinstance(expr, w.Apply)
    args = [naive(a) if isinstance(a, w.Expr) else a for a in expr.args]
    raised = [a.float() if isinstance(a, Tensor) else a for a in args]
    functions = {
        "mean": lambda *xs: torch.stack(xs).sum(0) / len(xs),
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "scale": lambda x, c: x * c,
        "offset": lambda x, c: x + c,
        "centre": lambda x, dim: x - x.mean(dim, keepdim=True),
        "transpose": lambda x: x.T,
        "slice": lambda x, dim, start, stop: x.narrow(dim, start, stop - start),
        "concat": lambda dim, *xs: torch.cat(xs, dim),
        "cast": lambda x, name: x,
        "matvec": lambda a, b: (a * b).sum(1),
    }
    return functions[expr.op](*raised).to(expr.meta.dtype)


class TestExpressions:
    def test_equal_content_is_one_expression(self) -> None:
        a, b = (w.add(leaf("a", 2), leaf("b", 2)) for _ in range(2))
        assert a is not b
        assert a == b
        assert len({a, b, w.add(leaf("b", 2), leaf("a", 2))}) == 2
        assert copy.deepcopy(a) is a

    def test_constants_of_different_types_differ(self) -> None:
        a = leaf("a", 2)
        assert w.scale(a, 0.0) != w.scale(a, -0.0)
        assert w.scale(a, 2) == w.scale(a, 2.0)

    def test_shared_and_deep_trees_are_cheap(self) -> None:
        def tower() -> w.Expr:
            expr: w.Expr = leaf("a", 2)
            for _ in range(3000):
                expr = w.scale(w.add(expr, expr), 0.5)
            return expr

        expr = tower()
        assert expr == tower()
        assert torch.equal(evaluate_one(expr, {"a": torch.ones(2)}), torch.ones(2))
        assert w.expr_from_json(w.expr_to_json(expr)) == expr
        assert w.expr_from_text(w.expr_to_text(expr)) == expr

    def test_apply_checks_its_meta(self) -> None:
        with pytest.raises(ProgramError, match=r"add gives f32\[2\]"):
            w.Apply("add", (leaf("a", 2), leaf("b", 2)), w.Meta((3,), F32))

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda: w.add(leaf("a", 2), leaf("b", 3)), "do not broadcast"),
            (lambda: w.mean([leaf("a", 2), leaf("b", 1)]), "one shape"),
            (lambda: w.mean([]), "was given 0 arguments"),
            (lambda: w.transpose(leaf("a", 2)), "a matrix is needed"),
            (lambda: w.slice_(leaf("a", 2), 0, 1, 3), "not a range"),
            (lambda: w.slice_(leaf("a", 2), 1, 0, 1), "no dimension 1"),
            (lambda: w.concat(0, [leaf("a", 2, 3), leaf("b", 2, 4)]), "cannot be joined"),
            (lambda: w.matvec(leaf("a", 2, 3), leaf("b", 2)), "cannot multiply"),
            (lambda: w.reshape(leaf("a", 2, 3), (4,)), "cannot take the shape"),
            (lambda: w.svd_up(leaf("a", 2, 3), 0), "rank 0"),
            (lambda: w.svd_up(leaf("a", 2, 3), 1, "guess"), "unknown method"),
            (lambda: w.add(leaf("a", 2, dtype=torch.int64), leaf("b", 2)), "floating-point"),
            (lambda: w.scale(leaf("a", 2), float("nan")), "must be of type float"),
            (lambda: w.build("scale", leaf("a", 2), True), "must be of type float"),
            (lambda: w.build("exec", "print()"), "unknown weight function"),
            (lambda: w.zeros((2**20, 2**21), F32), "absurdly large"),
            (lambda: leaf("a", -1), "not a size"),
            (lambda: w.cast(leaf("a", 2), torch.complex64), "unknown dtype"),
        ],
    )
    def test_misuse_is_explained(self, wrong, message: str) -> None:
        with pytest.raises(ProgramError, match=message):
            wrong()


class TestTable:
    def test_counts_shared_entries_once(self) -> None:
        a, b = leaf("a", 4, 4), leaf("b", 4, 4)
        table = w.WeightTable(
            {
                "embed": w.Weight((a,)),
                "head": w.Weight((a,)),
                "layers.*.w": w.Weight((b, w.mean([a, b])), (0, 1, 0, 1)),
                "frozen": w.Weight((leaf("c", 2),), trainable=False),
            }
        )
        assert table.parameters() == 3 * 16
        assert table.bytes() == 4 * (3 * 16 + 2)
        assert table.sources() == {"a", "b", "c"}
        assert table["layers.*.w"].for_trip(2) == b
        assert table["layers.*.w"].trips == 4
        assert table["layers.*.w"].elements() == 32
        assert table.stored_name("layers.*.w", 1) == "layers.1.w"
        assert table.stored_name("head", 0) == "head"

    def test_an_entry_is_stored_under_the_first_trip_that_uses_it(self) -> None:
        a, b = leaf("a", 4, 4), leaf("b", 4, 4)
        table = w.WeightTable({"layers.*.w": w.Weight((a, b), (0, 0, 1, 1))})
        assert list(table.stored()) == ["layers.0.w", "layers.2.w"]

    def test_edits_leave_the_original_alone(self) -> None:
        table = w.WeightTable({"a": w.Weight((leaf("a", 2),)), "b": w.Weight((leaf("b", 2),))})
        changed = table.with_weight("a", w.Weight((leaf("c", 2),))).with_weights(
            {"d": w.Weight((leaf("d", 2),))}
        )
        assert list(changed) == ["a", "b", "d"]
        assert list(changed.without("a", "d")) == ["b"]
        assert table.sources() == {"a", "b"}
        with pytest.raises(ProgramError, match="no weight is called 'z'"):
            table.without("z")

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda: w.Weight(()),
            lambda: w.Weight((leaf("a", 2), leaf("b", 2))),
            lambda: w.Weight((leaf("a", 2), leaf("b", 3)), (0, 1)),
            lambda: w.Weight((leaf("a", 2), leaf("b", 2)), (0, 0)),
            lambda: w.Weight((leaf("a", 2),), (0, 1)),
            lambda: w.Weight((leaf("a", 2),), (-1, 0)),
            lambda: w.WeightTable({"a.*": w.Weight((leaf("a", 2),))}),
            lambda: w.WeightTable({"a": w.Weight((leaf("a", 2),), (0,))}),
            lambda: w.WeightTable(
                {"a.*": w.Weight((leaf("a", 2),), (0,)), "a.0": w.Weight((leaf("a", 2),))}
            ).stored(),
        ],
    )
    def test_invariants(self, wrong) -> None:
        with pytest.raises(ProgramError):
            wrong()


class TestEvaluation:
    @given(expressions())
    def test_equals_naive(self, expr: w.Expr) -> None:
        value, expected = evaluate_one(expr), naive(expr)
        assert value.dtype == expected.dtype
        assert w.meta_of(value) == expr.meta
        torch.testing.assert_close(value, expected)

    @given(tables())
    def test_every_entry_once(self, table: w.WeightTable) -> None:
        got = Counter((name, entry) for name, entry, _ in w.evaluate(table, MemorySource(SOURCES)))
        assert got == Counter(
            {(n, e): 1 for n, weight in table.items() for e in range(len(weight.entries))}
        )

    @given(tables())
    @settings(max_examples=30)
    def test_order_does_not_change_values(self, table: w.WeightTable) -> None:
        for name, entry, tensor in w.evaluate(table, MemorySource(SOURCES)):
            assert torch.equal(tensor, evaluate_one(table[name].entries[entry]))

    @given(tables())
    def test_no_two_results_share_memory(self, table: w.WeightTable) -> None:
        got = [t for _, _, t in w.evaluate(table, MemorySource(SOURCES)) if t.numel()]
        assert len({t.untyped_storage().data_ptr() for t in got}) == len(got)

    @pytest.mark.parametrize(
        "views",
        [
            lambda a: (a, w.reshape(a, (4, 1)), w.transpose(w.reshape(a, (4, 1)))),
            lambda a: (w.reshape(a, (2, 2)), w.reshape(a, (2, 2)), w.cast(a, torch.float64)),
            lambda a: (a, w.scale(a, 1.0), w.mean([a]), w.concat(0, [a]), w.slice_(a, 0, 0, 4)),
            lambda a: (a, w.build("cast", a, "f32"), w.copy(a, 0), w.copy(a, 1)),
            lambda a: (w.full((4,), 1.0, torch.float32),) * 3,
        ],
    )
    def test_writing_to_one_result_leaves_the_others(self, views) -> None:
        exprs = views(leaf("a", 4))
        table = w.WeightTable({str(i): w.Weight((e,)) for i, e in enumerate(exprs)})
        source = {"a": torch.arange(1.0, 5.0)}
        for name, _, tensor in w.evaluate(table, MemorySource(source)):
            assert torch.equal(tensor, evaluate_one(exprs[int(name)], source))
            tensor.zero_()

    def test_some_names(self) -> None:
        table = w.WeightTable({n: w.Weight((leaf(n, 2),)) for n in "abc"})
        source = MemorySource({"b": torch.ones(2)})
        assert [n for n, _, _ in w.evaluate(table, source, ["b"])] == ["b"]
        with pytest.raises(ProgramError, match="no weight is called 'z'"):
            w.evaluate(table, source, ["z"])

    @pytest.mark.parametrize("layers", [4, 32])
    def test_memory_does_not_grow_with_depth(self, layers: int) -> None:
        # one shared matrix and a residual of rank 1 for each of the layers that it replaces
        n = 64
        sources = [leaf(f"{i}", n, n) for i in range(layers)]
        shared = w.mean(sources)
        residuals = [w.sub(s, shared) for s in sources]
        table = w.WeightTable(
            {
                "*.w": w.Weight((shared,), (0,) * layers),
                "*.up": w.Weight(tuple(w.svd_up(r, 1) for r in residuals), range(layers)),
                "*.down": w.Weight(tuple(w.svd_down(r, 1) for r in residuals), range(layers)),
            }
        )
        tensors = {f"{i}": torch.full((n, n), float(i)) for i in range(layers)}
        source, loads, held = CountingSource(tensors), Counter(), []
        source.loads = loads
        for _ in w.evaluate(table, source, observe=held.append):
            pass
        matrix = n * n * 4
        assert max(held) <= 4 * matrix
        assert max(loads.values()) <= 2

    def test_a_missing_or_misshapen_source_is_named(self) -> None:
        table = w.WeightTable({"x": w.Weight((leaf("layers.0.w", 2),))})
        with pytest.raises(CheckpointError, match=r"nearest name is 'layers.1.w'"):
            list(w.evaluate(table, MemorySource({"layers.1.w": torch.ones(2)})))
        with pytest.raises(CheckpointError, match=r"layers.0.w: the tensor is f32\[3\]"):
            list(w.evaluate(table, MemorySource({"layers.0.w": torch.ones(3)})))
        with pytest.raises(CheckpointError, match="dtype"):
            list(w.evaluate(table, MemorySource({"layers.0.w": torch.ones(2).long()})))

    def test_a_source_may_ask_for_another_float(self) -> None:
        value = evaluate_one(leaf("a", 2, dtype=torch.bfloat16), {"a": torch.tensor([1.0, 0.1])})
        assert torch.equal(value, torch.tensor([1.0, 0.1]).bfloat16())

    def test_results_do_not_alias_the_source(self) -> None:
        tensor = torch.ones(2)
        evaluate_one(leaf("a", 2), {"a": tensor}).zero_()
        assert torch.equal(tensor, torch.ones(2))


class CountingSource(MemorySource):
    """Counts how often each tensor is read."""

    loads: Counter[str]

    def load(self, name: str) -> Tensor:
        self.loads[name] += 1
        return super().load(name)


class TestLowRank:
    @pytest.mark.parametrize("method", ["exact", "randomized"])
    @pytest.mark.parametrize("shape", [(12, 7), (7, 12), (300, 280)])
    def test_full_rank_restores(self, shape: tuple[int, int], method: str) -> None:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        up, down = factors(matrix, 10**6, method)
        assert up.shape == (shape[0], min(shape))
        assert down.shape == (min(shape), shape[1])
        assert relative_error(up @ down, matrix) < 1e-5

    @given(rank=st.integers(1, 20), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_error_is_the_tail_of_the_spectrum(self, rank: int, seed: int) -> None:
        matrix = torch.randn(20, 33, generator=torch.Generator().manual_seed(seed))
        up, down = factors(matrix, rank, "exact")
        tail = torch.linalg.svdvals(matrix.double())[rank:]
        error = (matrix.double() - up.double() @ down.double()).norm()
        assert abs(error - tail.norm()) < 1e-5 * matrix.norm()

    def test_randomized_is_near_exact_and_deterministic(self) -> None:
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.linalg.qr(torch.randn(n, 90, generator=generator)).Q for n in (150, 120))
        matrix = (u * torch.arange(1, 91.0).pow(-1)) @ v.T
        exact, near, again = (
            up @ down
            for up, down in (factors(matrix, 8, m) for m in ("exact", "randomized", "randomized"))
        )
        assert torch.equal(near, again)
        best = (matrix - exact).norm()
        assert (matrix - near).norm() < 1.001 * best
        # power iterations converge like (sigma_25 / sigma_8) ** 9 in the wanted subspace
        assert relative_error(near, exact) < 1e-3

    def test_factors_share_one_decomposition(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        svd = torch.linalg.svd
        monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
        factors(torch.randn(6, 5), 2, "exact")
        assert len(calls) == 1

    def test_the_callers_random_state_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        factors(torch.randn(60, 50, generator=torch.Generator()), 2, "randomized")
        assert torch.equal(before, torch.get_rng_state())


def factors(matrix: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor]:
    source = w.Source("m", w.meta_of(matrix))
    table = w.WeightTable(
        {
            "up": w.Weight((w.svd_up(source, rank, method),)),
            "down": w.Weight((w.svd_down(source, rank, method),)),
        }
    )
    values = {name: value for name, _, value in w.evaluate(table, MemorySource({"m": matrix}))}
    return values["up"], values["down"]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_weight_function_without_annotations_says_so() -> None:
    with pytest.raises(ProgramError, match=r"x, n of the weight function scaled.*annotat"):

        @w.weight_function(lambda x, n: x)
        def scaled(x, n):  # type: ignore[no-untyped-def]
            return x * n
