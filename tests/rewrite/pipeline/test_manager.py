from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from reroll.errors import PassError, ProgramError, UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.program_distance import MAX_TOKENS
from reroll.rewrite.analysis.samples import sample_text
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.compare import fingerprint, same
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.weights import build, scale
from reroll.rewrite.pipeline.base import Context, Pass, option
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured


class Nothing(Pass):
    """Changes nothing."""

    name = "nothing"
    contract = "exact"

    def run(self, program: Program, context: Context) -> Program:
        context.remark("nothing to do")
        return program


class Nudge(Pass):
    """Scales one weight."""

    name = "nudge"
    contract = "exact"
    factor: float = option(1.001, help="what to scale by")

    def run(self, program: Program, context: Context) -> Program:
        weight = program.weights["model.norm.weight"]
        changed = replace(weight, entries=(scale(weight.entries[0], self.factor),))
        return program.with_weights(program.weights.with_weight("model.norm.weight", changed))


class Shift(Nudge):
    """Scales one weight and says so."""

    name = "shift"
    contract = "approximate"


class Cut(Pass):
    """Gives a graph that uses a value before it is made."""

    name = "cut"

    def run(self, program: Program, context: Context) -> Program:
        nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        nodes[0].append(nodes[-1])
        return program


class Fail(Pass):
    """Fails in one of several ways."""

    name = "fail"
    how: str = option("", help="how")

    def run(self, program: Program, context: Context) -> Program:
        if self.how == "bug":
            return program.weights["none"]
        if self.how == "error":
            raise PassError("cannot be done", where="layer 3", hint="do something else")
        return self.how


class Look(Pass):
    """Looks at what a context has to offer."""

    name = "look"
    seen: ClassVar[list] = []

    def run(self, program: Program, context: Context) -> Program:
        tokens = context.tokens(program)
        generator = context.generator()
        self.seen.append((context.text, tokens, torch.rand(1, generator=generator).item()))
        context.progress(1, 2, "looking")
        return program


class After(Nothing):
    """Needs another pass before it."""

    name = "after"
    requires = ("nothing",)


@pytest.fixture(autouse=True)
def registered(passes):
    passes(Nothing, Nudge, Shift, Cut, Fail, Look, After)


def test_each_pass_leaves_a_step_and_a_line_of_log(caplog):
    caplog.set_level(logging.INFO)
    result = run_passes(captured("llama"), "nothing, shift(factor=1.5)")
    first, second = result.origin.steps
    assert (first.text, second.text) == ("nothing", "shift(factor=1.5)")
    assert first.remarks == ("nothing to do",)
    assert first.seconds >= 0
    assert first.measured["relative_rms_error"] == 0
    parameters = captured("llama").parameters()
    assert first.measured["parameters"] == {"before": parameters, "after": parameters}
    assert set(first.measured) >= {"bytes", "flops_per_token", "state_bytes"}
    lines = [r.getMessage() for r in caplog.records if r.name == "reroll.rewrite.pipeline.manager"]
    assert [line.partition(":")[0] for line in lines] == ["nothing", "shift(factor=1.5)"]
    assert "KL" in lines[1]


def test_steps_survive_text():
    result = run_passes(captured("llama"), "nothing, shift")
    assert parse(str(result)).origin.steps == result.origin.steps


def test_the_program_that_is_given_stays_as_it_was():
    program = captured("gpt2")
    before, text = fingerprint(program), str(program)
    run_passes(program, "fold_norms, tie(blocks=2), relax(rank=3)")
    assert (fingerprint(program), str(program)) == (before, text)


def test_an_exact_pass_that_is_not_is_an_error_with_the_number():
    with pytest.raises(PassError) as caught:
        run_passes(captured("llama"), "nudge(factor=1.001)")
    assert caught.value.where == "nudge"
    message = caught.value.message
    assert "claims to be exact" in message
    number = float(message.partition("relative RMS error of ")[2].split()[0])
    assert 0.9e-3 < number < 1.1e-3
    # a rounding error is no violation
    run_passes(captured("llama"), "nudge(factor=1.0000001)")


def test_exactness_of_half_precision_programs_is_checked_without_their_rounding():
    half = captured("llama", torch.bfloat16)
    assert run_passes(half, "nothing").origin.steps[-1].measured["relative_rms_error"] == 0
    with pytest.raises(PassError, match="claims to be exact"):
        run_passes(half, "nudge(factor=1.001)")
    run_passes(half, "nudge(factor=1.0000001)")


