"""Decoding with drafts: the tokens of the model, several for each of its steps."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from reroll.errors import UsageError
from reroll.runtime.speculation.control import Controller
from reroll.runtime.speculation.drafts import Draft, Lookup, Proposal, draft_of, read
from reroll.runtime.speculation.sampling import Sampling, draw, kept, one_hot
from reroll.runtime.state.growing import take_back

GREEDY = Sampling()


@dataclass(frozen=True)
class SpeculationReport:
    """What speculation did.

    Attributes:
        tokens: how many are new.
        steps: calls of the model, with that for the prompt.
        plain: steps without a draft.
        seconds: of all steps but that for the prompt.
        drafts: for each draft, how many tokens it proposed, and how many of them were accepted.
    """

    tokens: int
    steps: int
    plain: int
    seconds: float
    drafts: dict[str, tuple[int, int]]

    def as_data(self) -> dict[str, Any]:
        drafts = {
            name: {"proposed": proposed, "accepted": accepted}
            for name, (proposed, accepted) in self.drafts.items()
        }
        return vars(self) | {"drafts": drafts}

    def __str__(self) -> str:
        drafts = "; ".join(f"{n}: {a} of {p} accepted" for n, (p, a) in self.drafts.items())
        return f"{self.tokens} tokens in {self.steps} steps, {self.plain} without a draft; {drafts}"


def speculate(
    model: Any,
    input_ids: Tensor,
    drafts: Sequence[tuple[str, Any]],
    *,
    max_new_tokens: int,
    count: int | None = None,
    ends: Collection[int] = (),
    cache: DynamicCache | None = None,
    sampling: Sampling = GREEDY,
) -> tuple[Tensor, SpeculationReport]:
    """Continue `input_ids` [1, time]; return all tokens and what was done.

    `drafts` are names and lowered models; a name without a model is looked up in the tokens so far.
    `count` tokens are proposed in each round, or what pays if it is None. A token of `ends` is the
    last. `cache` has read the first tokens already, and all but the last afterwards. Leviathan et
    al. (arXiv 2211.17192), algorithm 1.

    Greedy tokens are the model's own, and sampled ones have its distribution, but where its two
    best logits lie within rounding of each other: several rows of a product may round otherwise
    than one.

    Raises UsageError for more than one row, for a model that keeps no cache, and for a cache that
    has read all tokens.
    """
    if input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise UsageError("speculation takes one row of tokens", where="input_ids")
    if not getattr(model, "keeps_cache", False):
        raise UsageError(
            "the model keeps no cache, so it cannot verify", where=type(model).__name__
        )
    cache = DynamicCache(config=model.config) if cache is None else cache
    past, length = int(cache.get_seq_length()), input_ids.shape[1]
    if past >= length:
        raise UsageError(
            f"the cache holds {past} tokens, and there are {length}",
            where="cache",
            hint="give all tokens, of which the cache may have read the first",
        )
    tokens, limit = input_ids, length + max_new_tokens
    with torch.no_grad():
        logits = read(model, tokens[:, past:], cache, past, keep=1)[:, -1]
        first = draw(sampling.distribution(logits))[None]
        # from here on, tokens may be undone
        cache.activate_past_recording()
        start = time.perf_counter()
        tokens = torch.cat([tokens, first], 1)
        made: list[Draft] = [
            Lookup() if module is None else draft_of(name, module, model, cache)
            for name, module in drafts
        ]
        control = Controller(len(made), count)
        while tokens.shape[1] < limit and int(tokens[0, -1]) not in ends:
            number, wanted = control.choose()
            wanted = min(wanted, limit - tokens.shape[1] - 1)
            tokens = _round(model, cache, tokens, made, number, wanted, control, sampling, ends)
    new = tokens.shape[1] - length
    counts = {d.name: (r.proposed, r.accepted) for d, r in zip(made, control.records, strict=True)}
    seconds = time.perf_counter() - start
    return tokens, SpeculationReport(new, control.rounds + 1, control.plain + 1, seconds, counts)


def _round(
    model: Any,
    cache: Any,
    tokens: Tensor,
    drafts: Sequence[Draft],
    number: int | None,
    count: int,
    control: Controller,
    sampling: Sampling,
    ends: Collection[int],
) -> Tensor:
    """Propose and verify once; return the tokens with those that are new, up to an end."""
    start = time.perf_counter()
    proposal = Proposal(tokens[:, :0])
    if number is not None and count > 0:
        proposal = drafts[number].propose(tokens, count, sampling)
    drafted = time.perf_counter()
    asked = torch.cat([tokens[:, -1:], proposal.tokens], 1)
    logits = read(model, asked, cache, tokens.shape[1] - 1)[0]
    new = _until(_followed(proposal, logits, sampling), ends)
    # the cache keeps all but the last
    right, length = len(new) - 1, proposal.tokens.shape[1]
    take_back(cache, length - right)
    done = time.perf_counter()
    control.add(number, length, right, drafted - start, done - drafted)
    return torch.cat([tokens, new[None]], 1)


def _followed(proposal: Proposal, logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the tokens that are kept of a proposal, and one more, by the model's logits."""
    proposed = proposal.tokens[0]
    if sampling.temperature is None:
        choice = logits.argmax(-1)
        right = int((choice[:-1] == proposed).long().cumprod(0).sum())
        return choice[: right + 1]
    q = proposal.drawn_from
    if q is None:
        q = one_hot(proposed, logits.shape[-1])
    return kept(proposed, q, sampling.distribution(logits))


def _until(new: Tensor, ends: Collection[int]) -> Tensor:
    """Cut new tokens [n] behind the first end."""
    for place, token in enumerate(new.tolist()):
        if token in ends:
            return new[: place + 1]
    return new
