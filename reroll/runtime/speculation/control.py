"""Which draft proposes how many tokens: what pays, by what was measured while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# how many tokens may be proposed
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
# how many are proposed to try a draft out: first to time it, and then, if it may pay, to judge it
_TRIALS = (2, 4, 4)
# what is thought of a draft's tokens before they are seen: how often they are right, as of so many
_PRIOR, _PRIOR_WEIGHT = 0.8, 2.0
# how finely a draft's own probabilities are told apart
_PARTS = 5
# a draft is to be so much faster than none
_MARGIN = 1.05
# the weight of what was measured before, for each new measurement
_KEPT = 0.9
# rounds until what does not pay is tried again; doubled each time that it does not
_PATIENCE = 16


@dataclass
class Mean:
    """A mean in which later values count more."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total = _KEPT * self.total + value * weight
        self.weight = _KEPT * self.weight + weight

    def or_else(self, default: float) -> float:
        return self.total / self.weight if self.weight else default

    def beside(self, prior: float, weight: float) -> float:
        """Return the mean with a prior value, of that weight, among the values."""
        return (self.total + prior * weight) / (self.weight + weight)


@dataclass
class Line:
    """Seconds of the model's step as a line over its tokens."""

    first: Mean = field(default_factory=Mean)
    further: Mean = field(default_factory=Mean)

    def add(self, tokens: int, seconds: float) -> None:
        if tokens == 1:
            self.first.add(seconds)
        else:
            # a step of one token comes first
            rise = (seconds - self.first.or_else(0.0)) / (tokens - 1)
            self.further.add(max(rise, 0.0), tokens - 1)

    def at(self, tokens: int) -> float:
        return self.first.or_else(0.0) + self.further.or_else(0.0) * (tokens - 1)


@dataclass
class Record:
    """What is known of one draft."""

    seconds: Mean = field(default_factory=Mean)
    right: Mean = field(default_factory=Mean)
    # by the probability that the draft gives its tokens, in parts of one
    sure: list[Mean] = field(default_factory=lambda: [Mean() for _ in range(_PARTS)])
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0
    patience: int = _PATIENCE
    # tokens that are read behind the proposed ones
    prompts: int = 0
    # the round in which it is tried again
    again: int = 0


class Controller:
    """Chooses a draft and a number of tokens for each round.

    A round of k tokens, each right with probability p, yields 1 + p + ... + p^k tokens in the time
    of k drafted tokens and one verification (Leviathan et al., arXiv 2211.17192, equation 1). The
    largest rate is chosen, if it is larger than that of plain decoding by a margin.
    """

    def __init__(self, drafts: int, fixed: int | None = None) -> None:
        self.records = [Record() for _ in range(drafts)]
        self.verification = Line()
        self.rounds = 0
        self.fixed = fixed
        self.plain = 0
        # tokens a second that are expected of what was chosen
        self.expected = 0.0

    def choose(self) -> tuple[int | None, int]:
        """Return the number of a draft, or None, and how many tokens it is to propose."""
        self.expected = 0.0
        if self.fixed is not None:
            return (0, self.fixed) if self.records else (None, 0)
        # one end of the line; the first trials are the other
        if not self.rounds:
            return None, 0
        for number, record in enumerate(self.records):
            if record.rounds < len(_TRIALS) and (not record.rounds or self._may_pay(number)):
                return number, _TRIALS[record.rounds]
        best, chosen, count = self._rate(None, 0, 0.0) * _MARGIN, None, 0
        for number, record in enumerate(self.records):
            right = min(record.right.beside(_PRIOR, _PRIOR_WEIGHT), 0.995)
            for tokens in COUNTS:
                rate = self._rate(number, tokens, right)
                if rate > best:
                    best, chosen, count = rate, number, tokens
        for number, record in enumerate(self.records):
            if number != chosen and self.rounds >= record.again:
                record.again = self.rounds + record.patience
                record.patience *= 2
                if self._may_pay(number):
                    return number, _TRIALS[-1]
        self.expected = best
        return chosen, count

    def worth(self, number: int) -> float:
        """Return how probable one more drafted token has to be for its time to be well spent.

        It takes the time of a drafted token and of one that is verified, in which `expected` tokens
        a second would come otherwise. While a draft is tried out, any token is worth it.
        """
        further = self.records[number].seconds.or_else(0.0) + self.verification.further.or_else(0.0)
        return further * self.expected

    def right(self, number: int, likely: float) -> float:
        """Return how often a draft was right where it gave its token such a probability.

        A draft that is nearly the model is right where neither of them is sure, so its probability
        alone does not say.
        """
        record = self.records[number]
        overall = record.right.beside(_PRIOR, _PRIOR_WEIGHT)
        return record.sure[_part(likely)].beside(overall, _PRIOR_WEIGHT)

    def judge(self, number: int, likely: Sequence[float], accepted: int) -> None:
        """Record which tokens of a row were right, with the probabilities that the draft gave."""
        for place, each in enumerate(likely[: accepted + 1]):
            self.records[number].sure[_part(each)].add(float(place < accepted))

    def _may_pay(self, number: int) -> bool:
        """Whether a draft would be faster than plain decoding if it were always right."""
        plain = self._rate(None, 0, 0.0) * _MARGIN
        return any(self._rate(number, count, 0.995) > plain for count in COUNTS)

    def _rate(self, number: int | None, count: int, right: float) -> float:
        """Return the expected tokens a second of rounds of `count` proposed tokens."""
        drafting = 0.0 if number is None else self.records[number].seconds.or_else(0.0)
        tokens = (1 - right ** (count + 1)) / (1 - right)
        read = count + 1 + (0 if number is None else self.records[number].prompts)
        return tokens / max(count * drafting + self.verification.at(read), 1e-9)

    def add(
        self,
        number: int | None,
        proposed: int,
        accepted: Sequence[int],
        drafting: float,
        verifying: float,
        steps: int | None = None,
        prompts: int = 0,
    ) -> None:
        """Record a round: its tokens, those accepted of each row, and the seconds of both sides.

        `steps` of the draft may be more than the tokens that it proposed, and `prompts` are tokens
        that were read behind them.
        """
        self.rounds += 1
        self.verification.add(proposed + 1 + prompts, verifying)
        if number is None:
            self.plain += 1
            return
        record = self.records[number]
        record.rounds += 1
        record.prompts = prompts
        record.proposed += proposed * len(accepted)
        record.accepted += sum(accepted)
        record.again = max(record.again, self.rounds + _PATIENCE)
        if proposed:
            steps = proposed if steps is None else steps
            record.seconds.add(drafting / steps, steps)
            # tokens behind the first wrong one say nothing
            judged = sum(min(n + 1, proposed) for n in accepted)
            record.right.add(sum(accepted) / judged, judged / len(accepted))


def _part(likely: float) -> int:
    return min(int(likely * _PARTS), _PARTS - 1)
