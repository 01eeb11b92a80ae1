"""What every bundle has: reading weights, states in slots, prefill, decoding. Torch alone.

This file is copied into bundles, after the program's kernels and before its graphs.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """One attention of a program: its state is a ring of `prefix` + `window` keys and values.

    `near` launches its kernel over a prompt; without one, PyTorch's own attention does it.
    """

    trips: int
    heads: int
    kv_heads: int
    k_size: int
    v_size: int
    scale: float
    window: int | None
    prefix: int
    near: Any = None


@dataclass(frozen=True)
class Recurrence:
    """One token mixer of a program: `scan` and `step` launch its kernels.

    `features` maps queries and keys; `unit` brings them to length one; decays below `floor` are
    raised to it. The `key` is as "given", multiplied by a gate ("gated"), or what the decay lets go
    ("forgotten"). A token writes `delay` tokens late, and the first `skip` tokens never do. With
    `counted`, values have a column of ones, whose sum divides what is read if `normalise`.
    """

    trips: int
    heads: int
    kv_heads: int
    k_size: int
    v_size: int
    state: tuple[int, int]
    gates: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    scale: float
    scan: Any
    step: Any
    decay: bool = True
    delta: bool = False
    features: str = "none"
    unit: bool = False
    key: str = "given"
    floor: float | None = None
    counted: bool = False
    normalise: bool = False
    delay: int = 0
    skip: int = 0


@dataclass(frozen=True)
class Convolution:
    """One short convolution of a program: its state is the last `size` - 1 inputs.

    `scan` and `step` launch its kernels.
    """

    trips: int
    channels: int
    size: int
    bias: bool
    dtype: torch.dtype
    scan: Any
    step: Any


NUMBERS = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip


class Weights:
    """Tensors of safetensors files, by name, read from the files as they are needed."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.device = device
        self.places: dict[str, tuple[Path, int, Any]] = {}
        self.read: dict[str, Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            self.places |= {name: (path, 8 + size, about) for name, about in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on the device; the same one each time."""
        if name not in self.read:
            path, start, about = self.places[name]
            first, last = about["data_offsets"]
            with path.open("rb") as file:
                file.seek(start + first)
                data = bytearray(file.read(last - first))
            flat = torch.frombuffer(data, dtype=NUMBERS[about["dtype"]])
            self.read[name] = flat.reshape(about["shape"]).to(self.device)
        return self.read[name]


class States:
    """States of all sites and trips for some slots, and how many tokens each slot has had."""

    def __init__(
        self, sites: list[Any], slots: int, max_length: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        def zeros(*shape: int, like: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=like, device=device)

        self.count = zeros(slots, like=torch.long)
        self.max_length = max_length
        self.tensors: dict[tuple[int, int], list[Tensor]] = {}
        for number, site in enumerate(sites):
            for trip in range(site.trips):
                if isinstance(site, Attention):
                    size = site.prefix + site.window if site.window else max_length
                    parts = [zeros(slots, site.kv_heads, size, n)
                             for n in (site.k_size, site.v_size)]  # fmt: skip
                elif isinstance(site, Convolution):
                    parts = [zeros(slots, site.channels, site.size - 1, like=site.dtype)]
                else:
                    parts = [zeros(slots, site.kv_heads, *site.state, like=torch.float32)]
                    if site.delay:
                        shapes = [((site.k_size,), site.dtype), ((site.v_size,), site.dtype)]
                        shapes += [(shape, torch.float32) for shape in site.gates]
                        parts += [zeros(slots, site.kv_heads, site.delay, *shape, like=like)
                                  for shape, like in shapes]  # fmt: skip
                self.tensors[number, trip] = parts

    def bytes(self) -> int:
        """Of all states."""
        return sum(t.nbytes for parts in self.tensors.values() for t in parts)


class Prefill:
    """The first tokens of sequences, which go to slots. `mask` [rows, time]: False at padding,
    which stands before the tokens of a row.
    """

    def __init__(self, states: States, sites: list[Any], slots: Tensor, mask: Tensor) -> None:
        self.states, self.sites, self.slots, self.mask = states, sites, slots, mask
        self.number = mask.long().cumsum(-1) - 1
        self.position = self.number.clamp(min=0)
        self.last = self.number[:, -1:]
        self.padding = mask.shape[1] - 1 - self.last

    def attention(self, site: int, trip: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention [rows, time, heads, v_size], and the keys and values of its state."""
        about = self.sites[site]
        if about.near is None:
            out = over_prompt(about, q, k, v, self.number, self.mask)
        else:
            out = about.near(q, k, v, about.scale, about.window, about.prefix, self.padding)
        for pool, new in zip(self.states.tensors[site, trip], (k, v), strict=True):
            pool[self.slots] = self._kept(new, about.prefix, about.window, pool.shape[2])
        return out

    def recurrence(
        self, site: int, trip: int, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor]
    ) -> Tensor:
        """What a token mixer reads [rows, time, heads, v_size], and its state."""
        about = self.sites[site]
        state, *waiting = self.states.tensors[site, trip]
        for pool, new in zip(waiting, (k, v, *gates), strict=bool(waiting)):
            pool[self.slots] = self._kept(new, 0, about.delay, about.delay).to(pool.dtype)
        writes = self.mask & (self.number >= about.skip)
        k, v, *gates = (_later(x, about.delay, 2) for x in (k, v, *gates))
        writes = _later(writes, about.delay, 1)[:, None]
        q, k, v, g, beta = prepared(about, q, k, v, gates, writes)
        out, end = about.scan(q, k, v, g, beta)
        state[self.slots] = end
        return finished(about, out, q.dtype)

    def convolution(
        self, site: int, trip: int, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """A short convolution of x [rows, channels, time], and its last inputs."""
        out, end = self.sites[site].scan(x, weight, bias)
        self.states.tensors[site, trip][0][self.slots] = end
        return out  # type: ignore[no-any-return]

    def _kept(self, x: Tensor, prefix: int, window: int | None, size: int) -> Tensor:
        """Of tokens x [rows, heads, time, ...] those that a ring keeps, each in its place."""
        place = torch.arange(size, device=x.device)
        number = in_ring(place, self.last, prefix, window)
        column = (number + self.padding).clamp(0, x.shape[2] - 1)
        index = column.view(len(x), 1, size, *(1 for _ in x.shape[3:]))
        return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))


