"""The module tree: names, shared Parameters, and code that hostile names cannot break out of."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import reroll
from reroll.errors import ProgramError, UsageError
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import Weight, WeightTable, full
from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime import untie
from reroll.runtime.lowering.lower import lower
from tests import captured
from tests.slow import slow

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def tied(program: Program, blocks: int = 2) -> Program:
    """The trips of every loop share `blocks` entries of each weight."""
    table = {}
    for name, weight in program.weights.items():
        if weight.index is not None:
            trips = len(weight.index)
            index = tuple(t * blocks // trips for t in range(trips))
            weight = Weight(weight.entries[:blocks], index, weight.trainable)
        table[name] = weight
    return program.with_weights(WeightTable(table))


def renamed(program: Program, old: str, new: str, weight: Weight | None = None) -> Program:
    """The program with a weight under another name, and perhaps other contents."""
    program = program.edit()
    for _, graph in program.graphs():
        for node in graph.nodes:
            if node.op == "get_attr" and node.target == old:
                node.target = new
    table = {new if n == old else n: w for n, w in program.weights.items()}
    return program.with_weights(WeightTable({**table, new: weight or table[new]}))


def test_trips_that_share_an_entry_share_the_parameter_and_not_the_module() -> None:
    program = tied(captured.captured("llama"))
    model = lower(program)
    layers = [model.get_submodule(f"model.layers.{trip}.mlp.up_proj") for trip in range(4)]
    assert len({id(layer) for layer in layers}) == 4
    assert len({id(layer.weight) for layer in layers}) == 2
    assert all(isinstance(layer, nn.Linear) for layer in layers)
    assert sum(p.numel() for p in model.parameters()) == program.parameters()
    assert model.num_parameters() == program.parameters()


def test_tied_embeddings_are_one_parameter() -> None:
    model = lower(captured.captured("llama"))
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_equal_constants_are_not_tied() -> None:
    program = captured.captured("llama")
    name = "model.layers.*.input_layernorm.weight"
    ones = full(program.weights[name].meta.shape, 1.0, torch.float32)
    weight = Weight((ones,) * 4, (0, 1, 2, 3))
    model = lower(program.with_weights(program.weights.with_weight(name, weight)))
    norms = [model.get_parameter(name.replace("*", str(t))) for t in range(4)]
    assert len({id(n) for n in norms}) == 4
    with torch.no_grad():
        norms[0].zero_()
    assert all(torch.equal(n, torch.ones_like(n)) for n in norms[1:])


@pytest.mark.parametrize(
    "passes",
    [
        "linearize(mixer=gated_deltanet, window=8, sinks=2, gain=0.5)",
        "linearize(mixer=gla, feature_map=hedgehog, window=4, sinks=1)",
        "insert_exits(at=[1, 2, 3], criterion=gated)",
        "tie(blocks=2, scaling=true)",
        "tie(blocks=2), relax(rank=2, init=zero)",
        "loop_core(prelude=1, core=[1, 2], coda=1, trips=3)",
        "fold_norms",
    ],
)
def test_parameters_have_memory_of_their_own(passes: str, tmp_path: Path) -> None:
    program = run_passes(captured.captured("llama"), passes, measure=False)
    program.save(tmp_path / "out")
    for model in (program.to_module(), reroll.load(tmp_path / "out").to_module()):
        storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
        assert len(set(storages)) == len(storages)
        # nor is a parameter a view of few numbers
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
        # and each has its place in the program
        assert model.to_program().parameters() == program.parameters()


def test_a_weight_without_a_trip_is_one_parameter_for_all() -> None:
    program = captured.captured("llama")
    old = "model.layers.*.post_attention_layernorm.weight"
    shared = Weight(program.weights[old].entries[:1])
    model = lower(renamed(program, old, "model.shared_norm.weight", shared))
    assert "model.shared_norm.weight" in dict(model.named_parameters())
    assert not [n for n, _ in model.named_parameters() if "post_attention" in n]
    expected = lower(program)
    for trip in range(4):
        norm = expected.get_submodule(f"model.layers.{trip}.post_attention_layernorm")
        norm.weight = model.get_parameter("model.shared_norm.weight")
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_weights_of_a_trip_may_be_in_several_places() -> None:
    program = captured.captured("llama")
    old = "model.layers.*.mlp.up_proj.weight"
    model = lower(renamed(program, old, "elsewhere.*.up.weight"))
    assert isinstance(model.get_submodule("elsewhere.3.up"), nn.Linear)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert torch.equal(model(IDS).logits, lower(program)(IDS).logits)


def test_a_flat_program_lowers_too() -> None:
    flat, rolled = lower(captured.flat("llama")), lower(captured.captured("llama"))
    torch.testing.assert_close(flat(IDS).logits, rolled(IDS).logits)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(flat.generate(IDS, **options), rolled.generate(IDS, **options))


@pytest.mark.parametrize(
    "name",
    [
        'x"); __import__("os").abort(); ("',
        "a b.c-d/e",
        "forward.weight",
        "config.weight",
        "model.layers.0.class.weight",
        "..weight",
        "_modules.weight",
        "__class__.__dict__",
        "é.weight",
    ],
)
def test_names_are_only_names(name: str) -> None:
    program = captured.captured("llama")
    model = lower(renamed(program, "model.norm.weight", name))
    assert torch.equal(model(IDS).logits, lower(program)(IDS).logits)
    assert "__import__(" not in "".join(model.code().values())


def test_an_unknown_weight_is_refused() -> None:
    program = captured.captured("llama")
    with pytest.raises(ProgramError, match=r"model\.norm\.weight"):
        lower(program.with_weights(program.weights.without("model.norm.weight")))


def test_lowering_leaves_the_program_alone() -> None:
    program = captured.captured("gemma3")
    before = str(program)
    lower(program)
    assert str(program) == before


def test_meta_has_no_data() -> None:
    model = lower(captured.captured("llama"), meta=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_copy_is_independent() -> None:
    model = lower(captured.captured("llama"))
    expected = model(IDS).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(other(IDS).logits, expected)
    assert other.program is model.program


def test_a_model_that_is_dropped_is_freed() -> None:
    model = lower(captured.captured("llama"))
    parameter = model.get_submodule("model.layers.0.mlp.up_proj").weight
    kind = type(model.get_submodule("model.layers.0"))
    del model
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is kind]
    assert parameter is not None


class TestBackToAProgram:
    def test_it_has_the_weights_of_now(self) -> None:
        model = lower(captured.captured("llama"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        again = lower(model.to_program())
        assert torch.equal(again(IDS).logits, model(IDS).logits)

    def test_what_is_shared_stays_shared(self) -> None:
        program = tied(captured.captured("llama"))
        again = lower(program).to_program()
        assert again.parameters() == program.parameters()
        assert [w.index for w in again.weights.values()] == [
            w.index for w in program.weights.values()
        ]

    def test_untied_weights_have_an_entry_each(self) -> None:
        model = lower(tied(captured.captured("llama")))
        untie(model)
        again = model.to_program()
        assert again.weights["model.layers.*.mlp.up_proj.weight"].index == (0, 1, 2, 3)
        assert again.parameters() == captured.captured("llama").parameters()
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight

    def test_the_tensors_of_a_file_load_as_a_state_dict(self, tmp_path: Path) -> None:
        model = lower(tied(captured.captured("llama")))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        model.save_pretrained(tmp_path)
        again = lower(tied(captured.captured("llama")))
        result = again.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert not result.missing_keys
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        third = lower(tied(captured.captured("llama")))
        third.load_state_dict(model.state_dict())
        assert torch.equal(third(IDS).logits, model(IDS).logits)

    def test_a_model_without_data_has_none(self) -> None:
        with pytest.raises(ProgramError, match="no data"):
            lower(captured.captured("llama"), meta=True).to_program()


def test_what_a_lowered_model_cannot_do_is_said() -> None:
    model = lower(captured.captured("llama"))
    with pytest.raises(UsageError, match="input_ids is missing"):
        model()
    with pytest.raises(UsageError, match="configuration alone"):
        type(model)(model.config)


def test_a_program_with_an_unknown_auto_class_runs_as_a_plain_model() -> None:
    program = captured.captured("bert")
    origin = replace(program.origin, auto_class="AutoModelForSomethingNew")
    model = lower(replace(program, origin=origin))
    assert torch.equal(model(IDS)[0], lower(program)(IDS)[0])


@pytest.mark.parametrize(
    "name", [*(n for n in captured.MODELS if n != "indexer"), *slow("indexer")]
)
def test_tensors_are_made_where_the_inputs_are(name: str) -> None:
    program = captured.captured(name)
    model = lower(program, meta=True)
    sizes = {"b": 2, "s": 9, "t": 9, "e": 7}
    inputs = {
        i.name: torch.zeros(
            [sizes.get(d, d) for d in i.type.shape], dtype=i.type.dtype, device="meta"
        )
        for i in program.inputs
        if i.role == "data"
    }
    # an operation on two devices is refused
    outputs = model(**inputs)
    assert outputs[0].device.type == "meta"
