from __future__ import annotations

import math

import pytest
import torch

from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.verify import verify
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.pipeline import parse_pipeline
from tests.captured import captured, model
from tests.conformance.pass_suite import PassSuite, untyped

IDS = torch.arange(24).reshape(3, 8) + 3
CRITERIA = ["margin", "entropy", "patience", "saturation", "latent", "linear", "mlp", "gated"]
STATES = ["propagate", "defer", "skip"]
# what lets some tokens of `captured("llama")` leave and keeps others
THRESHOLDS = {
    "margin": 0.012, "entropy": 0.028, "patience": 0, "saturation": 0.83, "latent": -0.6,
}  # fmt: skip


class TestClosed(PassSuite):
    pipeline = "insert_exits(at=[1, 3])"

    # besides the outputs that there were, the depth of each token
    def test_it_runs_and_keeps_its_contract(self, before, under_test):
        after = self.apply(before, under_test)
        actual = run(after, {"input_ids": IDS})
        assert actual.pop("depth").eq(4).all()
        expected = run(before, {"input_ids": IDS})
        assert {n: t.equal(expected[n]) for n, t in actual.items()} == dict.fromkeys(expected, True)

    # the two best probabilities come as a pair
    def test_its_result_is_well_formed_and_prints(self, before, under_test):
        after = self.apply(before, under_test)
        verify(after)
        assert str(parse(str(after))) == str(after)
        assert untyped(after) <= untyped(before) | {"aten.topk.default"}


def exiting(options: str, name: str = "llama", passes: str = ""):
    return run_passes(captured(name), f"{passes}insert_exits({options})", measure=False)


def outputs(program, ids=IDS):
    return run(program, {"input_ids": ids})


def is_original(options: str, state: str, passes: str = "") -> None:
    program = exiting(f"at=[1, 2], state={state}, {options}", passes=passes)
    plain = captured("llama")
    if passes:
        plain = run_passes(plain, passes.rstrip(", "), measure=False)
    found, expected = outputs(program), outputs(plain)["logits"]
    assert found["depth"].eq(4).all()
    with torch.no_grad():
        lowered, same = program.to_module()(IDS).logits, plain.to_module()(IDS).logits
    # keys that say who is there have one more channel, so that sums round differently
    bound = tolerances.forward(torch.float32) if state == "skip" else 0.0
    for actual, reference in ((found["logits"], expected), (lowered, same)):
        assert tolerances.relative_rms(actual, reference) <= bound


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("state", STATES)
def test_an_infinite_threshold_is_the_original(criterion, state):
    is_original(f"criterion={criterion}", state)


@pytest.mark.parametrize("head", ["norm", "own"])
@pytest.mark.parametrize("state", STATES)
def test_heads_of_exits_start_as_the_models_own(head, state):
    is_original(f"criterion=margin, head={head}", state)


RECURRENT = ["linearize(mixer=gla, window=0), ", "linearize(mixer=gla, window=4, sinks=2), "]


@pytest.mark.parametrize("passes", [*RECURRENT, "tie(blocks=2), relax(rank=4), "])
@pytest.mark.parametrize("state", STATES)
def test_any_body_with_infinite_thresholds_is_as_it_was(passes, state):
    is_original("criterion=gated, head=norm", state, passes)


def lens(hidden):
    llama = model("llama")
    return llama.lm_head(llama.model.norm(hidden))


def scores(criterion, before, after):
    p = lens(after).softmax(-1)
    if criterion == "margin":
        top = p.topk(2).values
        return top[..., 0] - top[..., 1]
    if criterion == "entropy":
        return 1 + (p * p.log()).sum(-1) / math.log(p.shape[-1])
    if criterion == "saturation":
        return torch.cosine_similarity(before, after, dim=-1)
    return -(after - before).norm(dim=-1) / after.norm(dim=-1)


