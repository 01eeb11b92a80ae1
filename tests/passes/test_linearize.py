"""The pass `linearize`: what it computes, and that decoding computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reroll.errors import PassError, UsageError
from reroll.mixers import make
from reroll.passes.linearize.attention_calls import Reach, attention_calls, samples
from reroll.passes.linearize.half_lives import measure_starts
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.costs import state_bytes
from reroll.rewrite.analysis.layers import attention_layers
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.ops import recurrence
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.ir.weights import offset
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.selection import ranges
from reroll.runtime.functions.recurrences import recur
from tests import tiny
from tests.captured import captured
from tests.conformance.pass_suite import PassSuite
from tests.passes.sequences import generate, in_parts, prompts

pytestmark = pytest.mark.usefixtures("captured_once")

DISJOINT = "linearize(window=5, sinks=2, gain=0.5)"
HYBRID = "linearize(window=5, sinks=2, gain=0.5, keep=2, feature_map=hedgehog)"
LIGER = "linearize(window=5, sinks=0, combine=sum, gates=liger, rotary=false, feature_map=softmax)"
PURE = "linearize(window=0, keep=[1], layers=[0, 1, 3])"
JOINT = "linearize(window=5, sinks=2, gain=0.5, keep=3, combine=joint, feature_map=hedgehog)"
ALL = {"disjoint": DISJOINT, "hybrid": HYBRID, "liger": LIGER, "pure": PURE, "joint": JOINT}


class TestLinearize(PassSuite):
    pipeline = "linearize(window=6, sinks=2, gain=0.5, keep=3)"


class TestLinearizeAlone(PassSuite):
    pipeline = "linearize(window=0, feature_map=elu, gates=liger, rotary=false)"


def linear(name: str, text: str = DISJOINT) -> Program:
    return run_passes(captured(name), text, measure=False)


@pytest.mark.parametrize(
    ("options", "rotated"),
    [
        ("", True),
        ("feature_map=elu", False),
        ("mixer=linear", False),
        ("mixer=linear, mixer_options={feature_map: none}", True),
        ("feature_map=elu, rotary=true", True),
    ],
)
def test_a_feature_map_comes_before_the_rotary_embedding_by_default(
    options: str, rotated: bool
) -> None:
    said = {True: "rotary=true", False: "rotary=false"}
    plain = options.removesuffix(", rotary=true")
    found, wanted, other = (
        linear("llama", f"linearize({', '.join(filter(None, parts))})")
        for parts in ((options,), (plain, said[rotated]), (plain, said[not rotated]))
    )
    assert same(found, wanted)
    assert not same(found, other)


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
@torch.no_grad()
def test_any_split_of_a_sequence_is_the_whole(text: str) -> None:
    program, inputs = linear("llama", text), prompts()
    seen = inputs["attention_mask"].bool()
    expected = run(program, inputs)["logits"][seen]
    model = program.to_module()
    torch.testing.assert_close(model(**inputs, use_cache=False).logits[seen], expected)
    for splits in ([23], [1] * 23, [3, 1, 7, 12]):
        logits, _ = in_parts(model, inputs, splits)
        torch.testing.assert_close(logits[seen], expected)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "bloom"])
@torch.no_grad()
def test_architectures(name: str) -> None:
    program, inputs = linear(name), prompts()
    seen = inputs["attention_mask"].bool()
    expected = run(program, inputs)["logits"][seen]
    logits, _ = in_parts(program.to_module(), inputs, [9, 1, 1, 12])
    torch.testing.assert_close(logits[seen], expected)


@pytest.mark.parametrize("text", [DISJOINT, PURE], ids=["disjoint", "pure"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_generation(text: str, options: dict[str, Any]) -> None:
    model = linear("llama", text).to_module()
    expected = generate(model, use_cache=False, **options)
    assert torch.equal(generate(model, **options), expected)
    assert torch.equal(generate(model, prefill_chunk_size=3, **options), expected)


def test_a_model_without_attention_generates() -> None:
    program = linear("llama", "linearize(window=0)")
    assert not attention_layers(program)
    model = program.to_module()
    assert torch.equal(generate(model), generate(model, use_cache=False))
    assert torch.equal(generate(model, cache_implementation="static"), generate(model))


def test_at_gain_zero_it_is_the_window() -> None:
    inputs = prompts()
    window = run_passes(captured("llama"), "window(size=5, sinks=2)", measure=False)
    expected = run(window, inputs)["logits"]
    torch.testing.assert_close(
        run(linear("llama", "linearize(window=5, sinks=2)"), inputs)["logits"], expected
    )


def test_the_mixer_sees_what_the_window_does_not() -> None:
    """The op's delay and skip against a loop over tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 12, 4, generator=generator) for h in (4, 2, 2))
    gate = -torch.rand(2, 2, 12, generator=generator)
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[1, :3] = False
    out = recurrence(q, k, v, [gate], "retention", "{}", padding, 4, 2)
    mixer = make("retention")
    for row, first in ((0, 0), (1, 3)):
        for t in range(12):
            old = slice(first + 2, max(t - 4 + 1, first + 2))
            own = [x[row : row + 1, :, old] for x in (k, v, gate)]
            expected = torch.zeros(4, 4)
            if own[0].shape[2]:
                _, state = mixer.recur(q[row : row + 1, :, old], own[0], own[1], [own[2]])
                query = q[row, :, t].unflatten(0, (2, 2))
                expected = (query @ state[0][0]).flatten(0, 1) * 4**-0.5
            torch.testing.assert_close(out[row, t], expected)


