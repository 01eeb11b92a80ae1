"""What a checkpoint holds beside what its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from reroll.rewrite.capture.export import capture
from reroll.rewrite.capture.models import OpenModel, open_model
from tests.rewrite.checkpoint.test_gguf_source import write

IDS = torch.randint(3, 32, (2, 9), generator=torch.Generator().manual_seed(0))
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def llama(tied: bool = True) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def stored(model: Any, directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """A directory with the configuration of a model, and with these tensors."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    tensors = {n: t.detach().clone().contiguous() for n, t in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    files = {n: f"model-{i % shards}.safetensors" for i, n in enumerate(tensors)}
    for file in set(files.values()):
        part = {n: t for n, t in tensors.items() if files[n] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": files})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def opened(path: Path) -> OpenModel:
    found = open_model(str(path))
    assert isinstance(found, OpenModel)
    return found


def head_apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, HEAD: state[TABLE].flip(0)}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    ("change", "tied"),
    [
        (head_apart, False),
        (dict, True),
        (lambda state: {n: t for n, t in state.items() if n != HEAD}, True),
        (lambda state: {n: t for n, t in state.items() if n != TABLE}, True),
    ],
    ids=["apart", "equal", "no head", "no table"],
)
def test_what_is_tied_is_what_transformers_ties(
    tmp_path: Path, shards: int, prefix: bool, change: Any, tied: bool
) -> None:
    model = llama()
    tensors = change(model.state_dict())
    if not prefix:
        tensors = {n.removeprefix("model."): t for n, t in tensors.items()}
    path = stored(model, tmp_path, tensors, shards)
    original = transformers.LlamaForCausalLM.from_pretrained(path)
    found = opened(path)
    assert (found.model.lm_head.weight is found.model.model.embed_tokens.weight) == tied
    assert (original.lm_head.weight is original.model.embed_tokens.weight) == tied
    for name, tensor in original.state_dict().items():
        assert torch.equal(found.source.load(name), tensor)
    assert [HEAD in remark for remark in found.origin.remarks] == ([] if tied else [True])


def test_a_head_that_is_stored_apart_runs_and_is_saved(tmp_path: Path) -> None:
    model = llama()
    path = stored(model, tmp_path / "in", head_apart(model.state_dict()))
    expected = transformers.LlamaForCausalLM.from_pretrained(path)(IDS).logits
    program = capture(path, roll=False)
    assert torch.equal(program.to_module()(IDS).logits, expected)
    program.save(str(tmp_path / "out"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(IDS).logits, expected)
    assert "is not tied to" in (tmp_path / "out" / "README.md").read_text()


def test_some_of_three_tied_weights_may_be_stored_apart(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=32,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    state = model.state_dict()
    path = stored(model, tmp_path, {**state, HEAD: state[HEAD].flip(0)})
    original = transformers.T5ForConditionalGeneration.from_pretrained(path)
    found = opened(path)
    names = [n for n, p in found.model.named_parameters(remove_duplicate=False) if "embed" in n]
    assert {id(found.model.get_parameter(n)) for n in names} == {id(found.model.shared.weight)}
    assert found.model.lm_head.weight is not found.model.shared.weight
    for name, tensor in original.state_dict().items():
        assert torch.equal(found.source.load(name), tensor)


def test_tensors_that_nothing_reads_and_layers_beyond_are_named(tmp_path: Path) -> None:
    model = llama(tied=False)
    state = model.state_dict()
    third = {n.replace(".1.", ".2."): t for n, t in state.items() if ".1." in n}
    more = {"model.layers.0.self_attn.q_norm.weight": torch.ones(4), "value_head": torch.ones(3)}
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    found = opened(stored(model, tmp_path, {**state, **third, **more, **computed}))
    beyond, unread = found.origin.remarks
    assert "more layers" in beyond
    assert "model.layers.2." in beyond
    assert unread.endswith(": model.layers.0.self_attn.q_norm.weight, value_head")
    assert not opened(stored(model, tmp_path, state)).origin.remarks


def test_a_gguf_file_is_read_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    tensors = {
        table.get_name(n, try_suffixes=(".weight",)): t
        for n, t in model.state_dict().items()
        if n != HEAD
    }
    third = {n.replace(".1.", ".2."): t for n, t in tensors.items() if ".1." in n}
    more = {
        "output.weight": model.lm_head.weight.detach().flip(0),
        "rope_freqs.weight": torch.ones(8),
    }
    write(tmp_path / "m.gguf", {**tensors, **third, **more}, {})
    from reroll.rewrite.checkpoint import GgufSource, fit_to_checkpoint

    source = GgufSource(tmp_path / "m.gguf", model)
    apart, beyond, unread = fit_to_checkpoint(model, source)
    assert HEAD in apart
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(source.load(HEAD), more["output.weight"])
    assert "blk.2." in beyond
    assert unread.endswith(": rope_freqs.weight")