def by_hand(criterion, threshold, at, state="propagate"):
    """Layers one by one with transformers' own modules: logits and depths."""
    llama = model("llama")
    h = llama.model.embed_tokens(IDS)
    length = IDS.shape[1]
    rope = llama.model.rotary_emb(h, torch.arange(length).expand(len(IDS), -1))
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    done = torch.zeros(IDS.shape, dtype=torch.bool)
    depth = torch.zeros(IDS.shape, dtype=torch.long)
    kept, last, count = h, torch.zeros(IDS.shape, dtype=torch.long), torch.zeros(IDS.shape)
    for number, layer in enumerate(llama.model.layers, 1):
        hidden = done[:, None, None] * mask.min() if state == "skip" else 0
        out = layer(h, position_embeddings=rope, attention_mask=mask + hidden)
        depth += ~done
        held = torch.where(done[..., None], kept, out)
        if number in at:
            if criterion == "patience":
                token = lens(held).argmax(-1)
                count = torch.where(token == last, count + 1, 0)
                last, score = token, count
            else:
                score = scores(criterion, h, held)
            done = done | (score > threshold)
        kept, h = held, (out if state == "defer" else held)
    return lens(kept), depth


@pytest.mark.parametrize("criterion", THRESHOLDS)
@pytest.mark.parametrize("state", STATES)
def test_tokens_leave_when_their_score_says_so(criterion, state):
    threshold, at = THRESHOLDS[criterion], [1, 2, 3]
    if criterion in ("saturation", "latent") and state == "defer":
        pytest.skip("the change of a layer is that of the state that goes on")
    program = exiting(f"at={at}, criterion={criterion}, threshold={threshold}, state={state}")
    with torch.no_grad():
        logits, depth = by_hand(criterion, threshold, at, state)
    found = outputs(program)
    assert len(depth.unique()) > 1
    assert found["depth"].equal(depth)
    assert tolerances.relative_rms(found["logits"], logits) <= tolerances.forward(torch.float32)
    with torch.no_grad():
        lowered = program.to_module()(IDS)
    assert lowered.depth.equal(depth)
    assert tolerances.relative_rms(lowered.logits, logits) <= tolerances.forward(torch.float32)


SETTINGS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(
    ("name", "threshold"), [("llama", 0.015), ("gemma3", 0.01), ("gpt2", 0.025)]
)
@pytest.mark.parametrize("state", STATES)
def test_generation_gives_row_by_row_what_each_row_gives_alone(name, threshold, state, tmp_path):
    options = f"at=[1, 2, 3], threshold={threshold}, state={state}"
    program = exiting(options, name)
    lowered = program.to_module()
    ids = IDS % 40 + 3
    alone = [lowered.generate(row[None], use_cache=False, **SETTINGS)[0] for row in ids]
    for use_cache in (True, False):
        assert lowered.generate(ids, use_cache=use_cache, **SETTINGS).equal(torch.stack(alone))
    report = lowered.depth_report
    assert report.tokens == 3 * 12
    assert 1 < report.mean < 4
    program.save(tmp_path / "out")
    loaded = type(lowered).from_pretrained(tmp_path / "out")
    assert loaded.generate(ids, **SETTINGS).equal(torch.stack(alone))
    assert loaded.depth_report == report


@pytest.mark.parametrize(
    ("state", "passes"), [("propagate", ""), ("propagate", RECURRENT[0]), ("skip", RECURRENT[1])]
)
def test_rows_that_are_done_run_no_layer(state, passes, monkeypatch):
    lowered = exiting(f"at=[1], threshold=0.022, {state=!s}", passes=passes).to_module()
    rows, filled = [], []
    trips = lowered._assembly.loops["model.layers"].modules
    kind = type(trips[0])
    plain, fill = kind.plain, kind.fill
    monkeypatch.setattr(
        kind, "plain", lambda s, h, *a, **k: rows.append(h.shape[0]) or plain(s, h, *a, **k)
    )
    monkeypatch.setattr(
        kind, "fill", lambda s, h, *a, **k: filled.append(h.shape[0]) or fill(s, h, *a, **k)
    )
    lowered.generate(IDS, **SETTINGS)
    depths = lowered.depth_report.histogram
    # the prompt runs whole; after it every token costs its own depth
    assert sum(rows) - 4 * 3 <= sum(depth * count for depth, count in depths.items())
    assert sum(rows) + sum(filled) == 4 * 3 * 12
    assert 0 < sum(filled) < 3 * 3 * 11


