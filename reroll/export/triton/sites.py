"""Find a Program's nodes with state, and the arguments of each that a bundle's runtime takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from reroll.errors import ExportError
from reroll.kernels.forms import SHORTEST, limit_of
from reroll.mixers import Mixer, make
from reroll.rewrite.analysis.state_plan import before_cache, behind_cache
from reroll.rewrite.ir.matching import argument, bind, unsupported
from reroll.rewrite.ir.ops import (
    ATTENTION,
    CACHE,
    GLU,
    RECURRENCE,
    RMS_NORM,
    ROPE,
    SHORT_CONVOLUTION,
    WIDEN,
)
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.visibility import Visibility


@dataclass(frozen=True)
class Site:
    """A node of an attention, a recurrence or a short convolution.

    Attributes:
        number: its position among all.
        node: the node.
        loop: the name of the loop whose body it is in; empty in the main graph.
        kind: `Attention`, `Recurrence` or `Convolution` of the bundle.
        fields: the arguments of that class.
        mixer: the mixer of a recurrence.
    """

    number: int
    node: fx.Node
    loop: str
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    mixer: Mixer | None = None


def sites_of(program: Program) -> dict[fx.Node, Site]:
    """Find all sites, in the order of the graphs.

    Raises ExportError for a site or an op that a bundle does not support.
    """
    trips = {loop.name: loop.trips for loop in program.loops}
    found: dict[fx.Node, Site] = {}
    for name, graph in program.graphs():
        loop = "" if name == "main" else name
        for node in graph.nodes:
            if node.target is CACHE:
                readers = {user for item in node.users for user in item.users}
                if any(r.target is not ATTENTION for r in readers) or len(readers) > 1:
                    raise _cannot("keys and values that several attentions share", node)
            elif node.target is ATTENTION:
                fields = {"trips": trips.get(loop, 1)} | _attention(node)
                found[node] = Site(len(found), node, loop, "Attention", fields)
            elif node.target is RECURRENCE:
                mixer = make(argument(node, "rule"), argument(node, "options"))
                fields = {"trips": trips.get(loop, 1)} | _recurrence(node, mixer)
                found[node] = Site(len(found), node, loop, "Recurrence", fields, mixer)
            elif node.target is SHORT_CONVOLUTION:
                fields = {"trips": trips.get(loop, 1)} | _convolution(node)
                found[node] = Site(len(found), node, loop, "Convolution", fields)
            elif getattr(node.target, "namespace", "") == "reroll" and node.target not in PLAIN:
                raise _cannot(f"the op {node.target}", node)
    return found


# ops that keep nothing between tokens, which a bundle has
PLAIN = (RMS_NORM, ROPE, GLU, WIDEN)
# arguments of attention that the kernels compute; a cache layer knows the padding
SUPPORTED = ("q", "k", "v", "scale", "causal", "window", "prefix", "padding")


def _attention(node: fx.Node) -> dict[str, Any]:
    q, k, v = (_type(argument(node, name)) for name in "qkv")
    given, seen = bind(ATTENTION, node.args, node.kwargs), Visibility.of(node)
    for name in unsupported(node, SUPPORTED):
        raise _cannot(f"attention with {name}", node)
    if not seen.causal or behind_cache(given["k"]) is None:
        raise _cannot("attention that is not causal or has no cache", node)
    for name in ("window", "prefix"):
        if isinstance(given[name], fx.Node):
            raise _cannot(f"attention whose {name} differs between the trips of a loop", node)
    return {
        "heads": q.shape[1], "kv_heads": k.shape[1], "k_size": k.shape[3], "v_size": v.shape[3],
        "scale": given["scale"], "window": seen.window,
        # without a window all tokens are kept, so first tokens need no place of their own
        "prefix": (seen.prefix or 0) if seen.window else 0,
    }  # fmt: skip


def _recurrence(node: fx.Node, mixer: Mixer) -> dict[str, Any]:
    q, k, v = (_type(argument(node, name)) for name in "qkv")
    d_k, d_v = int(k.shape[3]), int(v.shape[3])
    core = mixer.core
    if core is None or core.decay == "selective":
        raise _cannot(f"the mixer {mixer.name}", node)
    if core.gate == 2 and limit_of(mixer) < SHORTEST:
        raise _cannot(f"the mixer {mixer.name} with chunks of fewer than {SHORTEST} tokens", node)
    rows = mixer.state_shapes(d_k, d_v)[0][0]
    if rows > 128 or d_v > 128:
        raise _cannot("a state with more than 128 rows or columns", node)
    delay, skip, active = (argument(node, name) for name in ("delay", "skip", "active"))
    if isinstance(delay, fx.Node) or isinstance(skip, fx.Node) or active is not True:
        raise _cannot("a recurrence that differs between the trips of a loop", node)
    if mixer.key_map == "taylor":
        raise _cannot("Taylor features", node)
    return {
        "heads": q.shape[1], "kv_heads": k.shape[1], "k_size": d_k, "v_size": d_v,
        "state": (rows, d_v + 1 if core.counts else d_v),
        "gates": tuple(gate.shape for gate in mixer.gates(d_k, d_v)),
        "dtype": v.dtype,
        "scale": mixer.default_scale(d_k) if mixer.scale is None else mixer.scale,
        "decay": core.gate > 0,
        "delta": core.delta,
        "key": core.key,
        "features": mixer.key_map,
        "unit": mixer.unit_length,
        "floor": next((g.floor for g in mixer.gates(d_k, d_v) if g.floor is not None), None),
        "counted": core.counts, "normalise": mixer.normalised,
        "delay": delay, "skip": skip,
    }  # fmt: skip


def _convolution(node: fx.Node) -> dict[str, Any]:
    channels, size = _type(argument(node, "weight")).shape
    return {
        "channels": channels, "size": size, "bias": argument(node, "bias") is not None,
        "dtype": _type(node).dtype,
    }  # fmt: skip


def _type(node: Any) -> TensorType:
    return before_cache(node).meta["type"]  # type: ignore[no-any-return]


def _cannot(what: str, node: fx.Node) -> ExportError:
    return ExportError(
        f"a bundle cannot have {what}", where=node.name, hint="the onnx target may support it"
    )