class Decode:
    """One more token for each row, whose states are in slots."""

    def __init__(self, states: States, sites: list[Any], slots: Tensor) -> None:
        self.states, self.sites, self.slots = states, sites, slots
        self.number = states.count[slots]
        self.position = self.number[:, None]
        self.mask = torch.ones_like(self.position, dtype=torch.bool)

    def attention(self, site: int, trip: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As for prefill, of one token."""
        about = self.sites[site]
        keys, values = self.states.tensors[site, trip]
        n, size = self.number, keys.shape[2]
        place = n
        if about.window:
            turned = about.prefix + (n - about.prefix) % about.window
            place = torch.where(n < about.prefix, n, turned)
        keys[self.slots, :, place] = k[:, :, 0]
        values[self.slots, :, place] = v[:, :, 0]
        every = torch.arange(size, device=n.device)
        number = in_ring(every, n[:, None], about.prefix, about.window)
        seen = (number >= 0) & (number <= n[:, None])
        out = F.scaled_dot_product_attention(
            q, keys[self.slots], values[self.slots], attn_mask=seen[:, None, None],
            scale=about.scale, enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2)

    def recurrence(
        self, site: int, trip: int, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor]
    ) -> Tensor:
        """As for prefill, of one token; the state is updated in place."""
        about = self.sites[site]
        state, *waiting = self.states.tensors[site, trip]
        tensors = [k, v, *gates]
        if about.delay:
            place = self.number % about.delay
            turn = [pool[self.slots, :, place] for pool in waiting]
            for pool, new in zip(waiting, tensors, strict=True):
                pool[self.slots, :, place] = new[:, :, 0].to(pool.dtype)
            tensors = [x.unsqueeze(2) for x in turn]
        writes = (self.number - about.delay >= about.skip)[:, None, None]
        k, v, *gates = tensors
        q, k, v, g, beta = prepared(about, q, k, v, gates, writes)
        out = about.step(
            q[:, :, 0], k[:, :, 0], v[:, :, 0], None if g is None else g[:, :, 0],
            None if beta is None else beta[:, :, 0], state, self.slots,
        )  # fmt: skip
        return finished(about, out[:, None], q.dtype)

    def convolution(
        self, site: int, trip: int, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """As for prefill, of one token; the state is updated in place."""
        (state,) = self.states.tensors[site, trip]
        out: Tensor = self.sites[site].step(x[:, :, 0], weight, bias, state, self.slots)
        return out[:, :, None]


def over_prompt(
    about: Attention, q: Tensor, k: Tensor, v: Tensor, number: Tensor, mask: Tensor
) -> Tensor:
    """Attention of all tokens of a prompt [rows, time, heads, v_size], by PyTorch."""
    row, key = number[:, :, None], number[:, None, :]
    seen = (key <= row) & mask[:, None, :]
    if about.window:
        seen &= (key > row - about.window) | (key < about.prefix)
    # what is read at padding means nothing, but must be a number
    seen |= torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[:, None], scale=about.scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def in_ring(place: Tensor, last: Tensor, prefix: int, window: int | None) -> Tensor:
    """The number of the token that a ring holds in each place when token `last` is in it.

    The first `prefix` tokens stay, the others go round; below 0 where there is none.
    """
    if not window:
        return place.expand(last.shape[0], -1)
    behind = last - prefix - (last - place) % window
    round_ = torch.where(behind >= 0, behind + prefix, -1)
    return torch.where(place < prefix, place, round_)


def prepared(
    about: Recurrence, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], writes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the kernels of a mixer take: queries, keys, values, log decays, strengths of writes.

    Where `writes` [rows, 1, time] is False, nothing is written and nothing fades.
    """
    dtype, left = k.dtype, [g.float() for g in gates]
    g = left.pop(0) if about.decay else None
    beta = left.pop(0) if about.delta or about.key == "gated" else None
    if g is not None and about.floor is not None:
        g = g.clamp(min=about.floor)
    q, k = features(q, about.features), features(k, about.features)
    if about.unit:
        q, k = (
            x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (q, k)
        )
    if about.key == "gated" and beta is not None:
        k, beta = k * beta[..., None], None
    elif about.key == "forgotten" and g is not None:
        k = -g.expm1()
    if about.counted:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    k = k.masked_fill(~writes[..., None], 0.0)
    if g is not None:
        g = g.masked_fill(~(writes if g.dim() == 3 else writes[..., None]), 0.0)
    if beta is not None:
        beta = beta.masked_fill(~writes, 0.0)
    return (q * about.scale).to(dtype), k.to(dtype), v.to(dtype), g, beta


def finished(about: Recurrence, out: Tensor, dtype: torch.dtype) -> Tensor:
    """What is read, divided by the sum of weights where the mixer has one."""
    if not about.counted:
        return out.to(dtype)
    values, weights = out[..., :-1], out[..., -1:]
    return (values / weights.clamp(min=1e-6) if about.normalise else values).to(dtype)


def features(x: Tensor, name: str) -> Tensor:
    """The feature map of this name, in fp32."""
    if name == "none":
        return x
    x = x.float()
    if name == "elu":
        return F.elu(x) + 1
    if name == "relu":
        return torch.relu(x)
    if name == "softmax":
        return x.softmax(-1)
    if name == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp(min=1e-12)
    raise ValueError(f"no feature map {name}")


def _later(x: Tensor, count: int, dim: int) -> Tensor:
    """Shifted along time: the first `count` tokens are zeros, and as many at the end are gone."""
    if not count:
        return x
    shape = list(x.shape)
    shape[dim] = min(count, x.shape[dim])
    return torch.cat([x.new_zeros(shape), x], dim).narrow(dim, 0, x.shape[dim])
