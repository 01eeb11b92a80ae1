"""A state that is saved goes on in another process, for its own model alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, StaticCache

import reroll
from reroll.errors import CheckpointError, UsageError
from reroll.runtime.state.files import load_state, save_state
from tests import captured

IDS = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))
DELTA = "linearize(mixer=gated_deltanet, window=4, sinks=1)"
KINDS = [
    ("llama", ""),
    ("llama", "window(size=4, sinks=2)"),
    ("llama", DELTA),
    ("llama", "linearize(mixer=gsa, mixer_options={slots: 8}, window=4)"),
    ("gemma3", ""),
    ("gpt2", ""),
    ("lfm2", ""),
]


@cache
def model(name: str = "llama", passes: str = "") -> Any:
    program = captured.captured(name)
    tokens = lambda text: [3 + ord(c) % 60 for c in text]  # noqa: E731
    if passes:
        program = reroll.run_passes(program, passes, measure="off", tokenizer=tokens)
    return program.to_module()


def filled(module: Any, ids: torch.Tensor = IDS) -> DynamicCache:
    made = DynamicCache(config=module.config)
    with torch.no_grad():
        module(ids, past_key_values=made)
    return made


def following(module: Any, made: DynamicCache) -> torch.Tensor:
    """Logits of more tokens, in two calls."""
    with torch.no_grad():
        parts = [module(part, past_key_values=made).logits for part in IDS[:, :9].split(5, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("name", "passes"), KINDS)
@pytest.mark.parametrize("length", [3, 20])
def test_it_goes_on_as_if_nothing_had_been_saved(
    name: str, passes: str, length: int, tmp_path: Path
) -> None:
    module, ids = model(name, passes), IDS[:, :length]
    save_state(tmp_path / "a.state", module, ids, filled(module, ids))
    tokens, made = load_state(tmp_path / "a.state", module)
    assert torch.equal(tokens, ids)
    assert torch.equal(following(module, made), following(module, filled(module, ids)))


def test_a_state_of_constant_size_makes_a_file_of_constant_size(tmp_path: Path) -> None:
    module, sizes = model("llama", "window(size=4, sinks=2)"), []
    for length in (20, 200):
        ids = IDS[:, :1].expand(1, length)
        file = tmp_path / str(length)
        save_state(file, module, ids, filled(module, ids))
        sizes.append(file.stat().st_size)
    # the tokens are in it
    assert sizes[1] - sizes[0] < 180 * 8 + 100


class TestRefusals:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        save_state(tmp_path / "a.state", model(), IDS, filled(model()))
        return tmp_path / "a.state"

    def test_of_another_program(self, file: Path) -> None:
        with pytest.raises(UsageError, match="another program"):
            load_state(file, model("llama", "window(size=4, sinks=2)"))

    def test_of_other_weights(self, file: Path) -> None:
        module = captured.captured("llama").to_module()
        with torch.no_grad():
            next(module.parameters()).mul_(2)
        with pytest.raises(UsageError, match="another weights"):
            load_state(file, module)

    def test_damaged(self, file: Path, tmp_path: Path) -> None:
        whole = file.read_bytes()
        for name, content in {"short": whole[:-50], "empty": b"", "text": b"no state"}.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match="no state can be read"):
                load_state(tmp_path / name, model())
        with pytest.raises(CheckpointError, match="no state can be read"):
            load_state(tmp_path / "missing", model())

    def test_of_other_tokens(self, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        save_file(tensors | {"tokens": tensors["tokens"] + 1}, file, metadata)
        with pytest.raises(CheckpointError, match="not those that were saved"):
            load_state(file, model())

    def test_none_of_a_state(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(1)}, tmp_path / "weights")
        with pytest.raises(CheckpointError, match="not a file of a state"):
            load_state(tmp_path / "weights", model())

    def test_what_is_not_saved(self, file: Path) -> None:
        made = filled(model())
        with pytest.raises(UsageError, match="--overwrite"):
            save_state(file, model(), IDS, made)
        with pytest.raises(UsageError, match="the cache holds 20 tokens"):
            save_state(file, model(), IDS[:, :7], made, overwrite=True)
        static = StaticCache(config=model().config, max_cache_len=32)
        with torch.no_grad():
            model()(IDS, past_key_values=static)
        with pytest.raises(UsageError, match="DynamicCache"):
            save_state(file, model(), IDS, static, overwrite=True)
