"""Continuous depth-wise batching: requests join and leave a batch at any depth of the loop.

It implements section 2.4 of Relaxed Recursive Transformers (arXiv 2410.20672). Trips that share
their weights run together, for tokens of any request. While one request is in the second round
through the blocks, another that left early is in the first round of its next token. A token that
leaves makes room at once, and new requests join while others run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import DynamicCache

from reroll.bounds import COUNT, check_number
from reroll.errors import UsageError
from reroll.runtime.depthwise.engine import Engine
from reroll.runtime.depthwise.row_batch import Row
from reroll.runtime.functions.exits import DepthReport

Mode = Literal["depth", "compact", "lockstep"]


@dataclass
class Request:
    """A prompt and the tokens generated for it; `prompt` [length] are token ids."""

    number: int
    prompt: Tensor
    limit: int
    stop: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    slot: int | None = None
    done: bool = False


@dataclass
class Counts:
    """Work done by a scheduler: trips of batches and of rows, skipped trips, and rows of logits.

    `prompt_seconds` and `prompt_cpu_seconds` are the wall-clock and processor times of prompts.
    """

    batches: int = 0
    trips: int = 0
    skipped: int = 0
    heads: int = 0
    prompt_seconds: float = 0.0
    prompt_cpu_seconds: float = 0.0


class DepthScheduler:
    """Greedy decoding of many requests in one batch, each at its own depth.

    Every request gets the tokens that it would get alone. `slots` requests run at once, and the
    others wait. No request may have more than `length` tokens including its prompt. Two values of
    `mode` are for comparison: `compact` starts all tokens together and drops those that have left;
    `lockstep` keeps them and waits for the slowest.

        with DepthScheduler(model, slots=16) as scheduler:
            number = scheduler.submit(ids, max_new_tokens=64)
            for token in scheduler.stream(number):
                ...

    Raises UsageError for a model whose graph is not one loop between embedding and head.
    """

    def __init__(
        self, model: Any, *, slots: int = 16, length: int = 1024, mode: Mode = "depth"
    ) -> None:
        check_number("slots", slots, COUNT, "DepthScheduler")
        check_number("length", length, COUNT, "DepthScheduler")
        if mode not in get_args(Mode):
            raise UsageError(
                f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}", "DepthScheduler"
            )
        self.engine = Engine(model, slots, length)
        self.model, self.mode = model, mode
        self.counts = Counts()
        self._free = list(range(slots))[::-1]
        self._waiting: deque[Request] = deque()
        self._requests: dict[int, Request] = {}
        self._running: dict[int, Request] = {}
        self._rows: list[Row] = []
        self._ended: list[Row] = []
        self._group = -1
        self._number = 0
        self._closed = False

    def submit(
        self, prompt: Tensor | Sequence[int], *, max_new_tokens: int = 64, stop: Sequence[int] = ()
    ) -> int:
        """Add a request, also while others run, and return its number.

        `prompt` are token ids [length]; `stop` are ids that end the request, after they have been
        yielded.
        """
        ids = torch.as_tensor(prompt, dtype=torch.long).flatten()
        if self._closed:
            raise UsageError("the scheduler is closed")
        check_number("max_new_tokens", max_new_tokens, COUNT, "submit")
        if not len(ids):
            raise UsageError("a request has a prompt")
        if len(ids) + max_new_tokens > self.engine.pool.length:
            raise UsageError(
                f"{len(ids)} + {max_new_tokens} tokens do not fit the length of "
                f"{self.engine.pool.length}",
                hint="give the scheduler a larger length",
            )
        self._number += 1
        ids = ids.to(self.engine.device)
        request = Request(self._number, ids, max_new_tokens, frozenset(stop))
        self._requests[request.number] = request
        self._waiting.append(request)
        return request.number

    def stream(self, number: int) -> Iterator[int]:
        """Yield the tokens of a request as they are generated; other requests advance meanwhile."""
        if number not in self._requests:
            raise UsageError(f"there is no request {number}")
        request, yielded = self._requests[number], 0
        while True:
            while yielded < len(request.tokens):
                yield request.tokens[yielded]
                yielded += 1
            if request.done or self._closed:
                return
            self.tick()

    def tokens(self, number: int) -> list[int]:
        """Return the tokens of a request so far."""
        if number not in self._requests:
            raise UsageError(f"there is no request {number}")
        return list(self._requests[number].tokens)

    def run(self, *, while_full: bool = False) -> None:
        """Run until all requests are complete.

        With `while_full`, stop when a slot is free and no request waits.
        """
        while self._waiting or self._running:
            self.tick()
            if while_full and self._free and not self._waiting:
                return

    def depth_report(self) -> DepthReport:
        """Count generated tokens by trips, except first tokens, which come from the prompts."""
        return DepthReport.of(d for request in self._requests.values() for d in request.depths)

    def close(self) -> None:
        """Drop all requests and caches."""
        self._closed = True
        self._waiting.clear()
        self._rows, self._ended, self._running = [], [], {}

    def __enter__(self) -> DepthScheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one tick: one group of trips, for all rows whose next trip is in it

    @torch.no_grad()
    def tick(self) -> None:
        """Admit requests, run one batch of trips, and append the tokens of completed rows."""
        self._admit()
        if not self._rows:
            return
        engine = self.engine
        rows = self._next_rows()
        engine.run_step(rows)
        self.counts.batches += 1
        self.counts.trips += len(rows)
        ended = [r for r in rows if self._has_ended(r)]
        if ended:
            self._rows = [r for r in self._rows if not any(r is e for e in ended)]
        self._ended += [r for r in ended if not r.background]
        if self._ended and (self.mode == "depth" or all(r.background for r in self._rows)):
            finished, self._ended = self._ended, []
            self._finish(finished)

    def _has_ended(self, row: Row) -> bool:
        if row.background or self.mode != "lockstep":
            return row.trip == self.engine.trips or (not row.background and row.left)
        # in lockstep, every row waits until all have left
        return row.trip == self.engine.trips or all(
            r.left for r in self._rows if r.trip == row.trip
        )

    def _next_rows(self) -> list[Row]:
        """Return the rows of the next group of trips that has any, sorted by trip."""
        groups = self.engine.groups
        for ahead in range(1, len(groups) + 1):
            number = (self._group + ahead) % len(groups)
            rows = [r for r in self._rows if r.trip in groups[number]]
            if rows:
                self._group = number
                return sorted(rows, key=lambda r: r.trip)
        raise AssertionError("a row is at a trip of no group")

    def _finish(self, rows: list[Row]) -> None:
        """Choose the next tokens of completed rows, and start the rows of these tokens."""
        engine = self.engine
        left = [r for r in rows if r.trip < engine.trips]
        if left and not engine.defers:
            engine.run_skips(left)
            self.counts.skipped += sum(engine.trips - r.trip for r in left)
        chosen = engine.logits(rows).argmax(-1).tolist()
        self.counts.heads += len(rows)
        going: list[tuple[int, int]] = []
        for row, token in zip(rows, chosen, strict=True):
            request = self._running[row.slot]
            engine.pool.lengths[row.slot] += 1
            request.depths.append(engine.depth(row))
            if self._give(request, token):
                going.append((row.slot, token))
        if engine.defers:
            # the remaining trips run in the background, ahead of the next token's in each group
            behind = [replace(r, background=True) for r in rows if r.trip < engine.trips]
            self._rows += [r for r in behind if r.slot in self._running]
        self._start_tokens(going)

    def _give(self, request: Request, token: int) -> bool:
        """Append a token to a request; return whether it is still incomplete."""
        request.tokens.append(token)
        if len(request.tokens) < request.limit and token not in request.stop:
            return True
        request.done = True
        if request.slot is not None:
            del self._running[request.slot]
            self._free.append(request.slot)
            self._rows = [r for r in self._rows if r.slot != request.slot]
        return False

    def _start_tokens(self, going: list[tuple[int, int]]) -> None:
        if going:
            slots, tokens = zip(*going, strict=True)
            self._rows += self.engine.start(slots, tokens)

    def _admit(self) -> None:
        """Run the prompts of waiting requests while slots are free."""
        if self.mode != "depth" and self._rows:
            return
        going = []
        wall, cpu = time.perf_counter(), time.process_time()
        while self._waiting and self._free:
            request = self._waiting.popleft()
            cache = DynamicCache(config=self.model.config)
            out = self.model(request.prompt[None], past_key_values=cache, logits_to_keep=1)
            request.slot = self._free.pop()
            self._running[request.slot] = request
            self.engine.pool.fill(request.slot, cache, len(request.prompt))
            token = int(out.logits[0, -1].argmax())
            if self._give(request, token):
                going.append((request.slot, token))
        self.counts.prompt_seconds += time.perf_counter() - wall
        self.counts.prompt_cpu_seconds += time.process_time() - cpu
        self._start_tokens(going)