def test_exactness_is_checked_on_padded_input_too(passes):
    class Unmask(Pass):
        """Forgets the padding."""

        name = "unmask"
        contract = "exact"

        def run(self, program: Program, context: Context) -> Program:
            for node in program.loops[0].body.graph.nodes:
                if "attention" in str(node.target):
                    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "padding"}
            return program

    passes(Unmask)
    with pytest.raises(PassError, match="claims to be exact"):
        run_passes(captured("llama"), "unmask")


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("cut", "cut: the pass gave a malformed program"),
        ("fail(how=bug)", "fail(how=bug): the pass failed: KeyError: 'none'"),
        ("fail(how=error)", "fail(how=error): layer 3: cannot be done\n  hint: do something else"),
        ("fail", "fail: the pass returned str, not a Program"),
    ],
)
def test_failures_name_the_pass(pipeline, message):
    with pytest.raises(PassError) as caught:
        run_passes(captured("llama"), pipeline)
    assert str(caught.value).startswith(message)


def test_requirements_are_checked_before_anything_runs():
    seen = len(Look.seen)
    with pytest.raises(PassError, match=r"after needs nothing to have run before it"):
        run_passes(captured("llama"), "look, after")
    assert len(Look.seen) == seen
    run_passes(captured("llama"), "nothing, after")
    # what ran in an earlier call counts
    run_passes(run_passes(captured("llama"), "nothing"), "after")


def test_stopping_early():
    program = captured("llama")
    for stop, count in ((0, 0), (1, 1), (2, 2), ("nothing", 1), ("shift", 2), (None, 3)):
        result = run_passes(program, "nothing, shift, nothing", stop_after=stop, measure=False)
        assert len(result.origin.steps) == count
    for stop in (4, -1, "tie"):
        with pytest.raises(UsageError, match="the passes are nothing, shift"):
            run_passes(program, "nothing, shift", stop_after=stop)


@pytest.mark.parametrize(("word", "value"), [("off", False), ("on", True)])
def test_the_words_of_the_command_line_say_whether_to_measure(word, value):
    program = captured("llama")
    steps = [
        run_passes(program, "shift", measure=measure).origin.steps[-1] for measure in (word, value)
    ]
    assert steps[0].measured == steps[1].measured
    assert ("quality" in steps[0].measured) is value
    with pytest.raises(UsageError, match="measure must be"):
        run_passes(program, "shift", measure="of")


def test_events_tell_what_happens():
    events = []
    result = run_passes(
        captured("llama"), "look, nothing", on_event=events.append, print_after=("nothing",)
    )
    kinds = [(e.kind, e.text, e.number, e.count) for e in events if e.kind != "progress"]
    assert kinds == [
        ("start", "look", 1, 2), ("done", "look", 1, 2),
        ("start", "nothing", 2, 2), ("done", "nothing", 2, 2), ("print", "nothing", 2, 2),
    ]  # fmt: skip
    progress = [(e.done, e.total, e.what) for e in events if e.kind == "progress"]
    assert progress[0] == (1, 2, "looking")
    assert any(what == "measuring" for _, _, what in progress)
    assert events[-1].program is result
    assert events[-2].step is result.origin.steps[-1]


def test_printing_without_a_listener_goes_to_the_log(caplog):
    caplog.set_level(logging.INFO)
    run_passes(captured("llama"), "nothing", print_after="all")
    assert "body model.layers" in caplog.text


def letters(text: str) -> list[int]:
    return [ord(c) % 64 for c in text]


def test_a_pass_gets_text_tokens_and_a_seed(tmp_path):
    program = captured("llama")
    run_passes(program, "look", measure=False)
    text, tokens, number = Look.seen[-1]
    assert text == sample_text()
    assert tokens is None
    file = tmp_path / "text.txt"
    file.write_text("café")
    run_passes(program, "look, look", text=file, tokenizer=letters, measure=False, seed=3)
    text, tokens, other = Look.seen[-1]
    assert text == "café"
    assert tokens.tolist() == letters("café")
    assert other == Look.seen[-2][2] != number
    run_passes(program, "look", text="abc", tokenizer=letters, measure=False)
    assert Look.seen[-1][0] == "abc"