@pytest.mark.parametrize("tie", ["tie(blocks=2)", "tie(blocks=2), relax(rank=4)"])
def test_exits_of_a_tied_loop(tie):
    program = exiting("at=[2], threshold=0.006", passes=f"{tie}, ")
    found = outputs(program)
    assert set(found["depth"].unique().tolist()) == {2, 4}
    lowered = program.to_module()
    with torch.no_grad():
        assert lowered(IDS).depth.equal(found["depth"])
    after = run_passes(captured("llama"), "insert_exits(at=[2])", measure=False)
    both = run_passes(after, "tie(blocks=2)", measure=False)
    assert len(both.weights["model.layers.*.mlp.up_proj.weight"].entries) == 2


def test_classifiers_have_one_set_of_weights_for_each_exit():
    program = exiting("at=[1, 3], criterion=mlp, width=5")
    weights = program.weights
    assert weights["model.layers.*.exit.up.weight"].index == (0, 1, 1, 1)
    sizes = [w.elements() for n, w in weights.items() if ".exit." in n]
    assert sizes == [2 * 5 * 32, 2 * 5, 2]
    values = materialise(program)
    assert not values["model.layers.*.exit.up.weight", 0].equal(
        values["model.layers.*.exit.up.weight", 1]
    )
    half = outputs(exiting("at=[1, 3], criterion=linear, threshold=0.49"))
    assert half["depth"].eq(1).all()


def test_gradients_reach_the_layers_that_ran():
    lowered = exiting("at=[1], criterion=saturation, threshold=-2").to_module()
    lowered(IDS, labels=IDS).loss.backward()
    first, second = (lowered.model.layers.get_submodule(str(i)).mlp.up_proj for i in (0, 1))
    assert first.weight.grad.norm() > 0
    assert second.weight.grad is None or not second.weight.grad.any()


def test_an_encoder_can_exit_by_its_hidden_state():
    program = exiting("at=[1, 2], criterion=latent, threshold=-0.5", name="bert")
    assert "depth" in program.outputs
    with pytest.raises(PassError, match="no logits"):
        exiting("at=[1]", name="bert")


def test_what_a_closed_exit_costs():
    closed = exiting("at=[2]").origin.steps[-1].measured["flops_per_token"]
    assert closed["after"] == closed["before"]
    opened = exiting("at=[2], threshold=0.5").origin.steps[-1].measured["flops_per_token"]
    assert opened["after"] == opened["before"] + 2 * 64 * 32


def test_exits_that_cannot_be():
    for options in ("at=[]", "at=[0]", "at=[2, 1]", "at=[1, 2], threshold=[0.5]"):
        with pytest.raises(UsageError):
            parse_pipeline(f"insert_exits({options})")
    with pytest.raises(PassError, match="nobody leaves after 4"):
        exiting("at=[4]")
    with pytest.raises(PassError, match="has exits already"):
        run_passes(exiting("at=[1]"), "insert_exits(at=[2])", measure=False)
    with pytest.raises(PassError, match="another loop stands between"):
        exiting("at=[1], loop=model.layers_1", passes="loop_core(prelude=1, core=2, coda=1), ")


def test_absent_tokens_cost_nothing(monkeypatch):
    lowered = exiting("at=[1], criterion=saturation, threshold=0.75, state=skip").to_module()
    trips = lowered._assembly.loops["model.layers"].modules
    monkeypatch.setattr(type(trips[0]), "fill", None)
    lowered.generate(IDS, **SETTINGS)
    assert set(lowered.depth_report.histogram) == {1, 4}


def test_a_body_that_keeps_nothing_has_nothing_to_skip():
    with pytest.raises(PassError, match="keeps nothing"):
        exiting("at=[1], criterion=latent, state=skip", "bert")


