"""Early tokens that are verified: positions of one sequence at different depths of one batch.

AdaDecode (arXiv 2506.03700), with any of the exits that `insert_exits` makes. A token that leaves
the loop early gives the next token at once. Its remaining trips wait until a later token comes to
the depth at which it left, and then run in one batch with that token's. At the full depth, each
early token is compared with the model's own. Where they differ, everything behind is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from reroll.bounds import COUNT, check_number
from reroll.errors import UsageError
from reroll.runtime.depthwise.row_batch import Row
from reroll.runtime.depthwise.scheduler import DepthScheduler


class VerifiedScheduler(DepthScheduler):
    """Greedy decoding with early tokens that gives what the full depth gives.

    At most `ahead` tokens of a request wait for their remaining trips. `given` counts early tokens,
    and `right` those that were the model's own.

    Raises UsageError for a model without exits, or whose exits do not keep exact caches
    (`insert_exits(state=defer)`).
    """

    def __init__(self, model: Any, *, slots: int = 16, length: int = 1024, ahead: int = 4) -> None:
        check_number("ahead", ahead, COUNT, "VerifiedScheduler")
        super().__init__(model, slots=slots, length=length)
        if not self.engine.defers:
            raise UsageError(
                "early tokens are verified in exact caches, which the model's exits do not keep",
                where="VerifiedScheduler",
                hint="insert_exits(at=[...], state=defer)",
            )
        self.ahead, self.given, self.right = ahead, 0, 0
        # for each slot, the tokens that are not verified yet
        self._guesses: list[list[int]] = [[] for _ in range(slots)]

    @torch.no_grad()
    def tick(self) -> None:
        """Admit requests, run one batch of trips, and give or verify the tokens of its rows."""
        with self._at_full_depth():
            self._admit()
        if not self._rows:
            return
        engine = self.engine
        rows = self._next_rows()
        engine.run_step(rows)
        self.counts.batches += 1
        self.counts.trips += len(rows)
        complete = [row for row in rows if row.trip == engine.trips]
        early = [row for row in rows if row.left and not row.background and row not in complete]
        ended = {id(row) for row in (*complete, *early)}
        self._rows = [row for row in self._rows if id(row) not in ended]
        if complete:
            self._verify(complete)
        if early:
            self._guess(early)

    def _next_rows(self) -> list[Row]:
        """Return the rows of the next group of trips, with those that have waited there for them.

        Rows of a request none of whose tokens is on its way do not wait.
        """
        ahead = {row.slot: row.trip for row in self._rows if not row.background}

        def goes(row: Row) -> bool:
            return not row.background or ahead.get(row.slot, row.trip) == row.trip

        every, self._rows = self._rows, [row for row in self._rows if goes(row)]
        try:
            return super()._next_rows()
        finally:
            self._rows = every

    def _guess(self, rows: Sequence[Row]) -> None:
        """Give the tokens of rows that have left, and let their remaining trips wait."""
        self.counts.heads += len(rows)
        chosen = self.engine.logits(rows).argmax(-1).tolist()
        going: list[tuple[int, int]] = []
        for row, token in zip(rows, chosen, strict=True):
            request, guesses = self._running[row.slot], self._guesses[row.slot]
            guesses.append(token)
            self.given += 1
            row.background = True
            self._rows.append(row)
            known = len(request.tokens) + len(guesses)
            if known < request.limit and token not in request.stop and len(guesses) < self.ahead:
                going.append((row.slot, token))
        self._go_on(going)

    def _verify(self, rows: Sequence[Row]) -> None:
        """Compare early tokens with those of the full depth; go on behind the last right one."""
        self.counts.heads += len(rows)
        rows = sorted(rows, key=lambda row: (row.slot, row.position))
        chosen = self.engine.full_logits(rows).argmax(-1).tolist()
        wrong: set[int] = set()
        for row, token in zip(rows, chosen, strict=True):
            request = self._running.get(row.slot)
            if request is None or row.slot in wrong:
                continue
            guesses = self._guesses[row.slot]
            request.depths.append(self.engine.depth(row))
            if row.background:
                if guesses.pop(0) == token:
                    self.right += 1
                else:
                    wrong.add(row.slot)
                    guesses.clear()
                    self._rows = [each for each in self._rows if each.slot != row.slot]
            if not self._give(request, token):
                guesses.clear()
        busy = {row.slot for row in self._rows}
        slots = [s for s in dict.fromkeys(row.slot for row in rows) if s not in busy]
        self._go_on([(s, self._running[s].tokens[-1]) for s in slots if s in self._running])

    def _go_on(self, going: list[tuple[int, int]]) -> None:
        for slot, _ in going:
            request = self._running[slot]
            known = len(request.tokens) + len(self._guesses[slot])
            self.engine.pool.lengths[slot] = len(request.prompt) + known - 1
        self._start_tokens(going)

    @contextmanager
    def _at_full_depth(self) -> Iterator[None]:
        """Let no token leave where the model runs a prompt."""
        trips = self.model._assembly.loops[self.engine.loop.name]
        exits = trips.exits
        trips.exits = replace(exits, thresholds=(float("inf"),) * len(exits.thresholds))
        try:
            yield
        finally:
            trips.exits = exits
