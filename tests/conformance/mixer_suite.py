"""What holds for every mixer: inherit `MixerSuite` and give a mixer.

    class TestRetention(MixerSuite):
        mixer = make("retention", {"chunk_size": 8})

The three forms agree in value, in every gradient and in the state, however a sequence is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reroll.errors import UsageError
from reroll.mixers import Mixer, State, make
from reroll.mixers.feature_maps import FEATURE_MAPS
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_inputs import (
    BATCH,
    D_K,
    D_V,
    HEADS,
    KV_HEADS,
    TIME,
    Inputs,
    assert_close,
    draw,
)
from tests.conformance.mixer_states import StateSuite

# bf16 rounds to 2^-8 = 3.9e-3 of a value; a gradient sees the rounding of what comes in, of a
# product, and of what goes out
GRADIENT_BF16 = 3 * 2**-8

Form = Callable[..., tuple[Tensor, State]]


def with_gradients(form: Form, inputs: Inputs, **keywords: Any) -> dict[str, Tensor]:
    """What a form returns, and the gradient of all of it by everything that goes in."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs.tensors()]
    count = 3 + len(inputs.gates)
    q, k, v, *gates = leaves[:count]
    out, state = form(q, k, v, gates, tuple(leaves[count:]), **keywords)
    seed = torch.Generator().manual_seed(1)
    loss = sum(
        (t.double() * torch.randn(t.shape, dtype=torch.float64, generator=seed)).sum()
        for t in (out, *state)
    )
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    found = {"out": out} | {f"state {i}": s for i, s in enumerate(state)}
    return found | {f"gradient {i}": g for i, g in enumerate(grads)}


def by_core(mixer: Mixer, inputs: Inputs) -> Tensor:
    """`reroll.mixers.core` written out, from a state of zeros: [batch, time, heads, d_v]."""
    core, (q, k, v, gates, _) = mixer.core, inputs
    assert core is not None
    scale = mixer.default_scale(D_K) if mixer.scale is None else mixer.scale
    floors = [gate.floor for gate in mixer.gates(D_K, D_V)]
    gates = tuple(
        g if low is None else g.clamp(min=low) for g, low in zip(gates, floors, strict=True)
    )
    if mixer.key_map != "none":
        q, k = FEATURE_MAPS[mixer.key_map](q), FEATURE_MAPS[mixer.key_map](k)
    if mixer.unit_length:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if core.key == "gated":
        k = k * gates[1][..., None]
    elif core.key == "forgotten":
        k = 1 - gates[0].exp()
    if core.decay == "selective":
        v = v * gates[0]
    if core.counts:
        v = torch.nn.functional.pad(v, (0, 1), value=1.0)
    q = q * scale
    state = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    outs = []
    for t in range(k.shape[2]):
        if core.decay == "head":
            state = state * gates[0][:, :, t, None, None].exp()
        elif core.decay == "channel":
            state = state * gates[0][:, :, t, :, None].exp()
        elif core.decay == "selective":
            state = state * (gates[0][:, :, t, None, :] * gates[1][:, :, t]).exp()
        write = v[:, :, t]
        if core.delta:
            held = torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
            write = gates[-1][:, :, t, None] * (write - held)
        state = state + k[:, :, t, :, None] * write[..., None, :]
        read = torch.einsum("bhgk,bhkv->bhgv", q[:, :, t].unflatten(1, (k.shape[1], -1)), state)
        if core.counts:
            read, sums = read[..., :-1], read[..., -1:]
            read = read / sums.clamp(min=1e-6) if mixer.normalised else read
        outs.append(read.flatten(1, 2))
    return torch.stack(outs, 1)