@pytest.mark.parametrize("passes", RECURRENT)
@pytest.mark.parametrize("criterion", ["saturation", "gated"])
@pytest.mark.parametrize("state", STATES)
def test_exits_of_a_body_with_recurrent_mixers(passes, criterion, state):
    threshold = {"saturation": 0.7, "gated": 0.5}[criterion]
    options = f"at=[1, 2, 3], criterion={criterion}, threshold={threshold}, state={state}"
    lowered = scattered(exiting(options, passes=passes).to_module())
    alone = [lowered.generate(row[None], use_cache=False, **SETTINGS)[0] for row in IDS]
    assert lowered.generate(IDS, **SETTINGS).equal(torch.stack(alone))
    assert 1 < lowered.depth_report.mean < 4


def scattered(lowered):
    """A model whose classifiers say something, though nothing true."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lowered.named_parameters():
            if ".exit." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return lowered


def test_a_gated_classifier_sees_predecessors():
    options = "at=[2], threshold=0.5, criterion"
    for criterion, looks_back in (("gated", True), ("mlp", False)):
        # without attention, only the classifier can tell what stood before
        passes = "linearize(mixer=gla, layers=[0, 1, 2, 3]), "
        program = scattered(exiting(f"{options}={criterion}", passes=passes).to_module())
        for trip in program._assembly.loops["model.layers"].modules:
            trip.self_attn.o_proj.weight.data.zero_()
        found = outputs_of_scores(program.to_program())
        rows = IDS.clone()
        rows[:, 0] += 7
        other = outputs_of_scores(program.to_program(), rows)
        assert bool((found[:, -1] != other[:, -1]).any()) == looks_back


def outputs_of_scores(program, ids=IDS):
    seen = []

    def observe(name, trip, node, args, result):
        if trip == 1 and str(node.target) == "reroll.exit.default":
            seen.append(args[1])

    run(program, {"input_ids": ids}, observe=observe)
    return seen[0]


def test_each_exit_answers_with_its_own_head(tmp_path):
    lowered = exiting("at=[1, 2], criterion=saturation, threshold=0.7, head=own").to_module()
    with torch.no_grad():
        before = lowered(IDS)
        lowered.exits.get_submodule("2").lm_head.weight.mul_(3)
        lowered.exits.get_submodule("1").model.norm.weight.mul_(-1)
        after = lowered(IDS)
    assert after.depth.equal(before.depth)
    assert set(after.depth.unique().tolist()) == {1, 2, 4}
    factor = torch.ones(5).index_put((torch.tensor([1, 2]),), torch.tensor([-1.0, 3.0]))
    torch.testing.assert_close(after.logits, before.logits * factor[after.depth][..., None])
    # for decoding they are made for the last token only
    last = lowered(IDS, logits_to_keep=1).logits
    torch.testing.assert_close(last, after.logits[:, -1:])
    lowered.save_pretrained(tmp_path / "out")
    loaded = type(lowered).from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, after.logits)


def test_heads_of_exits_decide_and_answer():
    program = exiting("at=[1, 2], criterion=margin, threshold=0.012, head=own")
    sizes = {n: w.elements() for n, w in program.weights.items() if n.startswith("exits.")}
    assert sizes == {
        f"exits.{stop}.{name}": size
        for stop in (1, 2)
        for name, size in (("model.norm.weight", 32), ("lm_head.weight", 64 * 32))
    }
    lowered = program.to_module()
    with torch.no_grad():
        left = lowered(IDS).depth == 1
        lowered.exits.get_submodule("1").lm_head.weight.zero_()
        # a head that knows nothing is never sure
        after = lowered(IDS)
    assert left.any()
    assert not (after.depth == 1).any()


# a trip with an open exit is called twice: for its layer, and for the test of the exit
@pytest.mark.parametrize("reentrant", [True, False])
def test_open_exits_are_trained_with_gradient_checkpointing(reentrant):
    lowered = exiting(f"at=[1], threshold={THRESHOLDS['margin']}").to_module().train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            lowered.gradient_checkpointing_enable({"use_reentrant": reentrant})
        lowered.zero_grad()
        result = lowered(IDS, labels=IDS)
        assert result.depth.lt(4).any()
        assert result.depth.eq(4).any()
        result.loss.backward()
        grads.append({n: p.grad for n, p in lowered.named_parameters() if p.grad is not None})
        grads[-1] = {n: g.clone() for n, g in grads[-1].items()}
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0)
