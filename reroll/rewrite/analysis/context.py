"""The context of a pass: remarks, text, random numbers, weights, progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from reroll.rewrite.analysis.samples import Tokenizer, default_tokenizer, sample_text, vocabulary
from reroll.rewrite.ir.interpret import Observe, run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights.expressions import Expr
from reroll.rewrite.ir.weights.store import WeightStore

Progress = Callable[[int, int, str], None]

# programs with more bytes of weights are not evaluated only to inspect them
LARGE = 2**30


@dataclass
class Context:
    """Services and settings of one run of a pass.

    Attributes:
        text_source: the user's text, or the file that has it; None for the text that ships.
        tokenizer: turns text into token ids; the original model's own if None.
        seed: seeds `generator`.
        large: bytes of weights above which a program counts as large.
        measuring: whether measurements are wanted; without them, remarks cost as little as
            possible.
        report_progress: called with (done, total, what).
        remarks: the remarks of the pass so far.
    """

    text_source: str | Path | None = None
    tokenizer: Tokenizer | None = None
    seed: int = 0
    large: int = LARGE
    measuring: bool = True
    report_progress: Progress | None = None
    remarks: list[str] = field(default_factory=list)
    store: WeightStore = field(default_factory=WeightStore)

    def remark(self, text: object) -> None:
        """Record what was changed, or why it was not; the user sees it."""
        self.remarks.append(str(text))

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Report the progress of the pass; a call is cheap."""
        if self.report_progress is not None:
            self.report_progress(done, total, what)

    @cached_property
    def text(self) -> str:
        """Text for calibration and measurement: the user's, or the sample that ships."""
        if isinstance(self.text_source, Path):
            return self.text_source.read_text(encoding="utf-8")
        return sample_text() if self.text_source is None else self.text_source

    def tokens(self, program: Program) -> Tensor | None:
        """Tokenize the text to ids [n]; None if the program takes no ids or has no tokenizer."""
        size = vocabulary(program)
        tokenizer = self.tokenizer or default_tokenizer(program)
        if size is None or tokenizer is None:
            return None
        ids = torch.tensor(list(tokenizer(self.text)), dtype=torch.long)
        return ids[ids < size]

    def random_tokens(self, program: Program, count: int) -> Tensor:
        """Draw random token ids [count], for models without a tokenizer."""
        top = vocabulary(program) or 2
        return torch.randint(0, top, (count,), generator=self.generator())

    def some_tokens(self, program: Program, count: int) -> tuple[Tensor, str]:
        """Return ids of the text, or `count` random ones without it, and a name for them."""
        tokens = self.tokens(program)
        if tokens is not None and tokens.numel() > 1:
            return tokens, "text"
        return self.random_tokens(program, count), "random tokens"

    def outputs(
        self,
        program: Program,
        inputs: Mapping[str, Tensor],
        *,
        fast: bool = True,
        observe: Observe | None = None,
    ) -> dict[str, Tensor]:
        """Run a Program; return its outputs by name, in fp32 at least, from its weights as stored.

        See `reroll.rewrite.ir.interpret.run`. The weights are kept for the next call.
        """
        weights = self.store.weights(program)
        dtype = torch.float64 if program.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            return run(program, inputs, weights=weights, dtype=dtype, fast=fast, observe=observe)

    def generator(self) -> torch.Generator:
        """Create a random generator with this run's seed."""
        return torch.Generator().manual_seed(self.seed)

    def is_large(self, program: Program) -> bool:
        """Whether the program's weights are too large to be evaluated only to inspect them.

        The weights from before tying count as well, because residuals and means are computed from
        them.
        """
        return max(program.weights.bytes(), program.reference.bytes()) > self.large

    def sparing(self, program: Program) -> bool:
        """Whether remarks should be computed from a sample of the weights rather than from all."""
        return not self.measuring or self.is_large(program)

    def compute(self, program: Program, expressions: Sequence[Expr]) -> list[Tensor]:
        """Evaluate weight expressions; unless the program is large, the results are cached.

        The tensors are shared: do not write to them.
        """
        if self.is_large(program):
            return WeightStore().values(expressions, program.source)
        return self.store.values(expressions, program.source)
