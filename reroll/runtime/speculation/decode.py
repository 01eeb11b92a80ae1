"""Decoding with drafts: the tokens of the model, several for each of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.runtime.speculation.control import Controller
from reroll.runtime.speculation.drafts import Draft, Proposal, Wish, draft_of
from reroll.runtime.speculation.named import named
from reroll.runtime.speculation.reading import Reading, begin, can_part
from reroll.runtime.speculation.report import NearTie, SpeculationReport
from reroll.runtime.speculation.sampling import GREEDY, Sampling, draw, kept, one_hot
from reroll.runtime.speculation.trees import check_branching, chosen, merged

# two logits are within rounding of each other if they differ by at most so many units in the last
# place of the larger one: as much as those of one row and of several differ on real models
_ROUNDING = {torch.float64: 16.0, torch.float32: 16.0, torch.bfloat16: 4.0, torch.float16: 4.0}


@dataclass(frozen=True)
class Ends:
    """Where a row of tokens ends.

    Attributes:
        tokens: one of them is the last.
        also: called with all tokens [time] of a row so far, and true if the last one ends it.
    """

    tokens: Collection[int] = ()
    also: Callable[[Tensor], bool] | None = None

    def cut(self, row: Tensor, new: Tensor) -> tuple[Tensor, bool]:
        """Return the new tokens [n] behind `row` [time] up to the first end, and whether it is."""
        for place, token in enumerate(new.tolist()):
            end = token in self.tokens
            if not end and self.also is not None:
                end = self.also(torch.cat([row, new[: place + 1]]))
            if end:
                return new[: place + 1], True
        return new, False


@dataclass
class Row:
    """A row of the batch.

    Attributes:
        number: of the batch.
        tokens: [time], all so far; the last is not in the cache.
        start: how many were given.
        limit: how many there may be.
    """

    number: int
    tokens: Tensor
    start: int
    limit: int
    near_ties: list[NearTie] = field(default_factory=list)
    done: bool = False

    def extend(self, new: Tensor, ends: Ends) -> int:
        """Add new tokens [n] up to an end or the limit; return how many."""
        new, end = ends.cut(self.tokens, new[: self.limit - len(self.tokens)])
        self.tokens = torch.cat([self.tokens, new])
        self.done = end or len(self.tokens) >= self.limit
        return len(new)


def speculate(
    model: Any,
    rows: Sequence[Tensor],
    drafts: Sequence[tuple[str, Any]],
    *,
    max_new_tokens: int,
    count: int | None = None,
    ends: Ends = Ends(),
    cache: Any = None,
    sampling: Sampling = GREEDY,
    exact: bool = False,
    branches: int = 1,
) -> tuple[list[Tensor], SpeculationReport]:
    """Continue rows of tokens [time]; return all tokens of each and what was done.

    `drafts` are names and lowered models; `lookup` and `prompts` have none.
    `count` tokens are proposed in each round, or what pays if it is None. `cache` has read the
    first tokens of each row already; of one row, it has read all but the last afterwards. Leviathan
    et al. (arXiv 2211.17192), algorithm 1.

    Greedy tokens are the model's own, and sampled ones have its distribution, but where its two
    best logits lie within rounding of each other: several rows of a product may round otherwise
    than one. If `exact`, a step of one token chooses there. With several `branches`, drafts propose
    trees of tokens for a single row.

    Raises UsageError for rows without tokens, for a model that keeps no cache, and for a cache that
    has read all tokens.
    """
    _check(model, rows, cache)
    if branches > 1:
        check_branching(model, len(rows))
    with torch.no_grad():
        target = begin(model, len(rows)) if cache is None else _resumed(model, cache, len(rows))
        logits = target.read_rows([row[target.places :] for row in rows])[:, -1]
        target.record()
        start = time.perf_counter()
        first = draw(sampling.distribution(logits))[:, None]
        batch = [Row(n, r, len(r), len(r) + max_new_tokens) for n, r in enumerate(rows)]
        for row, new in zip(batch, first, strict=True):
            row.extend(new, ends)
        made: list[Draft] = [
            named(name, target, rows) if module is None else draft_of(name, module, target)
            for name, module in drafts
        ]
        parts = len(rows) == 1 or all(map(can_part, [model, *(m for _, m in drafts if m)]))
        control = Controller(len(made), count)
        run = _Run(target, made, control, sampling, ends, exact, parts, branches)
        active = run.drop_done(batch)
        while active:
            active = run.drop_done(run.round(active))
    counts = {d.name: (r.proposed, r.accepted) for d, r in zip(made, control.records, strict=True)}
    report = SpeculationReport(
        tokens=sum(len(row.tokens) - row.start for row in batch),
        steps=control.rounds + 1,
        plain=control.plain + 1,
        seconds=time.perf_counter() - start,
        drafts=counts,
        near_ties=[tie for row in batch for tie in row.near_ties],
    )
    return [row.tokens for row in batch], report


@dataclass
class _Run:
    """One run of speculation: the model's reading, its drafts, and what is known of them."""

    target: Reading
    drafts: list[Draft]
    control: Controller
    sampling: Sampling
    ends: Ends
    exact: bool
    # whether rows may keep different numbers of tokens
    parts: bool
    branches: int = 1
    # a near tie is to be decided by a step of one token
    tied: bool = False

    def drop_done(self, rows: list[Row]) -> list[Row]:
        """Return the rows that go on, and forget the others."""
        going = [n for n, row in enumerate(rows) if not row.done]
        if 0 < len(going) < len(rows):
            kept_rows = torch.tensor(going)
            self.target.select(kept_rows)
            for draft in self.drafts:
                draft.select(kept_rows)
        return [rows[n] for n in going]

    def round(self, rows: list[Row]) -> list[Row]:
        """Propose and verify once."""
        start = time.perf_counter()
        number, count = (None, 0) if self.tied else self.control.choose()
        count = min(count, max(row.limit - len(row.tokens) for row in rows) - 1)
        last = torch.stack([row.tokens[-1:] for row in rows])
        proposal = Proposal(last[:, :0])
        if number is not None and count > 0:
            # what is proposed in branches is drawn for none of them
            how = self.sampling if self.branches == 1 else GREEDY
            sure = None if self.control.fixed else partial(self.control.right, number)
            wish = Wish(count, how, self.control.worth(number), self.branches, sure)
            proposal = self.drafts[number].propose([row.tokens for row in rows], wish)
        drafted, prompts = time.perf_counter(), self.target.prompts
        asked = proposal.tokens.shape[1] + 1
        if proposal.others:
            counts = [self._branched(rows[0], proposal)]
        else:
            logits = self.target.read(torch.cat([last, proposal.tokens], 1))
            new = self._new(rows, proposal, logits)
            if not self.parts:
                fewest = min(map(len, new))
                new = [tokens[:fewest] for tokens in new]
            counts = [row.extend(tokens, self.ends) for row, tokens in zip(rows, new, strict=True)]
            # the cache keeps all but the last; a row that is done goes with its batch
            self.target.take_back([asked - n for n in (counts if self.parts else map(len, new))])
        done = time.perf_counter()
        right = [min(max(n - 1, 0), asked - 1) for n in counts]
        if number is not None and proposal.likely is not None and not proposal.others:
            for likely, accepted in zip(proposal.likely.tolist(), right, strict=True):
                self.control.judge(number, likely, accepted)
        seconds = drafted - start, done - drafted
        self.control.add(number, asked - 1, right, *seconds, proposal.steps, prompts)
        return rows

    def _branched(self, row: Row, proposal: Proposal) -> int:
        """Verify a tree of tokens; return how many are new."""
        chains = [proposal.tokens[0], *proposal.others]
        tokens, tree = merged(row.tokens[-1:], chains)
        logits = self.target.read(tokens[None], tree=tree)[0]
        new, path = chosen(logits, tokens, tree, self.sampling)
        if self.sampling.temperature is None:
            (new,) = self._settled([row], [new], logits[path][None])
        count = row.extend(new, self.ends)
        # the cache keeps all but the last
        self.target.keep(path[:count], len(tree))
        return count

    def _new(self, rows: list[Row], proposal: Proposal, logits: Tensor) -> list[Tensor]:
        """Return the tokens that follow in each row, by the model's logits [rows, n + 1, v]."""
        if self.sampling.temperature is not None:
            return [self._sampled(proposal, logits, n) for n in range(len(rows))]
        choices = logits.argmax(-1)
        right = (choices[:, :-1] == proposal.tokens).long().cumprod(1).sum(1).tolist()
        new = [choice[: n + 1] for choice, n in zip(choices, right, strict=True)]
        self.tied, decided = False, self.tied
        return new if logits.shape[1] == 1 or decided else self._settled(rows, new, logits)

    def _settled(self, rows: list[Row], new: list[Tensor], logits: Tensor) -> list[Tensor]:
        """Note the near ties among greedy choices; return the tokens before the first if `exact`.

        `logits` [rows, n, v] are those by which the tokens of each row were chosen.
        """
        ties = _near_ties(logits)
        for n, (row, tokens) in enumerate(zip(rows, new, strict=True)):
            for at, gap in ties[n].items():
                if at < len(tokens):
                    row.near_ties.append(NearTie(row.number, len(row.tokens) - row.start + at, gap))
                    if self.exact:
                        new[n], self.tied = tokens[:at], True
                        break
        return new

    def _sampled(self, proposal: Proposal, logits: Tensor, row: int) -> Tensor:
        tokens, q = proposal.tokens[row], proposal.drawn_from
        given = one_hot(tokens, logits.shape[-1]) if q is None else q[row]
        return kept(tokens, given, self.sampling.distribution(logits[row]))


