"""A Program with another number of tokens: the weights that change, the types, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from reroll.errors import UsageError
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.ir.verify import verify
from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime.lowering.vocabulary import new_rows, resized
from tests import captured, tiny

aten = torch.ops.aten
EXITS = "insert_exits(at=[2], criterion=margin, head=own)"


def logits(program: Program) -> fx.Node:
    output = next(iter(reversed(program.graph.nodes)))
    return output.args[0][program.outputs.index("logits")]  # type: ignore[index, union-attr]


@pytest.mark.parametrize("rows", [60, 70])
@pytest.mark.parametrize(
    ("name", "passes", "changed"),
    [
        ("llama", "", 1),
        ("qwen2", "tie(blocks=2)", 2),
        ("bart", "", 1),
        # the tied head, and that of the exit
        ("llama", EXITS, 2),
        # its tokens are those of the decoder
        ("whisper", "", 1),
    ],
)
def test_types_and_weights_follow(name: str, passes: str, changed: int, rows: int) -> None:
    program = captured.captured(name)
    if passes:
        program = run_passes(program, passes, measure=False, tokenizer=tiny.tokenizer())
    before = str(program)
    found, vocabulary = resized(program, rows)
    assert str(program) == before
    assert len(vocabulary.dims) == changed
    for weight, dim in vocabulary.dims.items():
        assert found.weights[weight].meta.shape[dim] == rows
        assert program.weights[weight].meta.shape[dim] == vocabulary.rows
    if "logits" in program.outputs:
        type_ = type_of(logits(found))
        assert type_ is not None
        assert type_.shape[-1] == rows
    assert bool(new_rows(found)) == (rows > vocabulary.rows)
    verify(found)


def with_node(make: Any) -> Program:
    """The Llama with one node more behind its logits."""
    program = captured.captured("llama").edit()
    head = logits(program)
    output = next(iter(reversed(program.graph.nodes)))
    with program.graph.inserting_before(output):
        new = make(Builder(program.graph), head)
    output.replace_input_with(head, new)
    return program


def reshaped(build: Builder, head: fx.Node) -> fx.Node:
    return build.call(aten.unflatten.int, head, 2, [8, 8])


def sliced(build: Builder, head: fx.Node) -> fx.Node:
    return build.call(aten.slice.Tensor, head, 2, 0, 64)


@pytest.mark.parametrize(
    ("make", "said"),
    [(reshaped, r"main, unflatten.*: aten\.unflatten"), (sliced, "names the vocabulary's size")],
)
def test_what_depends_on_the_size_itself_is_refused(make: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resized(with_node(make), 70)


def test_a_second_table_of_the_same_tokens_follows() -> None:
    program = captured.captured("llama").edit()
    (lookup,) = program.graph.find_nodes(op="call_function", target=aten.embedding.default)
    other = captured.captured("qwen2").weights["model.embed_tokens.weight"]
    with program.graph.inserting_after(lookup):
        weight = Builder(program.graph).weight("other.weight", other)
    with program.graph.inserting_after(weight):
        again = Builder(program.graph).call(aten.embedding.default, weight, lookup.args[1])
    with program.graph.inserting_after(again):
        added = Builder(program.graph).call(aten.add.Tensor, lookup, again)
    lookup.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    program = program.with_weights(program.weights.with_weight("other.weight", other))
    found, vocabulary = resized(program, 70)
    assert vocabulary.tables == ["model.embed_tokens.weight", "other.weight"]
    assert found.weights["other.weight"].meta.shape == (70, 32)


def test_two_vocabularies_are_refused() -> None:
    program = captured.captured("bart")
    config = {**program.origin.config, "share_encoder_decoder_embeddings": False}
    program = replace(program, origin=replace(program.origin, config=config))
    with pytest.raises(UsageError, match="a vocabulary each"):
        resized(program, 70)