class MixerSuite(StateSuite):
    """Tests of one mixer."""

    mixer: ClassVar[Mixer]

    def compare(self, inputs: Inputs, dtype: torch.dtype, **keywords: Any) -> None:
        """All forms against `parallel`."""
        wanted = with_gradients(self.mixer.parallel, inputs, **keywords)
        for form in (self.mixer.chunk, self.mixer.recur):
            for key, value in with_gradients(form, inputs, **keywords).items():
                tolerance = tolerances.forward(dtype)
                if key.startswith("gradient") and dtype != torch.float64:
                    tolerance = tolerances.GRADIENT
                assert_close(value, wanted[key], tolerance, f"{form.__name__}: {key}")

    # ---- the declaration

    def test_its_options_survive_text(self) -> None:
        assert make(self.mixer.name, self.mixer.text()) == self.mixer
        with pytest.raises(UsageError, match="there is no option 'chunksize'"):
            make(self.mixer.name, {"chunksize": 8})

    def test_its_state_has_the_declared_shape(self) -> None:
        inputs = draw(self.mixer)
        shapes = self.mixer.state_shapes(D_K, D_V)
        assert [s.shape[2:] for s in inputs.state] == [torch.Size(s) for s in shapes]
        numbers = sum(s[0, 0].numel() for s in inputs.state)
        assert self.mixer.state_bytes(KV_HEADS, D_K, D_V) == 4 * KV_HEADS * numbers
        assert self.mixer.flops(HEADS, KV_HEADS, D_K, D_V) > numbers

    def test_its_core_is_what_it_computes(self) -> None:
        mixer, inputs = self.mixer, draw(self.mixer)
        if mixer.core is None:
            return
        expected, _ = mixer.recur(*inputs.at(slice(None)))
        assert_close(by_core(mixer, inputs), expected, 1e-12, "what the core says")

    def test_its_gates_can_be_made(self) -> None:
        raw, key = torch.linspace(-4, 4, 9), torch.randn(BATCH, KV_HEADS, TIME, D_K)
        for gate in self.mixer.gates(D_K, D_V):
            made = [gate.activation(raw), *(f(key) for f in gate.from_key.values())]
            for value in made:
                assert ((value >= gate.low) & (value <= gate.high)).all(), gate.name
            for value in made[1:]:
                assert value.shape == (*key.shape[:3], *gate.shape), gate.name
            if gate.inverse is not None:
                back = torch.tensor([gate.inverse(float(v)) for v in made[0]])
                assert_close(back, raw, 1e-4, f"inverse of {gate.name}")

    # ---- three forms of one function

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_forms_agree(self, dtype: torch.dtype) -> None:
        padding = torch.ones(BATCH, TIME)
        padding[0, :7] = 0
        self.compare(draw(self.mixer, dtype), dtype, padding=padding)

    def test_the_forms_agree_in_bfloat16(self) -> None:
        inputs = draw(self.mixer, torch.bfloat16)
        wide = Inputs(*(t.float() for t in inputs[:3]), *inputs[3:])
        wanted, wanted_state = self.mixer.parallel(*wide)
        for form in (self.mixer.chunk, self.mixer.recur):
            out, state = form(*inputs)
            assert out.dtype == torch.bfloat16
            assert_close(out, wanted, tolerances.forward(torch.bfloat16), form.__name__)
            for s, w in zip(state, wanted_state, strict=True):
                assert s.dtype == torch.float32
                assert_close(s, w, tolerances.forward(torch.bfloat16), f"state of {form.__name__}")

    def test_the_gradients_agree_in_bfloat16(self) -> None:
        inputs = draw(self.mixer, torch.bfloat16)
        wide = Inputs(*(t.float() for t in inputs[:3]), *inputs[3:])
        wanted = with_gradients(self.mixer.parallel, wide)
        for form in (self.mixer.chunk, self.mixer.recur):
            for key, value in with_gradients(form, inputs).items():
                if key.startswith("gradient"):
                    assert_close(value, wanted[key], GRADIENT_BF16, f"{form.__name__}: {key}")

    def test_any_split_gives_the_same(self) -> None:
        @settings(max_examples=8, deadline=None, derandomize=True)
        @given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 9))
        def check(lengths: list[int], seed: int) -> None:
            inputs = draw(self.mixer, time=sum(lengths), seed=seed)
            outs, state, start = [], inputs.state, 0
            for length in lengths:
                form = self.mixer.step if length == 1 else self.mixer.chunk
                out, state = form(*inputs.at(slice(start, start + length)), state)
                outs, start = [*outs, out], start + length
            self.same((torch.cat(outs, 1), state), self.mixer.parallel(*inputs))

        check()

    def test_a_constant_gate_is_given_once(self) -> None:
        declared, inputs = self.mixer.gates(D_K, D_V), draw(self.mixer)
        if not any(gate.constant for gate in declared):
            return
        once = [g[:1, :, :1] if gate.constant else g
                for g, gate in zip(inputs.gates, declared, strict=True)]  # fmt: skip
        often = [g.expand(*inputs.k.shape[:3], *g.shape[3:]) for g in once]
        segments = torch.arange(TIME).expand(BATCH, -1) // 8
        for keywords in ({}, {"padding": (segments > 0).long()}, {"segments": segments}):
            for form in (self.mixer.parallel, self.mixer.chunk):
                wanted = self.mixer.parallel(*inputs[:3], often, inputs.state, **keywords)
                self.same(form(*inputs[:3], once, inputs.state, **keywords), wanted)
        wanted = self.mixer.parallel(*inputs[:3], often, inputs.state)
        self.same(self.mixer.recur(*inputs[:3], once, inputs.state), wanted)
        op = torch.ops.reroll.recurrence
        name, options = self.mixer.name, self.mixer.text()
        for delay in (0, 2):
            found, wanted = (op(*inputs[:3], list(g), name, options, None, delay)
                             for g in (once, often))  # fmt: skip
            assert_close(found, wanted, 1e-10, f"the op with a delay of {delay}")

    def test_query_heads_share_a_state(self) -> None:
        inputs, groups = draw(self.mixer), HEADS // KV_HEADS
        apart = [t.repeat_interleave(groups, 1) for t in inputs.tensors()[1:]]
        count = 2 + len(inputs.gates)
        out, _ = self.mixer.chunk(inputs.q, *apart[:2], apart[2:count], tuple(apart[count:]))
        assert_close(self.mixer.chunk(*inputs)[0], out, 1e-10, "grouped heads")

    # ---- padding and packing

    @pytest.mark.parametrize("form", ["parallel", "chunk", "recur"])
    def test_padding_leaves_the_state_alone(self, form: str) -> None:
        inputs, run = draw(self.mixer), getattr(self.mixer, form)
        padding = torch.ones(BATCH, TIME)
        padding[:, :5], padding[:, 11:13] = 0, 0
        seen = padding[0].bool()
        wanted = run(*inputs.at(seen), inputs.state)
        # whatever stands in padding, nothing of it may be seen
        gates = zip(inputs.gates, self.mixer.gates(D_K, D_V), strict=True)
        for tensor in (*inputs[:3], *(t for t, gate in gates if not gate.constant)):
            tensor[:, :, ~seen] = torch.nan
        out, state = run(*inputs, padding=padding)
        assert out.isfinite().all()
        self.same((out[:, seen], state), wanted)

    @pytest.mark.parametrize("form", ["parallel", "chunk"])
    def test_packed_sequences_do_not_meet(self, form: str) -> None:
        inputs, run = draw(self.mixer), getattr(self.mixer, form)
        cuts: Sequence[Sequence[int]] = ((4, 5, 13), (17,))
        segments = torch.zeros(BATCH, TIME, dtype=torch.long)
        for row, places in enumerate(cuts):
            for place in places:
                segments[row, place:] += 1
        padding = torch.ones(BATCH, TIME)
        padding[0, 14:16] = 0
        out, state = run(*inputs, segments=segments, padding=padding)
        for row, places in enumerate(cuts):
            last = self.mixer.initial_state(inputs.k[:1], inputs.v[:1])
            ends = [0, *places, TIME]
            for start, end in pairwise(ends):
                now, one = slice(start, end), slice(row, row + 1)
                before = tuple(s[one] for s in inputs.state) if start == 0 else None
                wanted, last = run(*inputs.at(now, one), before, padding[one, now])
                assert_close(out[one, now], wanted, 1e-10, f"row {row} from {start}")
            self.same((out[row], tuple(s[row : row + 1] for s in state)), (out[row], last))

    def same(self, found: tuple[Tensor, State], wanted: tuple[Tensor, State]) -> None:
        assert_close(found[0], wanted[0], 1e-10, "out")
        for i, (a, b) in enumerate(zip(found[1], wanted[1], strict=True)):
            assert_close(a, b, 1e-10, f"state {i}")

    # ---- in a program

    def test_the_op_runs_it_and_its_gradient(self) -> None:
        inputs = draw(self.mixer)
        leaves = [t.clone().requires_grad_() for t in inputs.tensors()[: 3 + len(inputs.gates)]]
        q, k, v, *gates = leaves
        padding = torch.ones(BATCH, TIME)
        padding[1, :4] = 0
        out = torch.ops.reroll.recurrence(
            q, k, v, gates, self.mixer.name, self.mixer.text(), padding
        )
        wanted, _ = self.mixer.parallel(q, k, v, gates, padding=padding)
        assert_close(out, wanted, 1e-10, "the op")
        seed = torch.randn_like(wanted)
        keywords = {"allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(out, leaves, seed, **keywords)
        for a, b in zip(found, torch.autograd.grad(wanted, leaves, seed, **keywords), strict=True):
            assert_close(a, b, 1e-10, "gradient of the op")

    def test_the_op_runs_it_from_both_ends(self) -> None:
        inputs = draw(self.mixer)
        q, k, v, gates = inputs[:4]
        padding = torch.ones(BATCH, TIME)
        padding[1, -4:] = 0
        name, options = self.mixer.name, self.mixer.text()
        out = torch.ops.reroll.bidirectional(q, k, v, list(gates), name, options, padding)
        forth, _ = self.mixer.parallel(q, k, v, gates, padding=padding)
        # a token late, so that its own write is not read again
        k, v, *gates = (t.flip(2).roll(1, 2) for t in (k, v, *gates))
        late = padding.flip(1).roll(1, 1)
        late[:, 0] = 0
        back, _ = self.mixer.parallel(q.flip(2), k, v, gates, padding=late)
        assert_close(out, forth + back.flip(1), 1e-10, "the op")
