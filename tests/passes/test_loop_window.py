from __future__ import annotations

import pytest
import torch

from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.pipeline import parse_pipeline
from tests.captured import captured, model
from tests.conformance.pass_suite import PassSuite

IDS = torch.arange(12).reshape(2, 6)


class TestEuler(PassSuite):
    pipeline = "loop_window(start=1, stop=3, steps=3)"
    models = ("llama", "gemma3")


class TestRungeKutta(PassSuite):
    pipeline = "loop_window(start=1, stop=2, steps=2, scheme=rk4)"
    models = ("gpt2", "dinov2")


def looped(options: str, name: str = "llama"):
    return run_passes(captured(name), f"loop_window({options})", measure=False)


def logits(program):
    return run(program, {"input_ids": IDS})["logits"]


def flow(window):
    """The layers of a transformers model with those of the window run by a function."""
    llama = model("llama").model
    h = llama.embed_tokens(IDS)
    positions = torch.arange(6).expand(2, -1)
    rope = llama.rotary_emb(h, positions)

    def layers(h, numbers):
        for number in numbers:
            h = llama.layers[number](h, position_embeddings=rope, attention_mask=MASK)
        return h

    h = layers(h, range(1))
    h = window(h, lambda x: layers(x, range(1, 3)))
    return model("llama").lm_head(llama.norm(layers(h, range(3, 4))))


MASK = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1)[None, None]


def euler(h, f, d):
    return h + d * (f(h) - h)


def midpoint(h, f, d):
    middle = h + d / 2 * (f(h) - h)
    return h + d * (f(middle) - middle)


def heun(h, f, d):
    a = f(h) - h
    b = f(h + d * a) - (h + d * a)
    return h + d * (a + b) / 2


def rk4(h, f, d):
    def slope(x):
        return f(x) - x

    a = slope(h)
    b = slope(h + d / 2 * a)
    c = slope(h + d / 2 * b)
    return h + d / 6 * (a + 2 * b + 2 * c + slope(h + d * c))


@pytest.mark.parametrize("scheme", [euler, midpoint, heun, rk4])
def test_a_window_makes_the_steps_of_its_scheme(scheme):
    def window(h, f):
        for _ in range(3):
            h = scheme(h, f, 1 / 3)
        return h

    with torch.no_grad():
        expected = flow(window)
    actual = logits(looped(f"start=1, stop=3, steps=3, scheme={scheme.__name__}"))
    assert tolerances.relative_rms(actual, expected) <= tolerances.forward(torch.float32)


def test_naive_repeats_the_window():
    with torch.no_grad():
        expected = flow(lambda h, f: f(f(h)))
    actual = logits(looped("start=1, stop=3, steps=2, scheme=naive"))
    assert tolerances.relative_rms(actual, expected) <= tolerances.forward(torch.float32)


@pytest.mark.parametrize("options", ["start=1, stop=3", "start=0, stop=4", "start=3, stop=4"])
def test_one_euler_step_is_the_original(options):
    assert logits(looped(f"{options}, steps=1")).equal(logits(captured("llama")))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("scheme", ["euler", "heun", "naive"])
def test_every_run_of_a_layer_has_its_own_cache(name, scheme, tmp_path):
    program = looped(f"start=1, stop=3, steps=2, scheme={scheme}", name)
    lowered = program.to_module()
    runs = {"euler": 6, "naive": 6, "heun": 10}[scheme]
    assert lowered.config.num_hidden_layers == runs
    ids = IDS + 3
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = lowered.generate(ids, use_cache=False, **settings)
    assert lowered.generate(ids, **settings).equal(expected)
    program.save(tmp_path / "out")
    loaded = type(lowered).from_pretrained(tmp_path / "out")
    assert loaded.generate(ids, **settings).equal(expected)


def test_it_needs_no_parameters():
    program = looped("start=0, stop=4, steps=5, scheme=midpoint")
    assert program.parameters() == captured("llama").parameters()
    assert program.origin.steps[-1].remarks == (
        "model.layers: layers 0 to 3 run 10 times (5 midpoint steps); 4 -> 40 layers run, with one "
        "cache each",
    )


def test_lists_are_searched():
    def tokenizer(text):
        return [ord(c) % 61 + 3 for c in text[:200]]

    options = "start=[0, 1, 2], stop=[2, 3], steps=[2, 3]"
    program = run_passes(captured("llama"), f"loop_window({options})", tokenizer=tokenizer)
    remark, chosen = program.origin.steps[-1].remarks
    # of 12 combinations, two would stop where they start
    assert remark.startswith("10 windows tried; perplexity ")
    best = remark.split("with ")[1].split(", perplexity")[0]
    start, stop, steps = (int(part.split("=")[1].split(" ")[0]) for part in best.split(", ")[:3])
    assert f"layers {start} to {stop - 1} run {steps} times" in chosen
    alone = run_passes(
        captured("llama"),
        f"loop_window(start={start}, stop={stop}, steps={steps})",
        tokenizer=tokenizer,
    )
    quality = alone.origin.steps[-1].measured["quality"]["original"]["perplexity"]
    assert f", {quality['after']:.4g} with {best}" in remark
    with pytest.raises(PassError, match="needs a model that predicts text"):
        run_passes(captured("llama"), f"loop_window({options})", measure=False)


def test_windows_that_are_none():
    for options in ("start=3, stop=3", "start=2, stop=1"):
        with pytest.raises(UsageError, match="no window"):
            parse_pipeline(f"loop_window({options})")
    with pytest.raises(UsageError, match="steps must be an integer, 1 or more"):
        parse_pipeline("loop_window(start=0, stop=2, steps=0)")
    with pytest.raises(PassError, match="4 trips, and the window stops at 5"):
        looped("start=1, stop=5")
    with pytest.raises(PassError, match="there is no loop encoder"):
        looped("start=1, stop=3, loop=encoder")
