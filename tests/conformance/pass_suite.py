"""What holds for every pass: inherit `PassSuite` and give a pipeline that runs the pass.

    class TestPrune(PassSuite):
        pipeline = "prune(keep=0.9)"

The last pass of the pipeline is the one under test; those before it prepare the program.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
import yaml

from reroll.errors import PassError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.samples import random_inputs
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.compare import fingerprint, same
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.verify import verify
from reroll.rewrite.pipeline.base import PASSES, Pass
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.pipeline import (
    parse_pipeline,
    parse_recipe,
    resolve,
    to_recipe,
    to_text,
)
from tests.captured import captured, flat


class PassSuite:
    """Tests of one pass."""

    pipeline: ClassVar[str]
    models: ClassVar[tuple[str, ...]] = ("llama", "gpt2")

    @pytest.fixture
    def under_test(self) -> Pass:
        return resolve(self.pipeline)[-1]

    @pytest.fixture(params=range(2))
    def before(self, request: pytest.FixtureRequest) -> Program:
        """The program that the pass under test gets."""
        return self.prepared(captured(self.models[request.param % len(self.models)]))

    def prepared(self, program: Program) -> Program:
        return run_passes(program, list(resolve(self.pipeline)[:-1]), measure=False)

    def apply(self, program: Program, each: Pass, **options: Any) -> Program:
        return run_passes(program, [each], **{"measure": False, **options})

    # ---- the declaration

    def test_it_documents_itself(self, under_test: Pass) -> None:
        summary = under_test.summary()
        assert summary.endswith(".")
        assert len(summary) < 100
        assert under_test.contract in ("exact", "approximate")
        for each in under_test.options().values():
            assert each.help, f"{each.name} has no help"
        json.dumps(under_test.describe())
        for name in under_test.requires:
            PASSES.find(name)

    def test_it_survives_text_and_recipes(self, under_test: Pass) -> None:
        assert parse_pipeline(to_text([under_test])) == (under_test,)
        assert parse_recipe(yaml.safe_load(to_recipe([under_test]))) == (under_test,)

    # ---- the result

    def test_it_leaves_what_it_is_given_alone(self, before: Program, under_test: Pass) -> None:
        kept = fingerprint(before), str(before)
        self.apply(before, under_test)
        assert (fingerprint(before), str(before)) == kept

    def test_its_result_is_well_formed_and_prints(self, before: Program, under_test: Pass) -> None:
        after = self.apply(before, under_test)
        verify(after)
        assert str(parse(str(after))) == str(after)
        # sizes and tuples have no type; everything else that a pass makes has one
        assert untyped(after) <= untyped(before)

    def test_it_repeats(self, before: Program, under_test: Pass) -> None:
        a, b = self.apply(before, under_test), self.apply(before, under_test)
        assert same(a, b)
        assert a.origin.steps[-1].remarks == b.origin.steps[-1].remarks

    def test_it_runs_and_keeps_its_contract(self, before: Program, under_test: Pass) -> None:
        after = self.apply(before, under_test)
        inputs = random_inputs(before, padded=True)
        expected, actual = run(before, inputs), run(after, inputs)
        assert list(expected) == list(actual)
        for name, value in expected.items():
            assert actual[name].shape == value.shape
            assert actual[name].isfinite().all()
            if under_test.contract == "exact":
                error = tolerances.relative_rms(actual[name], value)
                assert error <= tolerances.forward(before.dtype)

    def test_it_remarks_and_is_recorded(self, before: Program, under_test: Pass) -> None:
        step = self.apply(before, under_test).origin.steps[-1]
        assert step.text == str(under_test)
        assert step.remarks
        json.dumps(dict(step.measured))

    def test_its_weights_stay_lazy_and_in_their_dtype(self, under_test: Pass) -> None:
        before = self.prepared(captured(self.models[0], torch.bfloat16))
        after = self.apply(before, under_test)
        dtypes = {t.dtype for t in materialise(before).values()}
        assert {t.dtype for t in materialise(after).values()} <= dtypes
        assert after.weights.sources() <= before.weights.sources()
        inputs = random_inputs(before)
        assert all(t.isfinite().all() for t in run(after, inputs).values())

    def test_a_large_model_is_not_computed(self, under_test: Pass) -> None:
        before = self.prepared(captured(self.models[0]))
        after = self.apply(before, under_test, measure="auto", large=0)
        assert same(after, self.apply(before, under_test))

    def test_programs_without_loops_run_or_are_refused(self, under_test: Pass) -> None:
        try:
            after = run_passes(flat(self.models[0]), self.pipeline, measure=False)
        except PassError:
            return
        verify(after)


def untyped(program: Program) -> set[str]:
    """The ops of the nodes without a type."""
    return {
        str(node.target)
        for _, graph in program.graphs()
        for node in graph.nodes
        if node.op == "call_function" and "type" not in node.meta
    }
