"""A tree of tokens behind a cache: each path is a sequence, and so is what follows the kept one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import reroll
from reroll.errors import UsageError
from reroll.mixers import Tree
from reroll.rewrite.analysis.state_plan import CacheLayer
from reroll.rewrite.analysis.tolerances import forward, relative_rms
from reroll.runtime.state.growing import keep
from tests import captured
from tests.conformance.mixer_inputs import TREES
from tests.runtime.state.reading import KINDS, TIME, Reader, named
from tests.tiny.types import build

PARENTS = TREES[-1]
DELTA = "linearize(mixer=gated_deltanet, window=4, sinks=1)"
MODELS = [
    ("llama", ""),
    ("llama", "window(size=3, sinks=1)"),
    ("llama", "window(size=20, sinks=14)"),
    ("llama", DELTA),
    ("llama", "insert_exits(at=[2], threshold=0.05)"),
    ("gemma3", ""),
    ("gpt2", ""),
    ("lfm2", ""),
    ("qwen3_next", ""),
    ("bamba", ""),
    ("mamba", ""),
]


@pytest.mark.parametrize("past", [0, 1, 3, 17])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("planned", KINDS, ids=named)
def test_of_every_layer(planned: CacheLayer, past: int, padded: bool) -> None:
    padding = None
    if padded and past:
        padding = torch.ones(2, TIME, dtype=torch.bool)
        padding[0, : min(2, past - 1)] = False
    tree = Tree(PARENTS)
    found = Reader(planned, padding)
    found.cache.activate_past_recording()
    if past:
        found.read(past)
    found.layers[0].tree = tree
    out = found.read(len(tree))
    for token in range(len(tree)):
        path = torch.tensor(tree.path(token))
        wanted = Reader(planned, padding)
        if past:
            wanted.read(past)
        chain = wanted.read(len(path), past + path)
        at = path if planned.recent is None else (..., path)
        read = out[:, at] if planned.recent is None else out[at]
        assert relative_rms(read, chain) <= 1e-12, f"the path to token {token}"
    keep(found.cache, path, len(tree))
    for count in (1, 3):
        assert found.length == wanted.length
        assert relative_rms(found.read(count), wanted.read(count)) <= 1e-12


def lowered(name: str, passes: str = "") -> Any:
    if name not in captured.MODELS:
        return reroll.capture(build(name).eval()).to_module()
    program = captured.captured(name)
    if passes:
        program = reroll.run_passes(program, passes, measure="off")
    return program.to_module()


def tokens(rows: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (rows, count), generator=generator)


@pytest.mark.parametrize(("name", "passes"), MODELS)
def test_of_models(name: str, passes: str) -> None:
    module, tree = lowered(name, passes), Tree(PARENTS)
    ids, new, later = tokens(1, 11, 0), tokens(1, len(tree), 1), tokens(1, 5, 2)

    def read(cache: DynamicCache, ids: Tensor, **options: Any) -> Tensor:
        if "parents" not in options and "position_ids" in module._input_names:
            # some originals count from zero behind a cache if they are not told
            at = torch.arange(ids.shape[1])[None] + cache.get_seq_length()
            options["position_ids"] = at
        logits: Tensor = module(ids, past_key_values=cache, **options).logits
        return logits

    def begun() -> DynamicCache:
        cache = DynamicCache(config=module.config)
        read(cache, ids)
        return cache

    with torch.no_grad():
        cache = begun()
        cache.activate_past_recording()
        out = read(cache, new, parents=PARENTS)
        for token in range(len(tree)):
            chain, path = begun(), tree.path(token)
            expected = read(chain, new[:, path])
            assert relative_rms(out[:, path], expected) <= forward(torch.float32)
        with pytest.raises(UsageError, match="has read a tree"):
            read(cache, later)
        keep(cache, torch.tensor(path), len(tree))
        assert cache.get_seq_length() == chain.get_seq_length()
        for part in later.split((2, 1, 2), 1):
            found, wanted = read(cache, part), read(chain, part)
            assert relative_rms(found, wanted) <= forward(torch.float32)


def test_rows_padded_on_the_left() -> None:
    module, tree = lowered("llama", DELTA), Tree(PARENTS)
    ids, new = tokens(2, 9, 3), tokens(2, len(tree), 4)
    mask = torch.ones(2, 9 + len(tree), dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask[:, :9].cumsum(1) - 1).clamp(min=0)
    deep = positions[:, -1:] + 1 + tree.depth
    with torch.no_grad():
        cache = DynamicCache(config=module.config)
        module(ids, mask[:, :9], positions, past_key_values=cache)
        out = module(new, mask, deep, past_key_values=cache, parents=tree).logits
        for row, start in ((0, 4), (1, 0)):
            alone = DynamicCache(config=module.config)
            module(ids[row : row + 1, start:], past_key_values=alone)
            found = module(new[row : row + 1], past_key_values=alone, parents=tree).logits
            assert relative_rms(out[row : row + 1], found) <= forward(torch.float32)


@pytest.mark.parametrize("name", ["bloom", "indexer"])
def test_what_would_mix_branches_is_refused(name: str) -> None:
    module, ids = lowered(name), tokens(1, 4, 0)
    cache = DynamicCache(config=module.config)
    with pytest.raises(UsageError, match="would mix its branches"):
        module(ids, past_key_values=cache, parents=[-1, 0, 0, 1])


def test_other_calls_that_cannot_be() -> None:
    module, ids = lowered("llama"), tokens(1, 4, 0)
    cache = DynamicCache(config=module.config)
    tree = [-1, 0, 0, 1]
    for inputs, message in (
        ({"past_key_values": StaticCache(module.config, 9)}, "needs a DynamicCache"),
        ({"past_key_values": cache, "attention_mask": torch.ones(1, 1, 4, 4)}, "each query"),
        ({"past_key_values": cache, "parents": [-1, 0]}, "4 tokens and 2 parents"),
        ({"past_key_values": cache, "parents": [-1, 2, 0, 0]}, "parent of token 1 is 2"),
    ):
        with pytest.raises(UsageError, match=message):
            module(ids, **{"parents": tree, **inputs})
