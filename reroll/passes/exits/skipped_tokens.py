"""Hide skipped tokens: layers that a token skips write no key and no recurrent state for it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from reroll.errors import PassError
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ATTENTION, ATTENTION_MASS, CACHE, MARK_KEYS, RECURRENCE
from reroll.rewrite.ir.program import Loop
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.types import set_type

PAD = torch.ops.aten.constant_pad_nd.default

HINT = "use state=propagate or state=defer"


def leave_out(loop: Loop, graph: fx.Graph, done: fx.Node) -> None:
    """Hide the keys and state updates of tokens that are `done` [batch, time]; edits in place.

    Raises PassError where a body has neither cache nor recurrence, where anything but attention
    reads keys, or where attention scores are capped.
    """
    caches = [n for n in graph.nodes if n.target is CACHE]
    mixers = [n for n in graph.nodes if n.target is RECURRENCE]
    if not caches and not mixers:
        raise PassError(f"{loop.name} keeps nothing of a token that could be left out", hint=HINT)
    for node in mixers:
        node.kwargs = {**node.kwargs, "idle": done}
    for cache in caches:
        _mark(graph, cache, done)


def _mark(graph: fx.Graph, cache: fx.Node, done: fx.Node) -> None:
    k: Any = cache.args[0]
    build = Builder(graph)
    with build.before(cache):
        marked = build.call(MARK_KEYS, k, done)
    cache.update_arg(0, marked)
    keys = [n for n in cache.users if n.target is operator.getitem and n.args[1] == 0]
    for key in keys:
        old, size = key.meta["type"], shape(marked)[-1]
        set_type(key, TensorType(old.dtype, (*old.shape[:-1], size)))
        for reader in list(key.users):
            if reader.target not in (ATTENTION, ATTENTION_MASS) or argument(reader, "k") is not key:
                raise PassError(f"{reader.name} reads keys, and is no attention", hint=HINT)
            if argument(reader, "softcap") is not None:
                raise PassError(
                    "keys cannot be hidden where attention scores are capped", hint=HINT
                )
            q: Any = argument(reader, "q")
            with build.before(reader):
                reader.update_arg(0, build.call(PAD, q, [0, 1], 1.0))
