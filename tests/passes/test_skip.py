from __future__ import annotations

import pytest
import torch

from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.layers import attention_layers
from reroll.rewrite.analysis.sublayers import find_layers
from reroll.rewrite.capture.rolling.split import select_trips
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.pipeline.manager import run_passes
from tests import captured
from tests.conformance.pass_suite import PassSuite

IDS = torch.arange(3, 15).reshape(2, 6)


class TestLayers(PassSuite):
    pipeline = "skip(layers=[1, 2])"
    models = ("llama", "lfm2")


class TestParts(PassSuite):
    pipeline = "skip(attention=[1], feed_forward=[2, 3])"
    models = ("gemma3", "gpt2")


class TestInfluence(PassSuite):
    pipeline = "skip(layers=2)"
    models = ("llama", "t5")


class TestAngular(PassSuite):
    pipeline = "skip(layers=2, choose=angular)"
    models = ("gpt2", "vit")


def skipped(options: str, name: str = "llama", flat: bool = False):
    program = captured.flat(name) if flat else captured.captured(name)
    return run_passes(program, f"skip({options})", measure=False)


def logits(program):
    return run(program, {"input_ids": IDS})["logits"]


def silenced(name: str, weights: list[str]) -> torch.Tensor:
    """The logits of the original with some matrices, which end its sublayers, set to zero."""
    model = captured.model(name).eval()
    kept = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for weight in weights:
            parameters = [p for n, p in model.named_parameters() if n.startswith(weight)]
            assert parameters
            for parameter in parameters:
                parameter.zero_()
        out = model(IDS).logits
        for n, p in model.named_parameters():
            p.copy_(kept[n])
    return out


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("llama", "layers=[0, 2]", ["0.self_attn.o", "0.mlp.down", "2.self_attn.o", "2.mlp.down"]),
        ("llama", "attention=[1, 3]", ["1.self_attn.o", "3.self_attn.o"]),
        ("llama", "feed_forward=[0, 1, 2, 3]", [f"{n}.mlp.down" for n in range(4)]),
        ("llama", "layers=[3], attention=[1]", ["3.self_attn.o", "3.mlp.down", "1.self_attn.o"]),
        ("gemma3", "feed_forward=[2]", ["2.post_feedforward_layernorm"]),
        ("gemma3", "attention=[1], layers=[2]",
         ["1.self_attn.o", "2.self_attn.o", "2.mlp.down"]),
        ("lfm2", "attention=[0, 1]", ["0.conv.out_proj", "1.self_attn.out_proj"]),
        ("lfm2", "layers=[1, 3]", ["1.self_attn.out", "1.feed_forward.w2", "3.conv.out",
                                   "3.feed_forward.w2"]),
        ("lfm2", "layers=[2, 3]", ["2.conv.out", "2.feed_forward.w2", "3.conv.out",
                                   "3.feed_forward.w2"]),
        ("gpt_neox", "attention=[1], feed_forward=[2]",
         ["1.attention.dense", "2.mlp.dense_4h_to_h"]),
    ],
)  # fmt: skip
def test_what_is_left_out_adds_nothing(name, options, weights, flat):
    prefix = "gpt_neox.layers." if name == "gpt_neox" else "model.layers."
    if name == "gemma3" and "post" in weights[0]:
        # its norm multiplies by 1 + weight
        weights = ["2.mlp.down_proj"]
    expected = silenced(name, [prefix + w for w in weights])
    program = skipped(options, name, flat)
    error = tolerances.relative_rms(logits(program), expected)
    assert error <= tolerances.forward(torch.float32)
    whole = captured.captured(name)
    assert program.parameters() < whole.parameters()


def test_layers_of_a_loop_are_a_shorter_list_of_trips():
    program = skipped("layers=[1, 2]")
    cut = captured.captured("llama").edit()
    cut, _ = select_trips(cut, cut.loops[0], [0, 3])
    assert str(program).split("origin {")[0] == str(cut.pruned()).split("origin {")[0]


def test_the_layers_with_the_least_influence_are_chosen():
    program = skipped("layers=1")
    every = [skipped(f"layers=[{n}]") for n in range(4)]
    remark = program.origin.steps[-1].remarks[-1]
    chosen = int(remark.removeprefix("layers ").split()[0])
    assert torch.equal(logits(program), logits(every[chosen]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom", "gpt_neox", "opt", "smollm3"])
@pytest.mark.parametrize("flat", [False, True])
def test_layers_are_counted_as_attentions_are(name, flat):
    program = captured.flat(name) if flat else captured.captured(name)
    layers = find_layers(program)
    attentions = attention_layers(program)
    assert len(layers) == sum(len(each.numbers) for each in attentions)
    kinds = {tuple((s.mixes, s.attends) for s in layer.sublayers) for layer in layers}
    # in the flat graph of BLOOM, attentions are written out
    expected = {((False, False), (True, True))} if attentions else set()
    assert {tuple(sorted(each)) for each in kinds} == expected
    assert bool(attentions) == (not flat or name != "bloom")


def test_a_decoder_s_layers_have_cross_attention():
    layers = find_layers(captured.captured("t5"))
    assert [len(layer.sublayers) for layer in layers] == [2, 2, 2, 3, 3, 3]
    # without the encoder's first layer and the feed-forward part of the decoder's last
    program = skipped("layers=[0], feed_forward=[5]", "t5")
    assert len(find_layers(program)) == 5


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2", "gpt2", "bloom"])
def test_it_generates_with_a_cache_what_it_gives_without(name, tmp_path):
    program = skipped("layers=[1], attention=[2], feed_forward=[0]", name)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    module = program.to_module()
    cached, alone = (module.generate(IDS, use_cache=c, **settings) for c in (True, False))
    assert torch.equal(cached, alone)


def test_what_cannot_be_left_out_is_said():
    with pytest.raises(UsageError, match="nothing is left out"):
        skipped("")
    with pytest.raises(PassError, match="no layer 4"):
        skipped("layers=[1, 4]")
    with pytest.raises(PassError, match="all layers"):
        skipped("layers=[0, 1, 2, 3]")
    with pytest.raises(PassError, match="4 layers cannot"):
        skipped("layers=4")
    with pytest.raises(PassError, match="by itself"):
        skipped("attention=[1]", "bert")
    with pytest.raises(PassError, match="carries"):
        run_passes(
            captured.captured("llama"), "insert_exits(at=[2]), skip(layers=[1])", measure=False
        )
