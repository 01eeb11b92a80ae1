"""Decode with an exported directory: plainly, or with a draft that the model verifies."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reroll.bounds import COUNT, POSITIVE, TOP_P, check_number
from reroll.errors import UsageError
from reroll.onnx.directory import read_manifest
from reroll.onnx.drafts import Draft, Lookup, Proposal, draft_of
from reroll.onnx.sampling import Array, Sampling, kept
from reroll.onnx.state import Graph, State
from reroll.runtime.speculation.control import Controller
from reroll.runtime.speculation.report import NearTie, SpeculationReport

LOOKUP, DRAFT = "lookup", "draft"
# accepted tokens that a state of constant size may lack before they are read alone
_PENDING = 8
# two logits are within rounding of each other if they differ by at most this part of the larger
# one, by precision. Of int8 and int4, ONNX Runtime computes one row by another product than many:
# measured on SmolLM2 in int8, the distance of the two best logits changes by up to 0.011
_ROUNDING = {
    "fp32": 16 * float(np.finfo(np.float32).eps),
    "fp16": 4 * float(np.finfo(np.float16).eps),
    "int8": 2**-6,
    "int4": 2**-6,
}


@dataclass
class Sequence:
    """A sequence of tokens, and what a runner keeps of it: as many as wanted share a runner.

    Attributes:
        tokens: all of them; the model has read all but the last, or a few more.
    """

    state: State
    tokens: list[int] = field(default_factory=list)
    drafts: dict[str, Draft] = field(default_factory=dict)

    def copy(self) -> Sequence:
        """Return a sequence that goes on by itself, so that a common beginning is read once."""
        return Sequence(self.state.copy(), list(self.tokens))


def load(directory: str | Path, *, threads: int = 0, graph: str | None = None) -> Runner:
    """Open a directory that `reroll export --target onnx` wrote: see `Runner`."""
    return Runner(directory, threads=threads, graph=graph)


class Runner:
    """Decodes with the graphs of an exported directory, in ONNX Runtime on the processor.

    `threads` are those of one run, 0 for as many as there are cores. `graph` is "unrolled" or
    "loop"; the first of them that is there if None. `report` says what the last call of `generate`
    did.

    Raises UsageError for a directory that is not such an export, or whose model does not decode
    behind a state.
    """

    def __init__(
        self, directory: str | Path, *, threads: int = 0, graph: str | None = None
    ) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        graphs = self.manifest["graphs"]
        kinds = [k for k in ("unrolled", "loop") if k in graphs and graph in (None, k)]
        if not kinds:
            raise UsageError(
                f"there is no graph {graph or 'unrolled or loop'}",
                where=str(self.directory),
                hint="export it: --graphs unrolled,loop",
            )
        self._kind, self._threads = kinds[0], threads
        self.graph = self._opened(kinds[0])
        self._draft_graph: Graph | None = None
        self.report: SpeculationReport | None = None

    @property
    def drafts(self) -> tuple[str, ...]:
        """Names of the drafts that `generate` takes."""
        return (DRAFT, LOOKUP) if "draft" in self.manifest else (LOOKUP,)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens after which the model writes nothing."""
        return frozenset(self.manifest["ends"])

    def sequence(self) -> Sequence:
        """Begin a sequence."""
        return Sequence(State(self.graph))

    def generate(
        self,
        ids: Any,
        max_new_tokens: int = 64,
        draft: str | None = "auto",
        *,
        draft_tokens: int | None = None,
        ends: Collection[int] | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        sequence: Sequence | None = None,
    ) -> Array:
        """Continue tokens; those of the model itself, whatever the draft.

        Args:
            ids: tokens [time] or [1, time].
            max_new_tokens: at most this many.
            draft: "draft" for the one that was exported with the model, "lookup" for the tokens
                that followed the same ones before, "auto" for what pays of all that there are, or
                None for none.
            draft_tokens: how many tokens are proposed at a time; what pays if None.
            ends: tokens after which nothing follows; the model's own if None.
            temperature: sample, at this temperature; greedy if None.
            top_k: sample from so many likeliest tokens; 0 for all.
            top_p: sample from the likeliest tokens with this share of the probability.
            seed: of the random numbers for sampling.
            sequence: what an earlier call has read, see `sequence`; `ids` begin with its tokens,
                which are not read again. It has the new ones afterwards.

        Returns int64 [time and new], or [1, time and new]. Raises UsageError for several rows, for
        tokens that the model does not have, for a sequence of other tokens, and for an option that
        is out of range.
        """
        given = np.asarray(ids)
        row = self._row(given)
        _check(max_new_tokens, draft_tokens, temperature, top_k, top_p)
        limit = self.manifest.get("positions")
        if limit is not None and len(row) + max_new_tokens - 1 > limit:
            raise UsageError(
                f"{len(row)} tokens of the prompt and {max_new_tokens} new ones are more than the "
                f"model has positions for, {limit}",
                where="generate",
                hint="give a shorter prompt, or fewer new tokens",
            )
        sequence = self.sequence() if sequence is None else sequence
        self._check_sequence(sequence, row)
        names = self._names(draft)
        sequence.tokens = row
        round_ = _Round(
            sequence,
            [self._draft(name, sequence) for name in names],
            Sampling(temperature, top_k, top_p),
            np.random.default_rng(seed),
            self.ends if ends is None else frozenset(ends),
            self.manifest["precision"],
        )
        self.report = _decode(round_, names, len(row) + max_new_tokens, draft_tokens)
        found = np.array(sequence.tokens, np.int64)
        return found[None] if given.ndim == 2 else found

    # ---- what is given

    def _row(self, given: Array) -> list[int]:
        if given.ndim not in (1, 2) or (given.ndim == 2 and len(given) != 1) or not given.size:
            raise UsageError(
                f"one row of tokens is wanted, not an array of shape {list(given.shape)}",
                where="ids",
                hint="decode rows one after the other: they may share this runner",
            )
        if not np.issubdtype(given.dtype, np.integer):
            raise UsageError(f"tokens are integers, not {given.dtype}", where="ids")
        size = self.manifest["vocabulary"]
        if given.min() < 0 or given.max() >= size:
            bad = given.min() if given.min() < 0 else given.max()
            raise UsageError(
                f"there is no token {bad} in a vocabulary of {size}",
                where="ids",
                hint="the tokenizer is not that of the model",
            )
        return [int(token) for token in given.reshape(-1)]

    def _check_sequence(self, sequence: Sequence, row: list[int]) -> None:
        if sequence.state.graph is not self.graph:
            raise UsageError(
                "the sequence is that of another runner", where="sequence", hint="runner.sequence()"
            )
        read = sequence.state.read
        if row[:read] != sequence.tokens[:read] or read >= len(row):
            raise UsageError(
                f"the sequence has read {read} tokens, with which these {len(row)} do not go on",
                where="sequence",
                hint="give all tokens of the sequence, and new ones behind them",
            )

    def _names(self, draft: str | None) -> tuple[str, ...]:
        if draft is None:
            return ()
        if draft == "auto":
            return self.drafts
        if draft == DRAFT and DRAFT not in self.drafts:
            raise UsageError(
                "no draft was exported with the model",
                where=str(self.directory),
                hint="reroll convert MODEL OUT --draft PASSES, and export OUT",
            )
        if draft not in self.drafts:
            raise UsageError(
                f"there is no draft {draft!r}",
                where="draft",
                hint=f"auto, {', '.join(self.drafts)}, or None",
            )
        return (draft,)

    def _draft(self, name: str, sequence: Sequence) -> Draft:
        if name == LOOKUP:
            return Lookup()
        if name not in sequence.drafts:
            if self._draft_graph is None:
                self._draft_graph = self._opened(f"{DRAFT}-{self._kind}")
            borrows = self.manifest["draft"]["borrows"]
            sequence.drafts[name] = draft_of(self._draft_graph, sequence.state, borrows=borrows)
        return sequence.drafts[name]

    def _opened(self, kind: str) -> Graph:
        described = self.manifest["graphs"].get(kind)
        if described is None or not (self.directory / described["file"]).is_file():
            raise UsageError(
                f"the graph {kind} is missing", where=str(self.directory), hint="export it again"
            )
        return Graph(self.directory / described["file"], described, self._threads)