def test_liger_by_its_formulas() -> None:
    """Both branches of one layer, written out: arXiv 2503.01496, equations 5 to 8."""
    program = linear("llama", LIGER)
    (layer,) = attention_layers(program)
    seen: dict[str, Tensor] = {}
    node = next(
        n for n in layer.node.graph.nodes if n.target is torch.ops.reroll.recurrence.default
    )

    def keep(name: str, trip: int | None, at: Any, args: tuple[Any, ...], out: Any) -> None:
        del name
        if at in (node, layer.node) and trip == 0:
            seen[at.name] = out
            if at is node:
                seen["q"], seen["k"], seen["v"] = args[:3]
                seen["gate"] = args[3][0]

    inputs = {"input_ids": prompts()["input_ids"]}
    run(program, inputs, observe=keep)
    q, k, v, gate = (seen[n] for n in ("q", "k", "v", "gate"))
    # feature maps of raw queries and keys, before rotary embedding, sum to one
    torch.testing.assert_close(q.sum(-1), torch.ones(q.shape[:-1]))
    state, outs = torch.zeros(2, 2, 8, 8), []
    for t in range(q.shape[2]):
        state = gate[:, :, t].exp()[..., None, None] * state
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t].unflatten(1, (2, 2)) @ state)
    expected = torch.stack(outs, 1).flatten(2, 3)
    torch.testing.assert_close(seen[node.name], expected)


def test_joint_normalisation_by_its_formula() -> None:
    """LoLCATs, arXiv 2410.10254, equation 6, one token at a time, without decay."""
    text = "linearize(mixer=linear, mixer_options={normalise: false}, window=4, sinks=0, gain=0.5, "
    program = linear("llama", text + "combine=joint, feature_map=softmax)")
    (layer,) = attention_layers(program)
    mixer = next(n for n in layer.node.graph.nodes if "recurrence" in str(n.target))
    seen: dict[str, Any] = {}

    def keep(name: str, trip: int | None, at: Any, args: tuple[Any, ...], out: Any) -> None:
        del name
        if trip == 0 and at is mixer:
            seen["features"] = args[:2]
        elif trip == 0 and at is layer.node:
            seen["attention"] = args[:4]
        elif trip == 0 and "flatten" in str(at.target):
            seen["out"] = args[0]

    run(program, {"input_ids": prompts()["input_ids"][:1]}, observe=keep)
    q, k, v, scale = seen["attention"]
    features = [x[0] for x in seen["features"]]
    q, k, v = q[0], k[0].repeat_interleave(2, 0), v[0].repeat_interleave(2, 0)
    phi_q, phi_k = features[0], features[1].repeat_interleave(2, 0)
    for t in range(q.shape[1]):
        start = max(t - 3, 0)
        scores = (k[:, start : t + 1] @ q[:, t, :, None])[..., 0] * scale
        near = (scores - scores.max(-1, keepdim=True).values).exp()
        far = 0.5 * (phi_k[:, :start] @ phi_q[:, t, :, None])[..., 0]
        top = (near[..., None] * v[:, start : t + 1]).sum(1) + (far[..., None] * v[:, :start]).sum(
            1
        )
        expected = top / (near.sum(-1) + far.sum(-1))[:, None]
        torch.testing.assert_close(seen["out"][0, t], expected)


