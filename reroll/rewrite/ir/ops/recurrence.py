"""Token mixers: recurrences over a sequence, in one direction or in both.

The rule of a mixer is looked up by its name, see `reroll.rewrite.ir.rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops.base import Place, count, register
from reroll.rewrite.ir.rules import find_rule

# (q, k, v, gates, mask [batch, time] of tokens that write) -> [batch, time, heads, d_v]
Run: TypeAlias = Callable[[Tensor, Tensor, Tensor, list[Tensor], Tensor | None], Tensor]


@torch.library.custom_op("reroll::recurrence", mutates_args=())
def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    rule: str,
    options: str,
    padding: Tensor | None = None,
    delay: int = 0,
    skip: int = 0,
    active: bool = True,
    idle: Tensor | None = None,
) -> Tensor:
    """Run a token mixer with a state of fixed size over a sequence, from the zero state.

    `q`: [batch, heads, time, d_k]; `k`: [batch, kv_heads, time, d_k]; `v` likewise with d_v;
    `gates`: tensors [batch, kv_heads, time, ...] in the order in which the mixer declares them;
    one that is the same for all tokens may have 1 in place of batch and time.
    `rule` names a mixer of `reroll.mixers`; `options` is a JSON object of its options. `padding`
    [batch, time] is 0 at tokens that do not change the state.

    `delay`: token t reads the state after token t - `delay`, so it sees what an attention over a
    window of that size does not. `skip`: the first `skip` tokens that are not padding do not write
    (see `prefix` of `mask`). Without `active` there is no state, and the result is zeros: for trips
    without a mixer. `idle` [batch, time] is True at new tokens that do not write although they are
    not padding.

    Returns [batch, time, heads, d_v].
    """
    with torch.no_grad():
        if not active:
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        out = scan(_rule(rule, options), q, k, v, gates, padding, delay, skip, idle)
    return out.contiguous()


@torch.library.custom_op("reroll::bidirectional", mutates_args=())
def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    rule: str,
    options: str,
    padding: Tensor | None = None,
    delay: int = 0,
    skip: int = 0,
    active: bool = True,
) -> Tensor:
    """Run a token mixer over a sequence in both directions, for attention that is not causal.

    The result is the sum of a forward and a backward recurrence from the zero state. A token's own
    write is in the forward one only. The arguments are those of `recurrence`; `delay`, `padding`
    and `skip` apply to both directions. It needs the whole sequence, so there is no state to
    continue from.

    Returns [batch, time, heads, d_v].
    """
    with torch.no_grad():
        if not active:
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        out = scan_both(_rule(rule, options), q, k, v, gates, padding, delay, skip)
    return out.contiguous()


@bidirectional.register_fake
@recurrence.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def scan(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    padding: Tensor | None,
    delay: int,
    skip: int,
    idle: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Run a mixer over a whole sequence; the arguments are those of `recurrence`.

    `documents` [batch, time] numbers the document of each token. Where the number changes, a
    document begins that depends on no earlier one; `run` must reset its state there.
    """
    writes = None if padding is None else padding.bool()
    if skip:
        writes = after_first(writes, k, skip, documents)
    writes = without_idle(writes, idle)
    if documents is not None and delay:
        writes = _inside(writes, documents, delay)
    k, v, *gates, writes = delayed([k, v, *gates], writes, delay)
    return run(q, k, v, gates, writes)


def scan_both(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    padding: Tensor | None,
    delay: int,
    skip: int,
) -> Tensor:
    """Run a mixer in both directions; the arguments are those of `bidirectional`."""
    writes = None if padding is None else padding.bool()
    if skip:
        writes = after_first(writes, k, skip)
    forth = scan(run, q, k, v, gates, writes, delay, 0)
    q, k, v, *gates = (t.flip(2) for t in (q, k, v, *gates))
    writes = None if writes is None else writes.flip(1)
    # a token's own write counts once
    return forth + scan(run, q, k, v, gates, writes, max(delay, 1), 0).flip(1)


def _rule(rule: str, options: str) -> Run:
    definition = find_rule(rule)
    return lambda q, k, v, gates, writes: definition.run(q, k, v, gates, options, writes)


def after_first(
    writes: Tensor | None, k: Tensor, skip: int, documents: Tensor | None = None
) -> Tensor:
    """Exclude the first `skip` tokens of each document from those that write [batch, time]."""
    if writes is None:
        writes = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    number = writes.long().cumsum(-1)
    if documents is not None:
        # the count restarts after the last token of the previous document
        begins = F.pad(documents.diff(dim=-1) != 0, (1, 0), value=True)
        before = torch.where(begins, number - writes.long(), 0)
        number = number - before.cummax(-1).values
    return writes & (number > skip)


