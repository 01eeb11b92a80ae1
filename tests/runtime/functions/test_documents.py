"""Packed rows: position ids that begin anew are separate documents where transformers says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import reroll
from reroll.errors import UsageError
from reroll.mixers.registry import registered
from reroll.rewrite.capture.export import capture
from tests.captured import SPECIAL, TEXT, captured, flat, model

pytestmark = pytest.mark.usefixtures("captured_once")

TIME = 16
# two documents in one row and three in the other
LENGTHS = ((9, 7), (4, 1, 11))


def rows() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, TIME), generator=torch.Generator().manual_seed(1))
    positions = [torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS]
    return {"input_ids": ids, "position_ids": torch.stack(positions)}


def alone(lowered: Any) -> Tensor:
    """Logits [rows, time, vocabulary] of each document in a row of its own."""
    out = []
    for ids, lengths in zip(rows()["input_ids"], LENGTHS, strict=True):
        parts = [lowered(part[None], use_cache=False).logits[0] for part in ids.split(lengths)]
        out.append(torch.cat(parts))
    return torch.stack(out)


def llama4() -> Any:
    config = transformers.Llama4TextConfig(
        **{**TEXT, "num_hidden_layers": 2}, **SPECIAL, intermediate_size=48,
        intermediate_size_mlp=48, num_key_value_heads=2, head_dim=8, attention_chunk_size=4,
        moe_layers=[], layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "llama4"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """An original, and the module lowered from its Program."""
    if request.param == "llama4":
        torch.manual_seed(0)
        original = llama4().eval()
        return original, capture(original).to_module()
    return model(request.param), captured(request.param).to_module()


@pytest.mark.parametrize(
    "call",
    [{"use_cache": False}, {}, {"use_cache": False, "attention_mask": torch.ones(2, TIME)}],
    ids=["no cache", "default", "mask"],
)
def test_rows_are_packed_where_the_original_has_them_so(
    pair: tuple[Any, Any], call: dict[str, Any]
) -> None:
    original, lowered = pair
    with torch.no_grad():
        torch.testing.assert_close(
            lowered(**rows(), **call).logits, original(**rows(), **call).logits
        )


def test_documents_are_as_they_are_alone(pair: tuple[Any, Any]) -> None:
    _, lowered = pair
    with torch.no_grad():
        packed = lowered(**rows(), use_cache=False).logits
        torch.testing.assert_close(packed, alone(lowered))
        whole = lowered(rows()["input_ids"], use_cache=False).logits
    assert (whole - packed).abs().max() > 1e-2


def test_a_document_may_begin_in_its_middle(pair: tuple[Any, Any]) -> None:
    """Chunks are counted by position, windows by distance."""
    original, lowered = pair
    inputs = rows()
    inputs["position_ids"] = inputs["position_ids"] + torch.tensor([[3], [5]])
    with torch.no_grad():
        expected = original(**inputs, use_cache=False).logits
        torch.testing.assert_close(lowered(**inputs, use_cache=False).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_packed_rows(checkpointing: bool) -> None:
    grads = []
    for made in (model("llama"), captured("llama").to_module()):
        made.train()
        if checkpointing:
            made.gradient_checkpointing_enable()
        inputs = {**rows(), "labels": rows()["input_ids"]}
        # transformers' Trainer, and checkpointing by itself, see to it that there is no cache
        made(**inputs, **({} if checkpointing else {"use_cache": False})).loss.backward()
        grads.append({n: p.grad.clone() for n, p in made.named_parameters()})
        made.zero_grad()
        made.gradient_checkpointing_disable()
        made.eval()
    assert grads[0].keys() == grads[1].keys()
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected)


PASSES = [
    "window(size=4)",
    "window(size=3, sinks=2)",
    *(f"linearize(mixer={name})" for name in sorted(registered())),
    "linearize(mixer=gla, window=3, sinks=2)",
    "linearize(mixer=deltanet, window=2)",
]


@pytest.mark.parametrize("text", PASSES)
def test_passes_keep_documents_apart(text: str) -> None:
    lowered = reroll.run_passes(captured("llama"), text, measure=False).to_module()
    with torch.no_grad():
        packed = lowered(**rows(), use_cache=False).logits
        torch.testing.assert_close(packed, alone(lowered), rtol=1e-4, atol=1e-4)


def test_written_out_attention_keeps_documents_apart() -> None:
    lowered = flat("llama").to_module()
    with torch.no_grad():
        expected = model("llama")(**rows(), use_cache=False).logits
        torch.testing.assert_close(lowered(**rows(), use_cache=False).logits, expected)


def test_masks_that_ignore_positions_pack_nothing() -> None:
    config = transformers.BertConfig(
        **{**TEXT, "num_hidden_layers": 2}, **SPECIAL, intermediate_size=48, is_decoder=True
    )
    torch.manual_seed(0)
    original = transformers.BertLMHeadModel(config).eval()
    program = capture(original)
    assert [i.role for i in program.inputs if i.name == "position_ids"] == ["offsets"]
    with torch.no_grad():
        expected = original(**rows(), use_cache=False).logits
        actual = program.to_module()(**rows(), use_cache=False).logits
        torch.testing.assert_close(actual, expected)


def test_a_convolution_over_packed_rows_is_refused() -> None:
    lowered = captured("lfm2").to_module()
    with pytest.raises(UsageError, match=r"short convolution, would mix the documents"):
        lowered(**rows(), use_cache=False)
    # one document is no packing, and a mask says that there is one
    positions = torch.arange(TIME).expand(2, -1)
    with torch.no_grad():
        whole = lowered(rows()["input_ids"], use_cache=False).logits
        same = lowered(rows()["input_ids"], position_ids=positions, use_cache=False).logits
    assert torch.equal(whole, same)


def test_positions_of_one_row_are_those_of_all() -> None:
    lowered = captured("llama").to_module()
    ids, positions = rows()["input_ids"], rows()["position_ids"][:1]
    with torch.no_grad():
        expected = lowered(ids, position_ids=positions.expand(2, -1), use_cache=False).logits
        actual = lowered(ids, position_ids=positions, use_cache=False).logits
    assert torch.equal(actual, expected)