def test_the_state_does_not_depend_on_the_context() -> None:
    program = linear("llama", "linearize(window=16, sinks=4)")
    window, state, waiting = 2 * 20 * 2 * 8 * 4, 2 * 8 * 8 * 4, 16 * 2 * (2 * 8 + 1) * 4
    assert state_bytes(program, 1024) == 4 * (window + state + waiting)
    assert state_bytes(program, 2**17) == state_bytes(program, 1024)
    cache = in_parts(program.to_module(), prompts(1, 60), [30, 1, 29])[1]
    held = sum(
        t.numel() * t.element_size()
        for layer in cache.layers
        for t in (
            [layer.keys, layer.values, layer.first_keys, layer.first_values]
            if hasattr(layer, "first_keys")
            else [*layer.recurrent_states.values(), *layer.waiting]
        )
    )
    # the window holds one token less than it sees, and which tokens write takes a byte each
    assert held == state_bytes(program, 60) - 4 * (2 * 2 * 8 * 4) + 4 * 16


def test_gradients_reach_every_new_weight() -> None:
    model = (
        linear("llama", "linearize(window=5, sinks=2, gain=0.5, feature_map=hedgehog)")
        .to_module()
        .train()
    )
    ids = prompts()["input_ids"]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    new = {n: g for n, g in grads[0].items() if ".mixer." in n}
    # what feeds a projection of zeros learns once that is not zero any more
    assert all(g.abs().max() > 0 for n, g in new.items() if "_down" not in n)
    assert {n.rpartition("mixer.")[2] for n in new} == {
        "gain", "q_features", "k_features", "log_decay_down.weight", "log_decay_up.weight",
        "log_decay_up.bias",
    }  # fmt: skip
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_saved_and_loaded(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    program = linear("llama", HYBRID)
    program.save(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(generate(loaded), generate(program.to_module()))


def test_no_feature_map_can_be_named() -> None:
    named, plain = (linear("llama", f"linearize({t})") for t in ("feature_map=none", ""))
    assert same(named, plain)


def test_it_composes_with_tying() -> None:
    program = linear("llama", f"{HYBRID}, tie(blocks=2), relax(rank=full)")
    expected = run(linear("llama", HYBRID), prompts())["logits"]
    torch.testing.assert_close(run(program, prompts())["logits"], expected)


def test_which_layers() -> None:
    program = linear("gemma3", "linearize(window=5, sinks=0)")
    assert "layers 1, 3 are" in program.origin.steps[-1].remarks[0]
    named = linear("gemma3", "linearize(window=5, sinks=0, layers=[0, 1])")
    (layer,) = attention_layers(named)
    assert layer.values("window") == (5, 5, 8, None)
    assert ranges([0, 1]) in named.origin.steps[-1].remarks[0]


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="no mixer"):
        linear("llama", "linearize(mixer=no_such)")
    with pytest.raises(UsageError, match="features that are not negative"):
        linear("llama", "linearize(combine=joint)")
    with pytest.raises(PassError, match="Liger has no gate"):
        linear("llama", "linearize(gates=liger-code)")


def test_gradients_of_the_op_with_and_without_a_delay() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, h, 9, 4, generator=generator) for h in (4, 2, 2)]
    leaves.append(-torch.rand(1, 2, 9, generator=generator))
    q, k, v, gate = (x.requires_grad_() for x in leaves)
    for delay, skip, active in ((0, 0, True), (3, 2, True), (3, 2, False)):
        out = recurrence(q, k, v, [gate], "retention", "{}", None, delay, skip, active)
        lowered = recur(None, 0, q, k, v, [gate], "retention", "{}", None, delay, skip, active)
        torch.testing.assert_close(out, lowered)
        if active:
            found = torch.autograd.grad(out.square().sum(), leaves)
            expected = torch.autograd.grad(lowered.square().sum(), leaves)
            torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A random model with a tokenizer, so that there is text to calibrate on."""
    made = tiny.save(tiny.llama(2), tmp_path_factory.mktemp("tiny"), tiny.tokenizer())
    return capture(str(made))


class TestCalibration:
    reach = Reach(window=16, sinks=4)

    def test_half_lives_and_gains_by_hand(self, with_text: Program) -> None:
        context = Context()
        inputs = samples(with_text, context, 1)
        assert inputs is not None
        layers = attention_layers(with_text)
        starts = measure_starts(with_text, layers, inputs, self.reach, context)
        (first, *_) = attention_calls(with_text, layers, inputs, context)
        q, k = first.q[0], first.k[0].repeat_interleave(2, 0)
        distance, mass = torch.zeros(4), torch.zeros(4)
        for t in range(q.shape[1]):
            weights = (q[:, t, None] @ k[:, : t + 1].mT * first.scale).softmax(-1)[:, 0]
            for s in range(4, t - 16 + 1):
                distance += weights[:, s] * (t - s - 16)
                mass += weights[:, s]
        expected = distance.unflatten(0, (2, 2)).sum(1) / mass.unflatten(0, (2, 2)).sum(1)
        torch.testing.assert_close(torch.tensor(starts[0].half_life), expected, rtol=1e-3, atol=0)

    def test_gains_are_least_squares(self, with_text: Program) -> None:
        """No other factor brings the first layer nearer to the original on the same text."""
        text = "linearize(window=16, gates=calibrated, feature_map=elu, samples=1, layers=[0])"
        after = run_passes(with_text, text, measure=False)
        assert "bring back" in after.origin.steps[-1].remarks[0]
        inputs = samples(with_text, Context(), 1)
        assert inputs is not None
        (weight,) = (n for n in after.weights if n.endswith("mixer.gain"))

        def error(change: float) -> float:
            entries = tuple(offset(e, change) for e in after.weights[weight].entries)
            moved = replace(after.weights[weight], entries=entries)
            program = after.with_weights(after.weights.with_weights({weight: moved}))
            outs: list[Tensor] = []

            def keep(name: str, trip: int | None, at: Any, args: Any, out: Any) -> None:
                # what the output projection is about to read
                if at.target is torch.ops.aten.flatten.using_ints and trip == 0:
                    outs.append(out)

            for each in (with_text, program):
                run(each, inputs[0], observe=keep)
            return float((outs[0] - outs[1]).square().sum())

        best = error(0.0)
        assert best < error(0.02)
        assert best < error(-0.02)

    def test_the_gain_of_a_joint_normalisation(self, with_text: Program) -> None:
        text = "linearize(window=16, gates=calibrated, feature_map=softmax, samples=1, "
        after = run_passes(with_text, text + "combine=joint)", measure=False)
        (name,) = (n for n in after.weights if n.endswith("mixer.gain"))
        found = after.origin.steps[-1].remarks[0]
        assert "bring back" in found
        gains = Context().compute(after, after.weights[name].entries)
        assert all(((g == 0) | (g >= 1e-3)).all() and (g <= 1e6).all() for g in gains)

    def test_without_text_it_says_so(self) -> None:
        plain = linear("llama", "linearize(window=5, gates=calibrated)")
        assert "no text" in plain.origin.steps[-1].remarks[0]
        expected = run(linear("llama", "linearize(window=5)"), prompts())["logits"]
        assert torch.equal(run(plain, prompts())["logits"], expected)

    def test_without_a_window(self, with_text: Program) -> None:
        text = "linearize(window=0, gates=calibrated, samples=1, keep=2)"
        after = run_passes(with_text, text, measure=False)
        model = after.to_module()
        ids = torch.randint(3, 64, (1, 20))
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            parts, _ = in_parts(
                model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [9, 1, 10]
            )
        torch.testing.assert_close(parts, whole)


def test_keeping_a_measured_part() -> None:
    after = linear("llama", 'linearize(window=3, sinks=0, gain=0.5, keep="auto:0.5")')
    ranking, kept, done, weights = after.origin.steps[-1].remarks
    assert weights.endswith("(output_attentions)")
    assert done.endswith("gates learned")
    assert ranking.startswith("KL on random tokens, and the same again, of each layer")
    (layer,) = attention_layers(after)
    assert layer.values("window").count(None) == 2
    assert kept.startswith("layers ")


@pytest.mark.parametrize("text", ["window(size=4, sinks=2)", "linearize(window=4, gain=0.5)"])
def test_the_decoder_of_an_encoder_decoder_model(text: str) -> None:
    model = linear("t5", text).to_module()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    wishes = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids, use_cache=False, **wishes)
    assert torch.equal(model.generate(input_ids=ids, **wishes), expected)
