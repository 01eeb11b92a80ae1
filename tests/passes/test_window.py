"""The pass `window`: which tokens are seen, and a state that does not grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis import keeping
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.costs import state_bytes
from reroll.rewrite.analysis.layers import attention_layers
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import scale
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.selection import check_keep, choose, measured_part, ranges
from tests.captured import captured
from tests.conformance.pass_suite import PassSuite
from tests.passes.sequences import generate, in_parts, prompts


class TestWindow(PassSuite):
    pipeline = "window(size=5, sinks=2)"


class TestWindowInSomeLayers(PassSuite):
    pipeline = "window(size=4, sinks=0, keep=3)"
    models = ("gemma3", "llama")


def windowed(name: str, text: str = "window(size=5, sinks=2)") -> Program:
    return run_passes(captured(name), text, measure=False)


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3", "gpt2", "bloom"])
@torch.no_grad()
def test_any_split_of_a_sequence_is_the_whole(name: str) -> None:
    program, inputs = windowed(name), prompts()
    seen = inputs["attention_mask"].bool()
    expected = run(program, inputs)["logits"][seen]
    model = program.to_module()
    torch.testing.assert_close(model(**inputs, use_cache=False).logits[seen], expected)
    for splits in ([23], [1] * 23, [3, 1, 7, 12], [10] + [1] * 13):
        logits, cache = in_parts(model, inputs, splits)
        torch.testing.assert_close(logits[seen], expected)
        assert cache.layers[0].keys.shape[2] == 4
        assert cache.layers[0].first_keys.shape[2] == 2


def test_it_sees_the_first_tokens_and_the_last() -> None:
    """A token that is in no window and no sink, on any path, changes nothing."""
    program = run_passes(captured("llama"), "window(size=3, sinks=2)", measure=False)
    ids = prompts(1 + 1)["input_ids"][:1]
    reach = 4 * (3 - 1)
    logits = run(program, {"input_ids": ids})["logits"]
    for place, changes in ((2, False), (len(ids[0]) - 2 - reach, False), (0, True), (1, True)):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 64
        changed = run(program, {"input_ids": other})["logits"]
        assert torch.equal(changed[0, -1], logits[0, -1]) is not changes


def test_it_is_exact_while_the_text_fits_into_the_window() -> None:
    inputs = prompts(length=12)
    before = run(captured("llama"), inputs)["logits"]
    after = run(windowed("llama", "window(size=12, sinks=0)"), inputs)["logits"]
    assert torch.equal(before, after)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
@pytest.mark.parametrize("text", ["window(size=5, sinks=2)", "window(size=5, sinks=2, keep=2)"])
def test_generation(text: str, options: dict[str, Any]) -> None:
    model = windowed("llama", text).to_module()
    expected = generate(model, use_cache=False, **options)
    assert torch.equal(generate(model, **options), expected)
    assert torch.equal(generate(model, prefill_chunk_size=3, **options), expected)
    assert torch.equal(generate(model, cache_implementation="static", **options), expected)


@torch.no_grad()
def test_tokens_that_were_not_recorded_cannot_be_undone() -> None:
    model = windowed("llama").to_module()
    _, cache = in_parts(model, prompts(), [23])
    with pytest.raises(UsageError, match="cannot be undone"):
        cache.crop(-1)


def test_the_state_does_not_depend_on_the_context() -> None:
    program = windowed("llama", "window(size=16, sinks=4)")
    # 4 layers, keys and values, 20 tokens, 2 heads of 8, in fp32
    assert state_bytes(program, 1024) == 4 * 2 * 20 * 2 * 8 * 4
    assert state_bytes(program, 2**17) == state_bytes(program, 1024)


def test_layers_that_see_less_stay() -> None:
    program = windowed("gemma3", "window(size=8, sinks=2)")
    (layer,) = attention_layers(program)
    assert layer.values("window") == (8, 8, 8, 8)
    assert layer.values("prefix") == (None, 2, None, 2)
    with pytest.raises(PassError, match="sees further"):
        run_passes(program, "window(size=20)", measure=False)


def test_the_window_of_a_model_that_is_not_causal() -> None:
    program = windowed("bert")
    (layer,) = attention_layers(program)
    assert layer.values("causal") == (False,) * 4
    ids = prompts(length=20)["input_ids"]
    outputs = run(program, {"input_ids": ids})
    assert all(t.isfinite().all() for t in outputs.values())


class TestChoice:
    def test_numbers_and_periods(self) -> None:
        assert choose(6, "all", None, "x") == list(range(6))
        assert choose(6, [1, 2, 3], [2], "x") == [1, 3]
        assert choose(7, "all", 3, "x") == [0, 1, 3, 4, 6]

    @pytest.mark.parametrize("wrong", [{"layers": [9]}, {"keep": [-1]}, {"keep": 1}])
    def test_what_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(UsageError):
            choose(6, **{"layers": "all", "keep": None, "owner": "x", **wrong})

    def test_measured_parts(self) -> None:
        assert measured_part("auto:0.25") == measured_part(0.25) == 0.25
        assert measured_part(7) is None
        for wrong in ("auto", "auto:x", "0.25", 1.5):
            with pytest.raises(UsageError):
                check_keep(wrong, "x")

    def test_ranges(self) -> None:
        assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0-3, 7, 9-10"


def test_keeping_the_layers_that_matter_most() -> None:
    """With the output of one layer scaled up, that is the layer whose window matters."""
    program = captured("llama")
    name = "model.layers.*.self_attn.o_proj.weight"
    entries = list(program.weights[name].entries)
    entries[1] = scale(entries[1], 40.0)
    loud = program.with_weights(
        program.weights.with_weights({name: replace(program.weights[name], entries=tuple(entries))})
    )
    after = run_passes(loud, 'window(size=2, sinks=0, keep="auto:0.25")', measure=False)
    remarks = after.origin.steps[-1].remarks
    assert remarks[0].startswith(
        "KL on random tokens, and the same again, of each layer alone: 1: "
    )
    assert remarks[1].startswith("layers 1 stay (0 exchanged)")
    (layer,) = attention_layers(after)
    assert layer.values("window") == (2, None, 2, 2)


def test_layers_are_exchanged_if_that_is_better() -> None:
    """Two layers that matter only together: ranked apart, one of them is left out."""
    distances = {(0,): 5.0, (1,): 4.0, (2,): 1.0, (1, 2): 3.0, (0, 2): 2.0, (0, 1): 2.5}

    class Fixed(keeping._Distance):
        def __init__(self, *_: object) -> None:
            self.text = "text"

        def __call__(self, numbers: Any) -> float:
            return distances[tuple(sorted(numbers))]

    context = Context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "_Distance", Fixed)
        kept = keeping.keep_by_measure(
            captured("llama"), [0, 1, 2], 1 / 3, lambda numbers: numbers, context
        )
    assert kept == [1]
    assert "1 exchanged); KL of all: 2.0" in context.remarks[-1]
