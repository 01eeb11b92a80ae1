"""A cache that knows its tokens is read on from what calls have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reroll
from tests.runtime.speculation.test_speculation import DELTA, IDS, greedy, model

WINDOW = "window(size=6, sinks=1)"


def counting(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that a module is given from now on."""
    counts: list[int] = []
    forward = module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    return counts


@pytest.mark.parametrize(
    ("name", "passes"),
    [("llama", ""), ("llama", DELTA), ("llama", WINDOW), ("gemma3", ""), ("lfm2", "")],
)
def test_only_what_is_new_is_read(name: str, passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = model(name, passes)
    cache = reroll.PrefixCache(module)
    options: dict[str, Any] = {"max_new_tokens": 8, "ends": (), "cache": cache}
    asked = IDS
    for turn in range(3):
        expected = greedy(module, asked)[:, : asked.shape[1] + 8]
        with monkeypatch.context() as patch:
            counts = counting(module, patch)
            tokens = reroll.generate(module, asked, "lookup", **options)
        assert torch.equal(tokens, expected)
        # the answer but for its last token is in the cache
        assert counts[0] == (19 if turn == 0 else 5)
        assert cache.tokens.tolist() == tokens[0, :-1].tolist()
        asked = torch.cat([tokens, IDS[:, turn : turn + 5]], 1)


@pytest.mark.parametrize("passes", ["", DELTA, WINDOW])
def test_it_goes_back(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = model("llama", passes)
    cache = reroll.PrefixCache(module)
    options: dict[str, Any] = {"max_new_tokens": 8, "ends": (), "cache": cache}
    first = reroll.generate(module, IDS, "lookup", **options)
    # another question behind the same prompt, the same prompt again, and one that parts early
    other = torch.cat([IDS[:, :-1], IDS[:, :4] + 1], 1)
    early = torch.cat([IDS[:, :9], IDS[:, :7]], 1)
    for asked, new in ((other, 3), (IDS, 1), (early, 6 if not passes else 15)):
        expected = greedy(module, asked)[:, : asked.shape[1] + 8]
        with monkeypatch.context() as patch:
            counts = counting(module, patch)
            tokens = reroll.generate(module, asked, "lookup", **options)
        assert torch.equal(tokens, expected)
        assert counts[0] == new
    assert torch.equal(reroll.generate(module, IDS, "lookup", **options), first)
