"""States as inputs and outputs of a graph: the state before a run, and the state after it.

Every node that keeps state is numbered in running order, a convolution right before a recurrence
with that recurrence. Its inputs are `past_key_values.N.PART` and its outputs `present.N.PART`, the
names that optimum, transformers.js and onnxruntime-genai use:

    key, value               [batch, kv_heads, past, head_dim]: all tokens so far, the new ones last
    key                      alone, where keys say which tokens are read and have no values
    key, value               [batch, kv_heads, window - 1, head_dim] where a window never looks
                             further back; zeros stand before the first token
    first_key, first_value   [batch, kv_heads, prefix, head_dim]: the first tokens, beside a window
    recurrent_state          [batch, kv_heads, ...]: the state of a recurrence
    maximum, slot_keys       additional states of some mixers: see `mixers`
    conv_state               [batch, channels, kept]: the last inputs of a short convolution, and
                             [batch, ...] the last tokens of mixers that read them; [batch, 1, 1]
                             and never used where onnxruntime-genai needs one beside a recurrence
    waiting                  [batch, kv_heads, delay, channels]: tokens that a delayed recurrence
                             has not written yet

A mixer with a construction of its own registers its states as "states:NAME", a function of the
mixer, kv_heads, d_k and d_v. It returns the sizes of each part, without the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from reroll.export.onnx.graph import TARGET
from reroll.mixers import make
from reroll.mixers.gates import varying
from reroll.rewrite.analysis.state_plan import StatePlan, kept_inputs
from reroll.rewrite.ir.lowerings import find_lowering, lowering
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ATTENTION, RECURRENCE
from reroll.rewrite.ir.program import Program

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
RECURRENT, CONV = "recurrent_state", "conv_state"
GROWS = "past_sequence_length"

# sizes of a state behind the batch, by its part
Parts = dict[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class State:
    """One state of a graph.

    Attributes:
        number: the number of its node's state in the Program.
        part: which part of that state it is.
        dims: its sizes behind the batch.
        is_idle: whether it is empty and passed through, for onnxruntime-genai.
        layer: the number in its names; `number` if none is given.
    """

    number: int
    part: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype
    is_idle: bool = False
    layer: int | None = None

    @property
    def named(self) -> int:
        """The number in its names."""
        return self.number if self.layer is None else self.layer

    @property
    def input(self) -> str:
        """Name of the state before the run."""
        return PAST.format(self.named, self.part)

    @property
    def output(self) -> str:
        """Name of the state after the run."""
        return PRESENT.format(self.named, self.part)

    @property
    def grows(self) -> bool:
        """Whether it holds all tokens."""
        return GROWS in self.dims

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Shape before the run."""
        return ("batch_size", *self.dims)

    @property
    def shape_after(self) -> tuple[int | str, ...]:
        """Shape after the run."""
        return tuple("total_sequence_length" if d == GROWS else d for d in self.shape)


@dataclass(frozen=True)
class Ring:
    """Tokens that a window's keys are of: `first` ones, then `held` past ones, then the new."""

    first: int
    held: int


def plan_rings(program: Program, states: StatePlan) -> dict[int, Ring]:
    """Return the caches that keep a window only, by number."""
    if not keeps_rings(program):
        return {}
    return {
        number: Ring(layer.prefix, max((layer.size or 0) - 1, 0))
        for number, layer in enumerate(states.layers)
        if layer.layer_type == "sliding_attention"
    }


def keeps_rings(program: Program) -> bool:
    """Whether windows store only the tokens that they see.

    They do where a pass has replaced attention by a window or a recurrence, and the padding mask
    gives the number of tokens. Original models keep the caches that runtimes expect.
    """
    if not any(i.role == "padding" for i in program.inputs):
        return False
    for _, graph in program.graphs():
        for node in graph.nodes:
            if node.target is RECURRENCE:
                return True
            if node.target is ATTENTION and argument(node, "prefix") is not None:
                return True
    return False


def cache_parts(node: fx.Node, ring: Ring | None) -> Parts:
    """Return the parts of a cache; values may be absent."""
    found: Parts = {}
    for part, name in (("key", "k"), ("value", "v")):
        sizes: Any = shape(argument(node, name))
        heads, width = sizes[1], sizes[3]
        if ring is None and width:
            found[part] = (heads, GROWS, width)
        if ring is not None and ring.held:
            found[part] = (heads, ring.held, width)
        if ring is not None and ring.first:
            found[f"first_{part}"] = (heads, ring.first, width)
    return found


