"""Weights that are kept elsewhere: offloading, device maps, saved states, the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    init_empty_weights,
    load_checkpoint_and_dispatch,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import reroll
from reroll.errors import ContextError, UsageError
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.manager import run_passes
from tests import captured

pytestmark = pytest.mark.usefixtures("captured_once")

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")

KINDS = {
    "plain": ("llama", ""),
    "gemma": ("gemma3", ""),
    "tied": ("llama", "tie(blocks=2)"),
    "relaxed": ("llama", "tie(blocks=1), relax(rank=2)"),
    "window": ("llama", "window(size=4, sinks=1)"),
    "delta": ("llama", "linearize(mixer=gated_deltanet, window=4, sinks=1)"),
    "exits": ("llama", "insert_exits(at=[1], threshold=0.05)"),
    "layer norms": ("gpt2", ""),
    # its head reads the table of the embeddings with a bias of another name
    "mixed reads": ("roberta_decoder", ""),
    "encoder": ("bert", ""),
    "pair": ("t5", ""),
    "images": ("vit", ""),
}


def program(kind: str) -> Program:
    name, passes = KINDS[kind]
    made = captured.captured(name)
    return run_passes(made, passes, measure=False) if passes else made


def result(model: Any) -> torch.Tensor:
    inputs = {"input_ids": IDS}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.ones(2, 3, 16, 16).cumsum(-1)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs)[0]


def over(model: Any, *devices: str) -> dict[str, str]:
    """A device map that gives the modules of a model these devices in turn."""
    names = [name for name, _ in model.named_children()]
    return {name: devices[number % len(devices)] for number, name in enumerate(names)}


@pytest.mark.parametrize("kind", list(KINDS))
def test_offloaded_weights_are_brought_back(kind: str, tmp_path: Path) -> None:
    model = program(kind).to_module()
    expected = result(model)
    on_cpu = cpu_offload(copy.deepcopy(model), execution_device=CPU)
    assert all(p.device.type == "meta" for p in on_cpu.parameters())
    assert torch.equal(result(on_cpu), expected)
    on_disk = copy.deepcopy(model)
    disk_offload(on_disk, str(tmp_path / "all"), execution_device=CPU)
    assert torch.equal(result(on_disk), expected)
    both = dispatch_model(
        copy.deepcopy(model), over(model, "disk", "cpu"), offload_dir=str(tmp_path / "some")
    )
    assert any(p.device.type == "meta" for p in both.parameters())
    assert torch.equal(result(both), expected)


@pytest.mark.parametrize("kind", ["gemma", "tied", "delta", "encoder"])
def test_a_directory_is_loaded_over_cpu_and_disk(kind: str, tmp_path: Path) -> None:
    source = program(kind)
    plain = source.to_module()
    source.save(str(tmp_path / "saved"))
    auto = AutoModelForCausalLM if plain.can_generate() else AutoModel
    model = auto.from_pretrained(
        str(tmp_path / "saved"),
        device_map=over(plain, "disk", "cpu"),
        offload_folder=tmp_path / "offload",
    )
    assert any(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(result(model), result(plain))
    files = list((tmp_path / "offload").iterdir())
    assert len(files) <= len({id(p) for p in plain.parameters()})
    # what is on the disk is saved as well
    model.save_pretrained(str(tmp_path / "again"))
    assert torch.equal(result(auto.from_pretrained(str(tmp_path / "again"))), result(plain))
    if plain.can_generate():
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


def test_auto_keeps_to_the_memory(tmp_path: Path) -> None:
    source = program("plain")
    source.save(str(tmp_path / "saved"))
    plain = source.to_module()
    half = sum(p.numel() * 4 for p in plain.parameters()) // 2
    model = AutoModelForCausalLM.from_pretrained(
        str(tmp_path / "saved"),
        device_map="auto",
        max_memory={"cpu": half},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in set(model.hf_device_map.values())
    assert torch.equal(result(model), result(plain))


@pytest.mark.parametrize(
    ("device_map", "reason"),
    [
        ({"model": "disk", "lm_head": "cpu"}, "no folder"),
        ({"model.layers": "cpu", "lm_head": "disk"}, "no device for"),
        ({"": "nowhere", "lm_head": "cpu"}, "not on this machine"),
        ("evenly", "is no device map"),
    ],
)
def test_a_device_map_that_does_not_fit_is_said(
    device_map: Any, reason: str, tmp_path: Path
) -> None:
    program("plain").save(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match=reason):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"), device_map=device_map)


@pytest.mark.parametrize("kind", ["gemma", "tied"])
def test_a_checkpoint_is_dispatched_to_a_model_without_weights(kind: str, tmp_path: Path) -> None:
    source = program(kind)
    source.save(str(tmp_path / "saved"))
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(tmp_path / "saved"))
        )
    assert all(p.device.type == "meta" for p in empty.parameters())
    model = load_checkpoint_and_dispatch(empty, str(tmp_path / "saved"), device_map={"": "cpu"})
    assert torch.equal(result(model.eval()), result(source.to_module()))


def test_a_configuration_alone_has_no_weights(tmp_path: Path) -> None:
    program("plain").save(str(tmp_path / "saved"))
    config = AutoConfig.from_pretrained(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="configuration alone"):
        AutoModelForCausalLM.from_config(config)
    with torch.device("meta"), pytest.raises(ContextError, match="meta device context manager"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved"))


@pytest.mark.parametrize("kind", ["gemma", "tied", "relaxed"])
def test_the_state_of_an_accelerator_comes_back(kind: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(program(kind).to_module())
    expected = result(model)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert torch.equal(result(model), expected)
    accelerator.free_memory()


def on_meta(model: Any) -> Any:
    return model.to("meta")


def as_it_is(model: Any) -> Any:
    return model


@pytest.mark.parametrize("kind", ["gemma", "relaxed", "delta", "images"])
@pytest.mark.parametrize("before", [on_meta, as_it_is])
def test_weights_come_back_after_to_empty(kind: str, before: Callable[[Any], Any]) -> None:
    model = program(kind).to_module()
    expected, names = result(model), len(list(model.parameters()))
    model = before(model).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(3)
    model.init_weights()
    assert torch.equal(result(model), expected)
    # weights that modules share are still one
    assert len(list(model.parameters())) == names
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.init_weights()
    assert not torch.equal(result(model), expected), "trained weights are left alone"


def test_the_weights_of_one_module_are_set() -> None:
    model = program("gemma").to_module()
    expected = result(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        model._init_weights(module)
    assert torch.equal(result(model), expected)


@pytest.mark.parametrize("kind", ["gemma", "tied"])
def test_a_change_of_dtype_keeps_shared_weights(kind: str) -> None:
    name, passes = KINDS[kind]
    # known to run in half precision as well
    both = reroll.capture(copy.deepcopy(captured.model(name)))
    model = (run_passes(both, passes, measure=False) if passes else both).to_module()
    count = len(list(model.parameters()))
    frequencies = [b for n, b in model.named_buffers() if "inv_freq" in n]
    values = [b.clone() for b in frequencies]
    assert values
    # as DeepSpeed casts a model
    model.bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(list(model.parameters())) == count
    kept = [b for n, b in model.named_buffers() if "inv_freq" in n]
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    assert {b.dtype for b in kept} == {torch.float32}
