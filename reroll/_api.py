"""Public functions that use several packages of reroll."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reroll.errors import UsageError
from reroll.rewrite.analysis.samples import Tokenizer
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.manager import Event, Measure
from reroll.rewrite.pipeline.manager import run_passes as _run_passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reroll.rewrite.pipeline.pipeline import Pipeline

__all__ = ["load", "parse", "run_passes"]


def run_passes(
    program: Program,
    passes: Pipeline,
    *,
    text: str | Path | None = None,
    tokenizer: Tokenizer | PreTrainedTokenizerBase | None = None,
    measure: Measure = "auto",
    stop_after: int | str | None = None,
    print_after: Collection[str] | Literal["all"] = (),
    on_event: Callable[[Event], None] | None = None,
    seed: int = 0,
) -> Program:
    """Rewrite a Program with passes; each leaves a record in `program.origin.steps`.

    `passes` is a line of text such as "tie(blocks=10), relax(rank=64)", the path of a recipe, a
    pass, or a list of these. `text` is text, or a file with text (a `Path`), to calibrate and
    measure on; a sample is included. `tokenizer` is one of transformers, or a function from text to
    token ids; by default the original model's own if it has one.

    See `reroll.rewrite.pipeline.manager.run_passes` for the other arguments and the errors.
    """
    from reroll.evaluate.tokenizing import plain_ids, tokenizer_of

    found = tokenizer_of(program) if tokenizer is None else tokenizer
    if hasattr(found, "all_special_ids"):
        # one of transformers gives more than ids, and adds special tokens
        tokenizer = lambda content: plain_ids(found, content)  # noqa: E731
    return _run_passes(
        program,
        passes,
        text=text,
        tokenizer=tokenizer,
        measure=measure,
        stop_after=stop_after,
        print_after=print_after,
        on_event=on_event,
        seed=seed,
    )


def parse(text: str, source: str | Program | None = None) -> Program:
    """Parse the text of a Program: `parse(str(program))` returns the same Program again.

    A text holds no tensors. To run or save the parsed Program, give their source: the Program that
    the text was printed from, or the directory of the model. Raises ProgramError with the line of
    the error.
    """
    from reroll.rewrite.ir.text.parser import parse as parse_text

    if source is None:
        return parse_text(text)
    if not isinstance(source, Program):
        from reroll.rewrite.capture.export import capture

        source = capture(source, roll=False)
    return parse_text(text, source.source)


def load(directory: str | Path) -> Program:
    """Load the Program of a directory that `Program.save` wrote; weights are read on use.

    Raises UsageError if the directory is not one of reroll's, CheckpointError or ProgramError if
    its files are damaged.
    """
    from reroll.evaluate.subjects import is_converted
    from reroll.rewrite.capture.export import capture

    if not is_converted(str(directory)):
        raise UsageError(
            "this is not a model that reroll converted",
            where=str(directory),
            hint="capture any other model: reroll.capture(...)",
        )
    return capture(str(directory))
