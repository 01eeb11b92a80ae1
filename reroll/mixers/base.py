"""Token mixers: recurrences over the sequence with a state of constant size.

A mixer is a set of tensor functions without parameters. It takes

    q       [batch, heads, time, d_k]
    k       [batch, kv_heads, time, d_k]      v  [batch, kv_heads, time, d_v]
    gates   one tensor [batch, kv_heads, time, *shape] for each `Gate` that the mixer declares;
            of a constant one, batch and time may be 1
    state   fp32 tensors of `state_shapes`, one set for each key-value head; zeros if absent
    padding [batch, time], 0 at tokens that write nothing and leave the state as it is
    segments [batch, time], a number for each token; the state starts anew where it changes

and returns (out [batch, time, heads, d_v], the new state). It has three forms, which agree in
values, in every gradient and in the state, however a sequence is split over calls:

    parallel   the definition over a whole sequence, quadratic in time; for reading and testing
    chunk      matrix products within chunks, the state between chunks; for training and prefill
    step       the recurrence, one token; for decoding

Tokens behind a state may also be a tree of several continuations (`tree`): each token then reads
what its ancestors wrote. No one state is the one after them.

Heads are grouped as in attention: query heads [i * groups, (i + 1) * groups) read the state of
key-value head i. This module handles padding, packing, grouping, dtypes and the scale for all
mixers. A mixer's file defines only `parallel_form`, `chunk_form` and `step_form` on

    q [batch, kv_heads, groups, time, d_k], k, v [batch, kv_heads, time, ...], gates, state

`parallel` and `step` compute in fp32. `chunk` multiplies in the dtype of its inputs and keeps
gates, sums over time and the state in fp32. fp64 inputs are computed in fp64 throughout.

A new mixer is one file of this folder with a subclass of `Mixer` that sets `name`; see
`docs/mixers.md`.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from reroll.bounds import COUNT, FINITE
from reroll.errors import UsageError
from reroll.mixers import packing
from reroll.mixers.core import Core
from reroll.mixers.gates import Gate, given_once, wide
from reroll.mixers.trees import Tree
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import option

State: TypeAlias = tuple[Tensor, ...]
Gates: TypeAlias = tuple[Tensor, ...]
# q, k, v and gates, as `prepare` returns them
Prepared: TypeAlias = tuple[Tensor, Tensor, Tensor, Gates]
Result: TypeAlias = tuple[Tensor, State]
Form: TypeAlias = Callable[[Tensor, Tensor, Tensor, Gates, State], Result]

# methods of which a subclass overrides one if it computes another recurrence
_MATHEMATICS = {"prepare", "parallel_form", "chunk_form", "step_form"}


class Mixer(Declared, ABC):
    """A token mixer. Its fields are its options, as those of a pass are.

    Attributes:
        core: the linear recurrence that it computes, for kernels and exporters; None if it is none.
            A subclass that overrides a form has no core unless it declares one.
        divides: the option by which it shares one normalisation with a window. `normalise` says
            whether it divides by its own sum of weights, `log_mass` whether it returns the log of
            it.
        has_slots: whether its state has `slots`, each for one cluster of keys.
        chunks_wide: whether the chunk form multiplies in fp32 whatever its inputs are.
    """

    category: ClassVar[str] = "mixer"
    name: ClassVar[str] = ""
    core: ClassVar[Core | None] = None
    divides: ClassVar[Literal["", "normalise", "log_mass"]] = ""
    has_slots: ClassVar[bool] = False
    chunks_wide: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "core" not in vars(cls) and _MATHEMATICS & set(vars(cls)):
            cls.core = None
        if "tree_form" not in vars(cls) and (_MATHEMATICS - {"prepare"}) & set(vars(cls)):
            # an inherited one is that of another recurrence
            cls.tree_form = Mixer.tree_form  # type: ignore[method-assign]

    chunk_size: int = option(
        64, within=COUNT, help="tokens that one chunk handles by matrix products"
    )
    scale: float | None = option(
        None, within=FINITE, help="factor on the queries; the mixer's own if none"
    )

    # ---- what a mixer declares

    @abstractmethod
    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        """Return the gates it takes, in order."""

    @abstractmethod
    def state_shapes(self, d_k: int, d_v: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of its state for one sequence and one key-value head."""

    @property
    def key_map(self) -> str:
        """Feature map that `prepare` applies to queries and keys; "none" for none."""
        return "none"

    @property
    def unit_length(self) -> bool:
        """Whether `prepare` scales queries and keys to length one."""
        return False

    @property
    def normalised(self) -> bool:
        """Whether the output is divided by the sum of weights that the core counts."""
        return False

    @property
    def longest_chunk(self) -> int | None:
        """Largest chunk, in tokens, that its decay allows; None for any number."""
        return None

    def default_scale(self, d_k: int) -> float:
        """Return the factor on the queries if the option gives none: d_k^-1/2."""
        return 1 / math.sqrt(d_k)

    def write_flops(self, d_k: int, d_v: int) -> int:
        """Count operations for one head and token to update the state; decay and add by default."""
        return 3 * sum(map(math.prod, self.state_shapes(d_k, d_v)))

    # ---- the mathematics

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Prepared:
        """Transform each token alone, before padding is removed: feature maps, norms.

        Computes in fp32 whatever the dtype of its inputs, and may return fp32.
        """
        return q, k, v, gates

    @abstractmethod
    def parallel_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        """Compute all tokens at once; out is [batch, kv_heads, groups, time, d_v]."""

    @abstractmethod
    def chunk_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        """Compute the same in chunks."""

    @abstractmethod
    def step_form(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
        """Compute the same for one token: every tensor is without its time dimension."""

    def tree_form(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, tree: Tree
    ) -> Tensor:
        """Compute the tokens of a tree: what each reads, as in `parallel_form`.

        By default each token takes a step from its parent's state, all of one depth at once.
        """
        batch, outs, before = k.shape[0], [], state
        places = torch.zeros(len(tree), dtype=torch.long, device=k.device)
        for level in tree.levels:
            # the tokens of a level are rows of the batch
            def rows(x: Tensor, dim: int, at: Tensor = level) -> Tensor:
                return x.index_select(dim, at).movedim(dim, 0).flatten(0, 1)

            parents = tree.parents[level]
            where = places[parents] if int(parents[0]) >= 0 else torch.zeros_like(parents)
            states = tuple(s.unflatten(0, (-1, batch))[where].flatten(0, 1) for s in before)
            now = tuple(g[:, :, 0] if given_once(g) else rows(g, 2) for g in gates)
            out, before = self.step_form(rows(q, 3), rows(k, 2), rows(v, 2), now, states)
            outs.append(out.unflatten(0, (-1, batch)))
            places[level] = torch.arange(len(level), device=k.device)
        # [n, batch, kv_heads, groups, d_v], level by level
        order = torch.cat(tree.levels).argsort()
        return torch.cat(outs)[order].movedim(0, 3)

    # ---- the forms that callers use

    def parallel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        state: State | None = None,
        padding: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Result:
        """Compute the definition: quadratic in time, everything in fp32."""
        return self._run(self.parallel_form, True, q, k, v, gates, state, padding, segments)

    def chunk(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        state: State | None = None,
        padding: Tensor | None = None,
        segments: Tensor | None = None,
        form: Form | None = None,
    ) -> Result:
        """Compute by matrix products within chunks: for training and prefill.

        `form` replaces `chunk_form`: a kernel that computes the same.
        """
        exact = self.chunks_wide and form is None
        run = form or self.chunk_form
        return self._run(run, exact, q, k, v, gates, state, padding, segments)

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        state: State | None = None,
        padding: Tensor | None = None,
        form: Form | None = None,
    ) -> Result:
        """Compute one token of the recurrence, for decoding; `form` replaces `step_form`."""
        if k.shape[2] != 1:
            raise UsageError(
                f"step takes one token, not {k.shape[2]}",
                where=f"mixer {self.name}",
                hint="use chunk for several tokens onto a state",
            )
        run = form or self.step_form

        def one(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
            now = tuple(g[:, :, 0] for g in gates)
            out, state = run(q[..., 0, :], k[:, :, 0], v[:, :, 0], now, state)
            return out.unsqueeze(-2), state

        return self._run(one, True, q, k, v, gates, state, padding)

    def tree(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        tree: Tree,
        state: State | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Compute the tokens of a tree behind a state, in fp32: [batch, time, heads, d_v]."""
        if k.shape[2] != len(tree):
            raise UsageError(
                f"there are {k.shape[2]} tokens, and {len(tree)} in the tree",
                where=f"mixer {self.name}",
            )

        def run(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State) -> Result:
            return self.tree_form(q, k, v, gates, state, tree), state

        return self._run(run, True, q, k, v, gates, state, padding)[0]

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        state: State | None = None,
        padding: Tensor | None = None,
    ) -> Result:
        """Run `step` for each token in turn."""
        outs = []
        for t in range(k.shape[2]):
            now = slice(t, t + 1)
            out, state = self.step(
                q[:, :, now], k[:, :, now], v[:, :, now],
                [g if given_once(g) else g[:, :, now] for g in gates],
                state, None if padding is None else padding[:, now],
            )  # fmt: skip
            outs.append(out)
        assert state is not None
        return torch.cat(outs, 1), state

    def initial_state(self, k: Tensor, v: Tensor) -> State:
        """Return the zero state for these keys and values."""
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        shapes = self.state_shapes(k.shape[-1], v.shape[-1])
        return tuple(k.new_zeros(*k.shape[:2], *s, dtype=dtype) for s in shapes)

    # ---- what the op and its costs need

    def text(self) -> str:
        """Return the options that differ from their defaults, as JSON text."""
        return json.dumps(self.changed_options())

    def flops(self, heads: int, kv_heads: int, d_k: int, d_v: int) -> int:
        """Count operations for one more token: heads write, query heads read all the state."""
        read = 2 * sum(map(math.prod, self.state_shapes(d_k, d_v)))
        return kv_heads * self.write_flops(d_k, d_v) + heads * read

    def state_bytes(self, kv_heads: int, d_k: int, d_v: int) -> int:
        """Return the bytes of state of one sequence, in fp32."""
        return 4 * kv_heads * sum(map(math.prod, self.state_shapes(d_k, d_v)))

    # ---- plumbing

    def _run(
        self,
        form: Form,
        exact: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        state: State | None,
        padding: Tensor | None,
        segments: Tensor | None = None,
    ) -> Result:
        """Run a form on each segment; its inputs are wide if `exact`."""
        state = self.initial_state(k, v) if state is None else state
        if segments is not None:
            run = partial(self._run, form, exact)
            return packing.apart(run, q, k, v, gates, state, padding, segments)
        dtype = v.dtype
        q, k, v, ready = self._ready(q, k, v, gates, padding, exact=exact)
        out, state = form(q, k, v, ready, state)
        # from [batch, kv_heads, groups, time, d_v] to [batch, time, heads, d_v]
        return out.to(dtype).flatten(1, 2).transpose(1, 2), state

    def _ready(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        padding: Tensor | None,
        *,
        exact: bool,
    ) -> Prepared:
        """Convert inputs to what the forms take: wide if `exact`, padding masked, heads grouped."""
        declared = self.gates(k.shape[-1], v.shape[-1])
        self._check_shapes(q, k, v, gates, declared)
        dtype = k.dtype
        scale = self.default_scale(q.shape[-1]) if self.scale is None else self.scale
        hidden = None if padding is None else padding[:, None, :, None] == 0
        ready = [wide(g) for g in gates]
        if hidden is not None:
            # before anything is computed: padded tokens may hold anything, also NaN
            k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
            # finite queries are kept: with a delay, a query and the write at its position are
            # different tokens
            q = q.masked_fill(hidden & ~q.isfinite(), 0.0)
        for i, gate in enumerate(declared):
            if hidden is not None and not gate.constant:
                away = hidden[..., 0].view(*hidden.shape[:3], *(1 for _ in gate.shape))
                ready[i] = ready[i].masked_fill(away, gate.neutral)
            if gate.floor is not None:
                ready[i] = ready[i].clamp(min=gate.floor)
        if exact:
            q, k, v = wide(q), wide(k), wide(v)
        q, k, v, prepared = self.prepare(q, k, v, tuple(ready))
        if scale != 1.0:
            q = q * scale
        if hidden is not None:
            # the feature map of zeros need not be zero
            k = k.masked_fill(hidden, 0.0)
        if not exact:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        groups = q.shape[1] // k.shape[1]
        return torch.unflatten(q, 1, (k.shape[1], groups)), k, v, prepared

    def _check_shapes(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], declared: tuple[Gate, ...]
    ) -> None:
        problem = None
        if len(gates) != len(declared):
            problem = f"takes {len(declared)} gates ({', '.join(g.name for g in declared)}), " \
                      f"not {len(gates)}"  # fmt: skip
        elif q.shape[1] % k.shape[1]:
            problem = f"{q.shape[1]} query heads do not divide into {k.shape[1]} key-value heads"
        else:
            for gate, tensor in zip(declared, gates, strict=True):
                wanted, given = (*k.shape[:3], *gate.shape), tuple(tensor.shape)
                once = (1, k.shape[1], 1, *gate.shape)
                if given != wanted and not (gate.constant and given == once):
                    problem = f"gate {gate.name} is {given}, not {wanted}"
        if problem is not None:
            raise UsageError(problem, where=f"mixer {self.name}")