def _inside(writes: Tensor | None, documents: Tensor, delay: int) -> Tensor:
    """Exclude from the tokens that write [batch, time] those delayed into another document."""
    later = F.pad(documents, (0, delay), value=-1)[:, delay:]
    inside = documents == later
    return inside if writes is None else writes & inside


def without_idle(writes: Tensor | None, idle: Tensor | None) -> Tensor | None:
    """Exclude idle tokens from those that write [batch, time]; None if all write."""
    if idle is None:
        return writes
    return ~idle if writes is None else writes & ~idle


def delayed(tensors: list[Tensor], writes: Tensor | None, delay: int) -> list[Any]:
    """Shift tensors [batch, heads, time, ...] and `writes` [batch, time] by `delay` tokens.

    The first tensor has all tokens; others may have 1 in place of batch and time.
    """
    if not delay:
        return [*tensors, writes]
    batch, _, time = tensors[0].shape[:3]
    tensors = [t.expand(batch, -1, time, *t.shape[3:]) for t in tensors]
    late = [
        torch.cat((t.new_zeros(*t.shape[:2], min(delay, time), *t.shape[3:]), t), 2)[:, :, :time]
        for t in tensors
    ]
    if writes is None:
        writes = torch.ones(batch, time, dtype=torch.bool, device=tensors[0].device)
    return [*late, F.pad(writes, (delay, 0))[:, :time]]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, gates, ctx.rule, ctx.options, padding, ctx.delay, ctx.skip, ctx.active, *rest = inputs
    rest = [padding, *rest]
    ctx.has = [x is not None for x in rest]
    ctx.save_for_backward(q, k, v, *gates, *(x for x in rest if x is not None))
    ctx.count = 3 + len(gates)


def _backward(scanned: Callable[..., Tensor]) -> Callable[..., tuple[Any, ...]]:
    """Return the backward function of an op; it keeps the inputs and reruns the sequence."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = [t.detach() for t in ctx.saved_tensors]
        inputs, rest = saved[: ctx.count], saved[ctx.count :]
        inputs = [t.requires_grad_(t.is_floating_point()) for t in inputs]
        if ctx.active:
            q, k, v, *gates = inputs
            padding, *idle = (rest.pop(0) if has else None for has in ctx.has)
            with torch.enable_grad():
                run = _rule(ctx.rule, ctx.options)
                out = scanned(run, q, k, v, gates, padding, ctx.delay, ctx.skip, *idle)
            grads = torch.autograd.grad(
                out, inputs, grad, allow_unused=True, materialize_grads=True
            )
        else:
            grads = tuple(map(torch.zeros_like, inputs))
        dq, dk, dv, *dgates = grads
        # one gradient for each argument of the call; PyTorch leaves out those at their defaults
        left_out = (None,) * (len(ctx.needs_input_grad) - 4)
        return dq, dk, dv, dgates, *left_out

    return backward


recurrence.register_autograd(_backward(scan), setup_context=_keep_inputs)
bidirectional.register_autograd(_backward(scan_both), setup_context=_keep_inputs)


RECURRENCE = torch.ops.reroll.recurrence.default
BIDIRECTIONAL = torch.ops.reroll.bidirectional.default


def _recurrence_flops(node: fx.Node, place: Place) -> int:
    if place.resolve(argument(node, "active")) is False:
        return 0
    rule, options, (heads, kv_heads, d_k, d_v) = _mixer(node, place)
    return find_rule(rule).flops(options, heads, kv_heads, d_k, d_v)


def _recurrence_state(node: fx.Node, place: Place) -> int:
    if place.resolve(argument(node, "active")) is False:
        return 0
    rule, options, (_, kv_heads, d_k, d_v) = _mixer(node, place)
    # tokens that were read and are not written to the state yet
    waiting = min(int(place.resolve(argument(node, "delay"))), place.context)
    held = 0
    for tensor in (*node.args[1:3], *node.args[3]):  # type: ignore[misc]
        type_ = tensor.meta["type"]  # [batch, kv_heads, time, ...]
        if type_.shape[2] == 1:
            # the same for all tokens: it does not wait with them
            continue
        held += count((type_.shape[1], *type_.shape[3:])) * type_.dtype.itemsize
    return find_rule(rule).state_bytes(options, kv_heads, d_k, d_v) + waiting * held


def _mixer(node: fx.Node, place: Place) -> tuple[str, str, tuple[int, ...]]:
    """Return the rule, options and sizes of a recurrence."""
    rule, options = (str(place.resolve(argument(node, name))) for name in ("rule", "options"))
    q, k, v = (shape(a) for a in node.args[:3])
    return rule, options, tuple(count((d,)) for d in (q[1], k[1], q[3], v[3]))


register(RECURRENCE, flops=_recurrence_flops, state=_recurrence_state)
# a bidirectional recurrence cannot be continued, so it has no state
register(BIDIRECTIONAL, flops=lambda node, place: 2 * _recurrence_flops(node, place))
