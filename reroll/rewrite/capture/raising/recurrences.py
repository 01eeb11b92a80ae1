"""Recurrences of flat Programs, which call transformers' functions, as those of mixers.

Gated delta rule: the mixer `gated_deltanet` has the same decay, strength and scale, and `kda` those
of Kimi Delta Attention, without a floor.
State space duality: the mixer `mamba2`, with log decay A dt and dt.
Selective scan: the mixer `mamba`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import fx

from reroll.rewrite.capture.raising.idioms import RewriteRule
from reroll.rewrite.capture.recurrent import PREFIX
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import RECURRENCE
from reroll.rewrite.ir.patterns import Match, Miss

aten = torch.ops.aten


def _of(function: str) -> Any:
    def pattern(node: fx.Node) -> Match | Miss:
        if node.target is RECURRENCE and argument(node, "rule") == PREFIX + function:
            return Match(function, {}, (node.name,))
        return Miss(f"expected {function}", (node.name,), function)

    return pattern


def _delta_rule(mixer: str, **options: Any) -> Any:
    def rewrite(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
        q, k, v, gates = root.args[:4]
        unit = json.loads(str(argument(root, "options")))["use_qk_l2norm_in_kernel"]
        wishes = json.dumps(options if unit else {**options, "unit_keys": False})
        return Builder(graph).call(RECURRENCE, q, k, v, gates, mixer, wishes)

    return rewrite


def _state_space(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    builder = Builder(graph)
    q, k, v = root.args[:3]
    decay, dt = argument(root, "gates")
    wide = builder.call(aten.to.dtype, dt, torch.float32)
    log_decay = builder.call(aten.mul.Tensor, decay, wide)
    return builder.call(RECURRENCE, q, k, v, [log_decay, dt], "mamba2", "{}")


def _selective_scan(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    builder = Builder(graph)
    q, k, v = root.args[:3]
    dt, rate = argument(root, "gates")
    by_state = builder.call(aten.transpose.int, rate, -1, -2)
    return builder.call(RECURRENCE, q, k, v, [dt, by_state], "mamba", "{}")


RECURRENCE_RULES = (
    RewriteRule("gated_deltanet", _of("chunk_gated_delta_rule"), _delta_rule("gated_deltanet")),
    RewriteRule("kda", _of("chunk_kda"), _delta_rule("kda", floor=None)),
    RewriteRule("mamba", _of("selective_scan_fn"), _selective_scan),
    RewriteRule("mamba2", _of("mamba_chunk_scan_combined"), _state_space),
)