def _check(
    max_new_tokens: int,
    draft_tokens: int | None,
    temperature: float | None,
    top_k: int,
    top_p: float,
) -> None:
    check_number("max_new_tokens", max_new_tokens, COUNT, "generate")
    if draft_tokens is not None:
        check_number("draft_tokens", draft_tokens, COUNT, "generate")
    if temperature is not None:
        check_number("temperature", temperature, POSITIVE, "generate", integer=False)
    if top_k:
        check_number("top_k", top_k, COUNT, "generate")
    check_number("top_p", top_p, TOP_P, "generate", integer=False)


# ---- decoding


@dataclass
class _Round:
    """What each round has: the sequence, drafts, how tokens are drawn, and where to end."""

    sequence: Sequence
    drafts: list[Draft]
    sampling: Sampling
    random: np.random.Generator
    ends: frozenset[int]
    precision: str
    near_ties: list[NearTie] = field(default_factory=list)
    made: int = 1

    def begin(self) -> None:
        """Read the prompt, and add the first token."""
        state, tokens = self.sequence.state, self.sequence.tokens
        logits = state.extend(tokens[state.read :], 1)
        tokens.append(self._following(Proposal([]), logits)[0])

    def run(self, number: int | None, count: int, control: Controller) -> None:
        """Propose and verify once, and add the tokens that are new, up to an end."""
        state, tokens = self.sequence.state, self.sequence.tokens
        start = time.perf_counter()
        proposal = Proposal([])
        if number is not None and count > 0:
            proposal = self.drafts[number].propose(tokens, count, self.sampling, self.random)
        drafted = time.perf_counter()
        before = state.mark()
        asked = [*tokens[state.read :], *proposal.tokens]
        logits = state.extend(asked, len(proposal.tokens) + 1)
        new = self._following(proposal, logits)
        last = next((n for n, token in enumerate(new) if token in self.ends), len(new) - 1)
        # the state has all but the last
        state.back(before, len(tokens) + last)
        if proposal.tokens and self.sampling.temperature is None:
            self._note(logits[: last + 1])
        tokens += new[: last + 1]
        self.made += last + 1
        if len(tokens) - 1 - state.read > _PENDING:
            state.extend(tokens[state.read : -1], 0)
        done = time.perf_counter()
        control.add(number, len(proposal.tokens), [last], drafted - start, done - drafted)

    def _note(self, logits: Array) -> None:
        """Note the near ties among the logits [new, vocabulary] of tokens that are kept."""
        second, best = np.partition(logits, -2, -1)[:, -2:].T
        gaps = (best - second) / np.maximum(np.abs(best), 1e-30)
        for place in (gaps <= _ROUNDING[self.precision]).nonzero()[0].tolist():
            self.near_ties.append(NearTie(0, self.made + place, float(gaps[place])))

    def _following(self, proposal: Proposal, logits: Array) -> list[int]:
        """Return the tokens that are kept of a proposal, and one more, by the model's logits."""
        proposed = proposal.tokens
        if self.sampling.temperature is not None:
            p = self.sampling.distribution(logits)
            return kept(proposed, proposal.drawn_from, p, self.random)
        choice = [int(token) for token in logits.argmax(-1)]
        right = next((n for n, token in enumerate(proposed) if token != choice[n]), len(proposed))
        return choice[: right + 1]


def _decode(
    round_: _Round, names: tuple[str, ...], limit: int, count: int | None
) -> SpeculationReport:
    """Add tokens up to `limit` in all, or to an end, and say how."""
    tokens = round_.sequence.tokens
    length = len(tokens)
    round_.sequence.state.reserve(limit)
    round_.begin()
    start = time.perf_counter()
    control = Controller(len(names), count)
    while len(tokens) < limit and tokens[-1] not in round_.ends:
        number, wanted = control.choose()
        round_.run(number, min(wanted, limit - len(tokens) - 1), control)
    seconds = time.perf_counter() - start
    counts = {n: (r.proposed, r.accepted) for n, r in zip(names, control.records, strict=True)}
    return SpeculationReport(
        len(tokens) - length,
        control.rounds + 1,
        control.plain + 1,
        seconds,
        counts,
        round_.near_ties,
    )