def recent_parts(node: fx.Node) -> Parts:
    """Return the last inputs of a short convolution."""
    return {CONV: (shape(argument(node, "x"))[1], kept_inputs(node))}


def recurrence_parts(node: fx.Node, delay: int) -> Parts:
    """Return the parts of a recurrence's state, in the order in which it reads them."""
    mixer = make(argument(node, "rule"), argument(node, "options"))
    _, kv_heads, _, d_k = shape(argument(node, "k"))
    d_v = shape(argument(node, "v"))[3]
    found: Parts = {}
    if delay:
        declared = mixer.gates(d_k, d_v)
        gates = sum(math.prod(gate.shape) for gate in varying(declared, declared))
        found["waiting"] = (kv_heads, delay, d_k + d_v + gates + 1)
    sizes = find_lowering(TARGET, f"states:{mixer.name}") or _by_core
    return {**found, **sizes(mixer, kv_heads, d_k, d_v)}


def _by_core(mixer: Any, kv_heads: int, d_k: int, d_v: int) -> Parts:
    """Return the state of a mixer that declares its core."""
    core = mixer.core
    if core is not None and core.decay == "selective":
        # each channel of the values is a head of the operator
        return {RECURRENT: (kv_heads * d_v, d_k, 1)}
    counts = core is not None and core.counts
    return {RECURRENT: (kv_heads, features(mixer, d_k), d_v + counts)}


def features(mixer: Any, d_k: int) -> int:
    """Return the channels of a key after the mixer's feature map."""
    return d_k if mixer.key_map == "none" else mixer.features(d_k)


@lowering(TARGET, "states:mlstm")
def mlstm(mixer: Any, kv_heads: int, d_k: int, d_v: int) -> Parts:
    """Return the running maximum, and a state with a column that counts."""
    return {"maximum": (kv_heads,), RECURRENT: (kv_heads, d_k, d_v + 1)}


@lowering(TARGET, "states:gsa")
def gsa(mixer: Any, kv_heads: int, d_k: int, d_v: int) -> Parts:
    """Return the slots' keys, one head for each slot, and their values."""
    slots = mixer.slots
    return {"slot_keys": (slots * kv_heads, d_k, 1), RECURRENT: (kv_heads, slots, d_v)}


@lowering(TARGET, "states:rwkv6")
def rwkv6(mixer: Any, kv_heads: int, d_k: int, d_v: int) -> Parts:
    """Return the last token, and the state without it."""
    d_k = features(mixer, d_k)
    return {CONV: (kv_heads, 2 * d_k + d_v), RECURRENT: (kv_heads, d_k, d_v)}


def by_layer(states: Mapping[tuple[int, str], State]) -> dict[tuple[int, str], State]:
    """Give a convolution and the recurrence right behind it one number in their names."""
    numbers = sorted({number for number, _ in states})
    parts = {n: {part for number, part in states if number == n} for n in numbers}
    layers: dict[int, int] = {}
    for number in numbers:
        before = parts.get(number - 1, set())
        joins = before == {CONV} and RECURRENT in parts[number] and CONV not in parts[number]
        # of several convolutions none is the recurrence's own
        joins = joins and parts.get(number - 2) != {CONV}
        layers[number] = layers[number - 1] if joins else len(set(layers.values()))
    if len(set(layers.values())) == len(layers):
        return dict(states)
    return {key: replace(state, layer=layers[key[0]]) for key, state in states.items()}


def with_idle(states: Mapping[tuple[int, str], State]) -> tuple[State, ...]:
    """Add an idle convolution to every recurrence where onnxruntime-genai knows the states else.

    It finds the layers with a recurrence by their convolution, and so needs one in all of them.
    """
    found = tuple(states.values())
    known = (RECURRENT, CONV)
    if not all(s.part in known or (s.part in ("key", "value") and s.grows) for s in found):
        return found
    named = {(s.named, s.part) for s in found}
    alone = [s for s in found if s.part == RECURRENT and (s.named, CONV) not in named]
    idle = (replace(s, part=CONV, dims=(1, 1), is_idle=True) for s in alone)
    return (*found, *idle)
