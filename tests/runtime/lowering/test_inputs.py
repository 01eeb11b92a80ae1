"""Calls of lowered models as people make them: with inputs left out, broadcast, or unknown."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import reroll
from reroll.errors import UsageError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.tolerances import relative_rms
from reroll.rewrite.ir.records import TensorType
from reroll.runtime.lowering.lower import lower
from tests import captured
from tests.tiny import types as tiny_types

pytestmark = pytest.mark.usefixtures("captured_once")

ROWS, LENGTH, PAD = 3, 9, 1
IDS = torch.randint(3, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
LEFT = (torch.arange(LENGTH) >= torch.tensor([[3], [0], [1]])).long()
RIGHT = LEFT.flip(1)

DECODERS = ("llama", "gpt2", "bloom", "opt", "roberta_decoder")
ENCODERS = ("bert", "xlm_roberta")


@cache
def lowered(name: str):
    return lower(captured.captured(name))


def padded(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": IDS.masked_fill(mask == 0, PAD), "attention_mask": mask}


CALLS = {
    "ids": {"input_ids": IDS},
    "ids with padding tokens": {"input_ids": padded(RIGHT)["input_ids"]},
    "padded on the left": padded(LEFT),
    "padded on the right": padded(RIGHT),
    "one row of positions": {"input_ids": IDS, "position_ids": torch.arange(2, 2 + LENGTH)[None]},
    "positions": {**padded(LEFT), "position_ids": (LEFT.cumsum(-1) - 1).clamp(min=0)},
}


def check(name: str, inputs: dict[str, Tensor], shown: Tensor | None = None) -> None:
    with torch.no_grad():
        expected = captured.model(name)(**inputs)[0]
        actual = lowered(name)(**inputs)[0]
    if shown is not None:
        expected, actual = expected[shown.bool()], actual[shown.bool()]
    assert relative_rms(actual, expected) < tolerances.forward(torch.float32)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_calls_that_leave_inputs_out(name, call):
    inputs = CALLS[call]
    if name == "bloom" and "position_ids" in inputs:
        with pytest.raises(UsageError, match="no input position_ids"):
            lowered(name)(**inputs)
        return
    check(name, inputs, inputs.get("attention_mask"))


@pytest.mark.parametrize("name", ["opt", "roberta_decoder"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_go_on_from_the_past(name, masked):
    outputs = []
    for model in (captured.model(name), lowered(name)):
        logits, past, start = [], None, 0
        with torch.no_grad():
            for end in (4, 7, 8, 9):
                inputs = {"input_ids": padded(LEFT)["input_ids"] if masked else IDS}
                inputs = {"input_ids": inputs["input_ids"][:, start:end]}
                if masked:
                    inputs["attention_mask"] = LEFT[:, :end]
                out = model(**inputs, past_key_values=past, use_cache=True)
                logits.append(out.logits)
                past, start = out.past_key_values, end
        outputs.append(torch.cat(logits, 1)[LEFT.bool()])
    assert relative_rms(outputs[1], outputs[0]) < tolerances.forward(torch.float32)


@pytest.mark.parametrize(
    ("name", "cache"), [("opt", None), ("opt", "static"), ("roberta_decoder", None)]
)
def test_generation_pads_as_the_original(name, cache):
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    expected, actual = (
        model.generate(**padded(LEFT), pad_token_id=PAD, eos_token_id=None, **options)
        for model in (captured.model(name), lowered(name))
    )
    assert torch.equal(actual, expected)


def test_sentence_pairs_with_positions():
    types = (torch.arange(LENGTH) > 4).long().expand(ROWS, -1)
    check("bert", {**padded(RIGHT), "token_type_ids": types}, RIGHT)
    positions = torch.arange(LENGTH).flip(0)[None]
    check("bert", {"input_ids": IDS, "token_type_ids": types, "position_ids": positions})


# Gemma 3 scales them in the module that looks them up
@pytest.mark.parametrize("name", ["bert", "xlm_roberta", "roberta_decoder", "gemma3"])
def test_embeddings_in_the_place_of_tokens(name):
    tokens = padded(RIGHT)["input_ids"]
    embeddings = captured.model(name).get_input_embeddings()(tokens).detach()
    assert torch.equal(lowered(name).get_input_embeddings()(tokens), embeddings)
    check(name, {"inputs_embeds": embeddings})
    check(name, {"inputs_embeds": embeddings, "attention_mask": RIGHT}, RIGHT)


def test_tokens_that_are_computed_are_scaled_once():
    program = captured.captured("gemma3").edit()
    lookup = next(n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default)
    with program.graph.inserting_before(lookup):
        ids = program.graph.call_function(torch.ops.aten.clamp.default, (lookup.args[1], 0))
        ids.meta.update(lookup.args[1].meta)
    lookup.update_arg(1, ids)
    with torch.no_grad():
        assert torch.equal(lower(program)(IDS).logits, lowered("gemma3")(IDS).logits)


def test_embeddings_are_not_taken_where_the_scale_of_a_table_is_not_seen():
    program = captured.captured("gpt2")
    program = replace(program, origin=replace(program.origin, scales_embeddings=True))
    with pytest.raises(UsageError, match="embeddings for this model"):
        lower(program)(inputs_embeds=torch.zeros(ROWS, LENGTH, 32))


def test_embeddings_do_not_stand_for_tokens_that_are_compared():
    program = captured.captured("gpt2").edit()
    ids = next(n for n in program.graph.nodes if n.target == "input_ids")
    lookup = next(n for n in program.graph.nodes if n.target is torch.ops.aten.embedding.default)
    with program.graph.inserting_after(lookup):
        scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (lookup, 1.0))
        scaled.meta.update(lookup.meta)
    lookup.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    with program.graph.inserting_before(scaled):
        absent = program.graph.call_function(torch.ops.aten.ne.Scalar, (ids, 5))
        column = program.graph.call_function(torch.ops.aten.unsqueeze.default, (absent, -1))
        for node, shape in ((absent, ("b", "s")), (column, ("b", "s", 1))):
            node.meta["type"] = TensorType(torch.bool, shape)
    scaled.update_arg(1, column)
    with pytest.raises(UsageError, match="embeddings for this model"):
        lower(program)(inputs_embeds=torch.zeros(ROWS, LENGTH, 32))


def test_tokens_that_are_made_of_tokens_do_not_follow_from_embeddings():
    embeddings = torch.zeros(ROWS, LENGTH, 32)
    with pytest.raises(UsageError, match="decoder_input_ids is missing"):
        lowered("bart")(inputs_embeds=embeddings)
    check("bart", {"input_ids": IDS})


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_masks_of_four_dimensions_are_used_as_they_are(name):
    at = torch.arange(LENGTH)
    seen = at[:, None] // 4 == at // 4
    if name != "bert":
        seen = seen & (at <= at[:, None])
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(ROWS, 1, -1, -1)
    check(name, {"input_ids": IDS, "attention_mask": mask})


def test_positions_from_a_mask_need_one_of_two_dimensions():
    mask = torch.zeros(ROWS, 1, LENGTH, LENGTH)
    with pytest.raises(UsageError, match="position_ids is missing"):
        lowered("opt")(IDS, attention_mask=mask)


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_names_that_the_model_does_not_read_are_refused(name):
    with pytest.raises(UsageError, match="no input pixel_values"):
        lowered(name)(IDS, pixel_values=torch.zeros(1))
    assert lowered(name)(IDS, use_cache=False, num_items_in_batch=3)[0].isfinite().all()


def test_token_types_that_a_model_adds_are_not_ignored():
    # GPT-2 looks types up among its tokens, also those of type 0
    with pytest.raises(UsageError, match="no input token_type_ids"):
        lowered("gpt2")(IDS, token_type_ids=torch.zeros_like(IDS))


def test_a_mask_of_four_dimensions_tells_how_many_tokens_there_are():
    # Llama 4 scales its queries by positions that it counts from the mask's length
    model = tiny_types.build("llama4_text")
    seen = torch.ones(LENGTH, LENGTH).tril().bool()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min).expand(ROWS, 1, -1, -1)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        actual = reroll.capture(model).to_module()(IDS, attention_mask=mask).logits
    torch.testing.assert_close(actual, expected)


def test_positions_for_another_number_of_tokens_are_named():
    with pytest.raises(UsageError, match=f"there are 3 positions for {LENGTH} tokens"):
        lowered("llama")(IDS, position_ids=torch.arange(3)[None])


@pytest.mark.parametrize(
    ("name", "hidden"), [("llama", 0), ("llama", 1), ("gemma3", 0), ("gemma3", 1), ("bert", 0)]
)
def test_what_is_behind_the_end_of_a_mask_is_hidden(name, hidden):
    mask = torch.ones(ROWS, LENGTH - 2, dtype=torch.long)
    mask[0, :hidden] = 0
    check(name, {"input_ids": IDS, "attention_mask": mask})


def test_tokens_are_whole_numbers():
    with pytest.raises(UsageError, match=r"input_ids are whole numbers, not torch.float32"):
        lowered("llama")(torch.ones(1, 6))
