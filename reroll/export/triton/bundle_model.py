"""The model of a bundle: prefill, decoding, generation, self-test. This file is copied."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.export.triton.bundle_definitions import convolved, token_by_token
from reroll.export.triton.bundle_linear import _far, linear_error, pointwise_errors
from reroll.export.triton.bundle_runtime import (
    Attention,
    Convolution,
    Decode,
    Prefill,
    Recurrence,
    States,
    Weights,
    over_prompt,
)

# the bundle has its own
main: Any = None
SITES: list[Any] = []
LINEARS: list[Any] = []
DTYPE: torch.dtype = torch.float32


class Named(dict[str, Tensor]):
    """Weights of the main graph by name; `trips[loop][trip]` are those of a trip of a loop."""

    trips: dict[str, list[dict[str, Tensor]]]


class Model:
    """The program with its weights, and states for a number of sequences.

        model = Model("directory")
        model.selftest()
        print(model.generate([[1, 2, 3]], 20))

    `slots` sequences at once; attention without a window keeps up to `max_length` tokens.
    """

    def __init__(
        self, directory: str | Path, device: str | None = None, slots: int = 8,
        max_length: int = 4096,
    ) -> None:  # fmt: skip
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(device)
        if self.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("without a GPU, set TRITON_INTERPRET=1 before triton is imported")
        with torch.no_grad():
            self.w = _weights(Path(directory), self.device)
            self.states = States(SITES, slots, max_length, DTYPE, self.device)
        # by the number of rows: the graph, what it reads and what it writes
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor], Tensor]] = {}

    @torch.no_grad()
    def prefill(self, ids: Any, mask: Any = None, slots: Any = None) -> Tensor:
        """Logits [rows, time, vocabulary] of prompts, which begin in `slots` (0, 1, ... if none).

        `ids` [rows, time]; `mask` is 0 at padding, which stands before the tokens of a row.
        """
        ids = torch.as_tensor(ids, device=self.device)
        kept = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device=self.device)
        run = Prefill(self.states, SITES, self._slots(len(ids), slots), kept.bool())
        logits: Tensor = main(self.w, run, ids)
        self.states.count[run.slots] = kept.long().sum(-1)
        return logits

    @torch.no_grad()
    def decode(self, tokens: Any, slots: Any = None) -> Tensor:
        """Logits [rows, vocabulary] after one more token [rows] of each sequence."""
        tokens = torch.as_tensor(tokens, device=self.device)
        slots = self._slots(len(tokens), slots)
        if self.device.type != "cuda":
            return self._step(tokens, slots)
        return self._captured(tokens, slots)

    def _step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        run = Decode(self.states, SITES, slots)
        logits: Tensor = main(self.w, run, tokens[:, None])[:, -1]
        self.states.count[slots] += 1
        return logits

    def _captured(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """The same as a CUDA graph, one for each number of rows."""
        rows = len(tokens)
        if rows not in self.graphs:
            held = tokens.clone(), slots.clone()
            kept = self._snapshot()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # compiles the kernels
                self._step(*held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self._step(*held)
            self._restore(kept)
            self.graphs[rows] = graph, held, out
        graph, held, out = self.graphs[rows]
        held[0].copy_(tokens)
        held[1].copy_(slots)
        graph.replay()
        return out.clone()

    def generate(self, ids: Any, count: int, stop: Any = ()) -> list[list[int]]:
        """`count` tokens after each prompt, the likeliest each time; ends at tokens of `stop`."""
        longest = max(map(len, ids))
        rows = [[0] * (longest - len(row)) + list(row) for row in ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
        logits = self.prefill(rows, mask)[:, -1]
        found: list[list[int]] = [[] for _ in ids]
        open_ = [True] * len(found)
        for number in range(count):
            tokens = logits.argmax(-1)
            for i, token in enumerate(tokens.tolist()):
                if open_[i]:
                    found[i].append(token)
                    open_[i] = token not in stop
            if number + 1 == count or not any(open_):
                break
            logits = self.decode(tokens)
        return found

    def selftest(self) -> dict[str, float]:
        """Every kernel against its definition, on this device: relative errors, by kernel.

        Raises RuntimeError if one is too large. Run it once on each kind of GPU: compilers have
        miscompiled kernels of this sort before.
        """
        found: dict[str, float] = {}
        limit = {torch.float32: 1e-4}.get(DTYPE, 2e-2)
        tested = []
        for site in SITES:
            if isinstance(site, Recurrence) and site.scan not in tested:
                tested.append(site.scan)
                found |= _errors(site, self.device)
            elif isinstance(site, Convolution) and site.scan not in tested:
                tested.append(site.scan)
                found |= _convolution_errors(site, self.device)
            elif isinstance(site, Attention) and site.near and site.near not in tested:
                tested.append(site.near)
                found[site.near.__name__] = _near_error(site, self.device)
        found |= pointwise_errors(DTYPE, self.device)
        for run, about in LINEARS:
            found[run.__name__] = linear_error(run, about, DTYPE, self.device)
        wrong = {name: error for name, error in found.items() if not error <= limit}
        if wrong:
            raise RuntimeError(f"kernels give wrong results on this device: {wrong}")
        return found

    def _slots(self, rows: int, slots: Any) -> Tensor:
        given = range(rows) if slots is None else slots
        return torch.as_tensor(list(given), dtype=torch.long, device=self.device)

    def _snapshot(self) -> list[Tensor]:
        parts = [t for tensors in self.states.tensors.values() for t in tensors]
        return [t.clone() for t in (self.states.count, *parts)]

    def _restore(self, kept: list[Tensor]) -> None:
        parts = [t for tensors in self.states.tensors.values() for t in tensors]
        for tensor, old in zip((self.states.count, *parts), kept, strict=True):
            tensor.copy_(old)


def _weights(directory: Path, device: torch.device) -> Named:
    files = Weights(directory, device)
    about = json.loads((directory / "manifest.json").read_text("utf-8"))["weights"]
    named = Named({name: files[one["entries"][0]] for name, one in about["main"].items()})
    named.trips = {
        loop: [
            {name: files[one["entries"][one["trips"][trip]]] for name, one in weights.items()}
            for trip in range(trips)
        ]
        for loop, (trips, weights) in about["loops"].items()
    }
    return named


def _errors(site: Any, device: torch.device) -> dict[str, float]:
    """How far the two kernels of a mixer are from the definition, relative."""
    random = torch.Generator().manual_seed(0)
    rows, time, (keys, values) = 2, 70, site.state

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    q, k = draw(rows, site.heads, time, keys) / keys**0.5, draw(rows, site.kv_heads, time, keys)
    k = k / k.norm(dim=-1, keepdim=True)
    v = draw(rows, site.kv_heads, time, values)
    q, k, v = (x.to(device, site.dtype) for x in (q, k, v))
    shape = (rows, site.kv_heads, time, *site.gates[0]) if site.gates else ()
    g = -draw(*shape).abs().to(device) / 4 if site.decay else None
    beta = draw(rows, site.kv_heads, time).sigmoid().to(device) if site.delta else None
    start = torch.zeros(rows, site.kv_heads, keys, values, device=device)
    wanted, end = token_by_token(q, k, v, g, beta, start)
    out, state = site.scan(q, k, v, g, beta)
    found = {site.scan.__name__: max(_far(out, wanted), _far(state, end))}
    pool, slots = start.clone(), torch.arange(rows, device=device)
    steps = [
        site.step(
            *(x[:, :, t] for x in (q, k, v)), *(None if x is None else x[:, :, t]
                                                for x in (g, beta)), pool, slots,
        )
        for t in range(8)
    ]  # fmt: skip
    found[site.step.__name__] = _far(torch.stack(steps, 1), wanted[:, :8])
    return found


def _convolution_errors(site: Any, device: torch.device) -> dict[str, float]:
    """How far the two kernels of a short convolution are from the definition, relative."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, site.dtype)

    rows, time, begun = 2, 70, 40
    x, weight = draw(rows, site.channels, time), draw(site.channels, site.size)
    bias = draw(site.channels) if site.bias else None
    wanted = convolved(x, weight, bias)
    out, _ = site.scan(x, weight, bias)
    _, state = site.scan(x[:, :, :begun], weight, bias)
    slots = torch.arange(rows, device=device)
    steps = [site.step(x[:, :, t], weight, bias, state, slots) for t in range(begun, begun + 8)]
    return {
        site.scan.__name__: _far(out, wanted),
        site.step.__name__: _far(torch.stack(steps, 2), wanted[:, :, begun : begun + 8]),
    }


def _near_error(site: Any, device: torch.device) -> float:
    """How far the kernel of an attention is from PyTorch's, relative; one row is padded."""
    random = torch.Generator().manual_seed(0)
    rows, time, padded = 2, 90, 5
    q, k, v = (
        torch.randn(rows, heads, time, size, generator=random).to(device, DTYPE)
        for heads, size in (
            (site.heads, site.k_size), (site.kv_heads, site.k_size), (site.kv_heads, site.v_size)
        )
    )  # fmt: skip
    mask = torch.ones(rows, time, dtype=torch.bool, device=device)
    mask[1, :padded] = False
    number = mask.long().cumsum(-1) - 1
    first = torch.tensor([[0], [padded]], device=device)
    found = site.near(q, k, v, site.scale, site.window, site.prefix, first)
    wanted = over_prompt(site, q.float(), k.float(), v.float(), number, mask)
    return _far(found[mask], wanted[mask])