def _near_ties(logits: Tensor) -> list[dict[int, float]]:
    """Return for each row of logits [rows, n, v] where its two best are nearly the same."""
    best = logits.topk(2).values.float()
    gap = (best[..., 0] - best[..., 1]) / best.abs().amax(-1).clamp(min=1e-30)
    limit = _ROUNDING.get(logits.dtype, 16.0) * torch.finfo(logits.dtype).eps
    return [{n: g for n, g in enumerate(row) if g <= limit} for row in gap.tolist()]


def _resumed(model: Any, cache: Any, rows: int) -> Reading:
    """Return what a cache without padding has read."""
    return Reading(model, cache, lengths=torch.tensor([int(cache.get_seq_length())] * rows))


def _check(model: Any, rows: Sequence[Tensor], cache: Any) -> None:
    if not rows or not all(map(len, rows)):
        raise UsageError("speculation goes on from at least one token", where="input_ids")
    if not getattr(model, "keeps_cache", False):
        raise UsageError(
            "the model keeps no cache, so it cannot verify", where=type(model).__name__
        )
    if cache is None:
        return
    past = int(cache.get_seq_length())
    if past >= min(map(len, rows)):
        raise UsageError(
            f"the cache holds {past} tokens, and there are {min(map(len, rows))}",
            where="cache",
            hint="give all tokens, of which the cache may have read the first",
        )