def test_quality_is_measured_against_the_program_before_and_the_original():
    program = captured("llama")
    ids = torch.tensor(letters(sample_text())[:MAX_TOKENS]).split(256)
    result = run_passes(program, "shift(factor=1.5), shift(factor=2.0)", tokenizer=letters)
    steps = [program, run_passes(program, "shift(factor=1.5)"), result]
    logits = [torch.cat([run(p, {"input_ids": i[None]})["logits"][0] for i in ids]) for p in steps]
    logs = [x.log_softmax(-1) for x in logits]
    for key, a in (("previous", 1), ("original", 0)):
        quality = result.origin.steps[-1].measured["quality"][key]
        assert quality["inputs"] == "text"
        assert quality["tokens"] == MAX_TOKENS
        kl = torch.nn.functional.kl_div(logs[2], logs[a], log_target=True, reduction="batchmean")
        assert quality["kl"] == pytest.approx(kl.item(), rel=1e-3)
        agreement = (logits[a].argmax(-1) == logits[2].argmax(-1)).float().mean().item()
        assert quality["top1_agreement"] == pytest.approx(agreement, abs=2e-3)
        rms = tolerances.relative_rms(logits[2], logits[a])
        assert quality["relative_rms_error"] == pytest.approx(rms, rel=0.05)
        for when, index in (("before", a), ("after", 2)):
            losses = [
                torch.nn.functional.cross_entropy(x[:-1], i[1:], reduction="none")
                for x, i in zip(logits[index].split(256), ids, strict=True)
            ]
            expected = torch.cat(losses).mean().exp().item()
            assert quality["perplexity"][when] == pytest.approx(expected, rel=1e-3)
    first = result.origin.steps[0].measured["quality"]
    assert first["previous"] == first["original"]


def test_without_a_tokenizer_random_tokens_serve():
    quality = run_passes(captured("llama"), "shift").origin.steps[-1].measured["quality"]
    assert quality["previous"]["inputs"] == "random tokens"
    assert quality["previous"]["kl"] > 0
    assert "perplexity" not in quality["previous"]


@pytest.mark.parametrize("name", ["bert", "dinov2", "whisper"])
def test_models_of_other_kinds_are_measured_too(name):
    result = run_passes(captured(name), "tie(blocks=2)")
    quality = result.origin.steps[-1].measured["quality"]["previous"]
    assert quality["relative_rms_error"] > 1e-3
    assert ("kl" in quality) == (name == "whisper")


def test_a_model_that_takes_few_tokens_is_measured_on_few_at_a_time():
    # a table of 64 positions
    step = run_passes(captured("gpt2"), "tie(blocks=2)", tokenizer=letters).origin.steps[-1]
    quality = step.measured["quality"]["previous"]
    assert (quality["inputs"], quality["tokens"]) == ("text", MAX_TOKENS)


def test_large_programs_are_looked_at_only_on_request():
    program, bound = captured("llama"), 1000
    result = run_passes(program, "nudge, shift", large=bound)
    for step, word in zip(result.origin.steps, ("checked", "measured"), strict=True):
        assert step.remarks[-1].startswith(f"not {word}: the weights are larger than")
        assert "quality" not in step.measured
        assert "relative_rms_error" not in step.measured
    with pytest.raises(PassError, match="claims to be exact"):
        run_passes(program, "nudge", large=bound, measure=True)
    step = run_passes(program, "shift", large=bound, measure=True).origin.steps[-1]
    assert step.measured["quality"]["previous"]["kl"] > 0


def test_a_large_original_is_not_computed_to_compare_with():
    program = captured("llama")
    bound = program.weights.bytes() - 1
    result = run_passes(program, "tie(blocks=1), shift", large=bound)
    assert result.weights.bytes() < bound
    for step in result.origin.steps:
        assert step.remarks[-1].startswith("not measured")


def test_measuring_can_be_left_out_but_not_the_check():
    step = run_passes(captured("llama"), "shift", measure=False).origin.steps[-1]
    assert "quality" not in step.measured
    assert step.remarks == ()
    with pytest.raises(PassError, match="claims to be exact"):
        run_passes(captured("llama"), "nudge", measure=False)


def test_no_passes_change_nothing():
    assert run_passes(captured("llama"), "") is captured("llama")
    assert same(run_passes(captured("llama"), "nothing"), captured("llama"))


def test_errors_of_the_pipeline_come_before_anything_runs():
    seen = len(Look.seen)
    with pytest.raises(UsageError, match="column 7"):
        run_passes(captured("llama"), "look, oops")
    assert len(Look.seen) == seen


def test_a_pass_that_makes_a_weight_of_the_wrong_shape_is_malformed(passes):
    class Widen(Pass):
        """Gives the final norm a weight of another shape."""

        name = "widen"

        def run(self, program: Program, context: Context) -> Program:
            weight = program.weights["model.norm.weight"]
            entry = build("concat", 0, *weight.entries, *weight.entries)
            changed = replace(weight, entries=(entry,))
            return program.with_weights(program.weights.with_weight("model.norm.weight", changed))

    passes(Widen)
    with pytest.raises((PassError, ProgramError), match=r"model.norm.weight|rms_norm"):
        run_passes(captured("llama"), "widen")


def test_the_sample_text_is_a_few_kilobytes_of_plain_english():
    text = sample_text()
    assert 4000 < len(text) < 10000
    assert text.isascii()
    assert text.startswith("It is a truth universally acknowledged")
