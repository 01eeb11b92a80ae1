"""The pass `linearize` on models that are not causal: a sequence is read from both ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.errors import PassError
from reroll.mixers import make
from reroll.passes.linearize.attention_calls import Reach, attention_calls
from reroll.passes.linearize.half_lives import measure_starts
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.costs import state_bytes
from reroll.rewrite.analysis.layers import attention_layers
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.ops import bidirectional
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.manager import run_passes
from tests import tiny
from tests.captured import captured
from tests.conformance.pass_suite import PassSuite
from tests.passes.sequences import prompts

pytestmark = pytest.mark.usefixtures("captured_once")

NORMALISED = "linearize(mixer=linear, window=0, combine=joint)"
BESIDE = "linearize(window=3, sinks=1, gain=0.5, feature_map=softmax)"
JOINT = "linearize(window=3, sinks=1, gain=0.5, feature_map=hedgehog, combine=joint, keep=2)"
DELTA = "linearize(mixer=gated_deltanet, window=0, keep=[1])"
ALL = {"normalised": NORMALISED, "beside": BESIDE, "joint": JOINT, "delta": DELTA}


class TestLinearizeBothWays(PassSuite):
    pipeline = BESIDE
    models = ("bert", "vit")


class TestNormalisedLinearAttention(PassSuite):
    pipeline = NORMALISED
    models = ("bert", "dinov2")


def linear(name: str, text: str) -> Program:
    return run_passes(captured(name), text, measure=False)


def inputs_of(name: str) -> dict[str, Tensor]:
    """Random inputs: padded tokens, or pictures."""
    if name == "bert":
        ids = prompts()
        # encoders are padded on the right
        return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"].flip(1)}
    size = {"vit": 16, "dinov2": 28}[name]
    pictures = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pictures}


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", ["bert", "vit", "dinov2"])
@torch.no_grad()
def test_the_lowered_model_computes_the_same(name: str, text: str) -> None:
    program, inputs = linear(name, text), inputs_of(name)
    expected = run(program, inputs)["last_hidden_state"]
    assert expected.isfinite().all()
    found = program.to_module()(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
@torch.no_grad()
def test_padding_changes_nothing(text: str) -> None:
    model, inputs = linear("bert", text).to_module(), inputs_of("bert")
    together = model(**inputs).last_hidden_state
    alone = model(input_ids=inputs["input_ids"][1:, :19]).last_hidden_state
    torch.testing.assert_close(together[1:, :19], alone)


@pytest.mark.parametrize(("delay", "skip"), [(0, 0), (1, 0), (4, 2)])
def test_every_token_is_read_once(delay: int, skip: int) -> None:
    """Without decay: sums over all pairs at a distance of at least `delay`, written out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 12, 4, generator=generator) for h in (4, 2, 2))
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, 9:] = False
    options = '{"feature_map": "none", "normalise": false}'
    out = bidirectional(q, k, v, [], "linear", options, padding, delay, skip)
    at = torch.arange(12)
    read = ((at[:, None] - at).abs() >= delay) & (at >= skip) & padding[:, None, None]
    scores = q @ k.repeat_interleave(2, 1).mT
    expected = (scores * read) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("active", [True, False])
def test_its_gradient(active: bool) -> None:
    """Against two runs of the mixer itself, on the tokens and on the tokens turned round."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, h, 9, 4, generator=generator) for h in (4, 2, 2)]
    leaves.append(-torch.rand(1, 2, 9, generator=generator))
    q, k, v, gate = (x.requires_grad_() for x in leaves)
    out = bidirectional(q, k, v, [gate], "retention", "{}", None, 0, 0, active)
    mixer, last = make("retention"), torch.ones(1, 9)
    last[:, 0] = 0
    forth, _ = mixer.parallel(q, k, v, [gate])
    late = [x.flip(2).roll(1, 2) for x in (k, v, gate)]
    back, _ = mixer.parallel(q.flip(2), late[0], late[1], late[2:], padding=last)
    expected = forth + back.flip(1) if active else (forth * 0)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.square().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaves))


@torch.no_grad()
def test_normalised_linear_attention_by_its_formula() -> None:
    """Katharopoulos et al., 2020 (arXiv 2006.16236), equation 6: not causal."""
    program = linear("bert", NORMALISED)
    assert not attention_layers(program)
    seen: dict[str, Any] = {}

    def keep(name: str, trip: int | None, at: Any, args: tuple[Any, ...], out: Any) -> None:
        del name
        if at.target is torch.ops.reroll.bidirectional.default:
            seen.setdefault("in", args[:3])
        elif at.target is torch.ops.aten.div.Tensor:
            seen.setdefault("out", out)

    inputs = inputs_of("bert")
    run(program, inputs, observe=keep)
    q, k, v = seen["in"]
    weights = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    weights = weights * inputs["attention_mask"][:, None, None]
    expected = (weights / weights.sum(-1, keepdim=True)) @ v[..., :-1]
    torch.testing.assert_close(seen["out"], expected.transpose(1, 2))


def test_what_it_costs() -> None:
    program = linear("bert", DELTA)
    assert state_bytes(program, 1024) == 0


def test_look_back_in_both_directions() -> None:
    program, inputs = captured("bert"), {"input_ids": inputs_of("bert")["input_ids"]}
    layers, context = attention_layers(program), Context()
    (first, *_) = attention_calls(program, layers, [inputs], context)
    weights = (first.q @ first.k.mT * first.scale).softmax(-1)
    distance = (torch.arange(23)[:, None] - torch.arange(23)).abs()
    for window, near in ((0, 0), (5, 6)):
        starts = measure_starts(program, layers, [inputs], Reach(window, 0), context)
        far = weights * (distance >= near)
        expected = (far * (distance - near)).sum((0, 2, 3)) / far.sum((0, 2, 3))
        found = torch.tensor(starts[0].half_life)
        torch.testing.assert_close(found, expected.clamp(min=1), rtol=1e-3, atol=0)


def test_what_is_refused() -> None:
    with pytest.raises(PassError, match="both directions"):
        linear("bert", "linearize(mixer=linear, window=0)")


def test_calibrated_with_few_positions(tmp_path: Path) -> None:
    """The pieces of text are no longer than the model takes, also where layers are chosen by it."""
    made = tiny.save(tiny.bert(), tmp_path / "bert", tiny.tokenizer())
    program = capture(str(made))
    assert program.origin.positions == 128
    text = "linearize(window=8, feature_map=elu, gates=calibrated, samples=2, keep='auto:0.5')"
    after = run_passes(program, text, measure=False)
    assert any("bring back" in remark for remark in after.origin.steps[-1].remarks)


def test_slots_under_one_softmax_look_back_only(tmp_path: Path) -> None:
    made = tiny.save(tiny.bert(), tmp_path / "bert", tiny.tokenizer())
    text = (
        "linearize(mixer=gsa, mixer_options={slots: 8}, gates=clustered, window=8, combine=joint)"
    )
    with pytest.raises(PassError, match="divides each direction by a sum of its own"):
        run_passes(capture(str(made)), text, measure=False)
