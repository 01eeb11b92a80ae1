"""Drafts that leave the model's loop early, at a depth that is chosen while they decode."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from reroll.bounds import COUNT
from reroll.errors import UsageError
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import option
from reroll.runtime.functions.loops import read_out
from reroll.runtime.speculation.control import Mean
from reroll.runtime.speculation.drafts import Proposal, Wish
from reroll.runtime.speculation.reading import Reading
from reroll.runtime.speculation.skipping import Skipping

# what is thought of an exit before its tokens are seen: how often they are right, as of so many
_PRIOR, _PRIOR_WEIGHT = 0.5, 1.0


class DelOptions(Declared):
    """Options of `del`."""

    category = "draft"
    name = "del"

    exits: list[int] | None = option(
        None,
        within=COUNT,
        help="after how many trips the draft may leave; those of insert_exits, or each quarter",
    )
    every: int = option(4, within=COUNT, help="after how many proposals all exits are judged")


class Del(Skipping):
    """A draft of the first trips and the head, whose depth is chosen by what it yields.

    DEL (arXiv 2504.05598). All exits are judged on tokens that the model has verified: the token
    that the head makes of the hidden state there (the shadow token) is right or wrong. The exit and
    the number of tokens are those with the most tokens expected in a second. Seconds are measured,
    where DEL counts layers. With one exit, nothing is chosen.
    """

    def __init__(
        self, name: str, model: Reading, rows: Sequence[Tensor], options: DelOptions
    ) -> None:
        super().__init__(name, model)
        self.refuse_rows(rows)
        self.exits = options.exits or self._own_exits()
        wrong = [each for each in self.exits if each >= self.count]
        if wrong or sorted(set(self.exits)) != self.exits:
            raise UsageError(
                f"the exits {self.exits} are not an ascending list of numbers up to "
                f"{self.count - 1}",
                where=f"draft {name}, option exits",
            )
        if self.module.program.loops[-1].name != self.loop:
            raise UsageError(
                f"{self.loop} is not the last loop, so that the head does not read what it gives",
                where=f"draft {name}",
            )
        self.every, self.age = options.every, 0
        self.right = {each: Mean() for each in self.exits}
        self.seconds = {each: Mean() for each in self.exits}
        self.verifying = Mean()
        # the exit of the last proposal, its end, and the tokens before it
        self.exit, self.ended, self.before = self.exits[-1], 0.0, -1

    def _own_exits(self) -> list[int]:
        exits = self.trips.exits
        if exits is not None:
            places = [n + 1 for n, each in enumerate(exits.thresholds) if each < float("inf")]
            if places:
                return [each for each in places if each < self.count] or [self.count - 1]
        return sorted({max(self.count * part // 4, 1) for part in (1, 2, 3)})

    def propose(self, rows: Sequence[Tensor], wish: Wish) -> Proposal:
        start = time.perf_counter()
        if self.before >= 0 and self.observed.past == self.before:
            # the model's last forward has verified what was proposed here
            self.verifying.add(start - self.ended)
        made = super().propose(rows, wish)
        self.ended, self.before = time.perf_counter(), len(rows[0]) - 1
        steps = made.steps or made.tokens.shape[1]
        self.seconds[self.exit].add((self.ended - self.chosen_at) / steps)
        return made

    def choose(self, row: Tensor, count: int) -> tuple[Sequence[int], int]:
        if len(self.exits) > 1:
            if self.age % self.every == 0:
                self._judge(row)
            self.age += 1
            self.exit, count = self._best(count)
        self.chosen_at = time.perf_counter()
        return range(self.exit), count

    def _best(self, count: int) -> tuple[int, int]:
        """Return the exit and the number of tokens, up to `count`, with the most in a second."""
        untried = [each for each in self.exits if not self.seconds[each].weight]
        if untried:
            return untried[0], count
        rates = {}
        for each in self.exits:
            right = min(self.right[each].beside(_PRIOR, _PRIOR_WEIGHT), 0.995)
            for number in range(1, count + 1):
                tokens = (1 - right ** (number + 1)) / (1 - right)
                drafting = number * self.seconds[each].or_else(0.0)
                rates[each, number] = tokens / (drafting + self.verifying.or_else(0.0))
        return max(rates, key=lambda key: rates[key])

    def _judge(self, row: Tensor) -> None:
        """Compare the shadow tokens of all exits with the tokens that the model has verified."""
        first = self.observed.past
        known = row[first + 1 :]
        if not self.observed.states or not len(known):
            return
        inputs = self.inputs(row[first : first + len(known)], first)
        for each in self.exits:
            hidden = self.observed.states[each][:, : len(known)]
            if hidden.shape[1] < len(known):
                return
            logits = read_out(self.module, hidden, each, **inputs, use_cache=False)
            right = (logits.argmax(-1) == known).float().mean().item()
            self.right[each].add(right, len(known))
