"""What speculation did, as data and as a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class NearTie:
    """A place at which the model's two best logits lie within rounding of each other.

    Attributes:
        row: of the batch.
        place: of the token among the new ones.
        gap: between the logits, over the larger one.
    """

    row: int
    place: int
    gap: float


@dataclass(frozen=True)
class SpeculationReport:
    """What speculation did.

    Attributes:
        tokens: how many are new, in all rows.
        steps: calls of the model, with that for the prompt.
        plain: steps without a draft.
        seconds: of all steps but that for the prompt.
        drafts: for each draft, how many tokens it proposed, and how many of them were accepted.
        near_ties: where a greedy choice among several rows of a product may be another than that of
            plain decoding.
    """

    tokens: int
    steps: int
    plain: int
    seconds: float
    drafts: dict[str, tuple[int, int]]
    near_ties: list[NearTie] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        drafts = {
            name: {"proposed": proposed, "accepted": accepted}
            for name, (proposed, accepted) in self.drafts.items()
        }
        return vars(self) | {"drafts": drafts, "near_ties": [vars(each) for each in self.near_ties]}

    def __str__(self) -> str:
        drafts = "; ".join(f"{n}: {a} of {p} accepted" for n, (p, a) in self.drafts.items())
        return f"{self.tokens} tokens in {self.steps} steps, {self.plain} without a draft; {drafts}"


def summed(reports: Sequence[SpeculationReport]) -> SpeculationReport:
    """Return one report of rows that were decoded one after the other, with the same drafts."""
    drafts: dict[str, tuple[int, int]] = {}
    for report in reports:
        for name, (proposed, accepted) in report.drafts.items():
            before = drafts.get(name, (0, 0))
            drafts[name] = before[0] + proposed, before[1] + accepted
    return SpeculationReport(
        sum(report.tokens for report in reports),
        sum(report.steps for report in reports),
        sum(report.plain for report in reports),
        sum(report.seconds for report in reports),
        drafts,
        [replace(tie, row=row) for row, each in enumerate(reports) for tie in each.near_ties],
    )
