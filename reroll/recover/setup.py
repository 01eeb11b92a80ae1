"""Prepare a run: open both models, build the rows, and count the steps of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reroll.errors import UntrustedCodeError, UsageError
from reroll.evaluate.tokenizing import plain_ids, special_ids, tokenizer_of
from reroll.recover.checkpoints import Directory
from reroll.recover.data import Corpus, make_corpus
from reroll.recover.images import ImageInput, image_corpus, image_input
from reroll.recover.recipe import Recipe, Settings
from reroll.recover.trainable import new_names
from reroll.rewrite.analysis.reach import check_length
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.dtypes import HALVES, dtype_of, retype
from reroll.rewrite.ir.program import Program


@dataclass
class Setup:
    """Everything that a run needs to begin.

    Attributes:
        accelerator: accelerate's object for the processes and the device.
        recipe: its stages and settings.
        directory: the directory of its checkpoints.
        identity: the settings that must be the same for a run to continue from a checkpoint.
        sources: the files that the student is computed from.
        module: the lowered student, whose weights are trained in fp32.
        teacher: the lowered original, if there is one.
        new: names of the parameters that the original does not have.
        corpus: rows to train on and rows to measure on.
        length: tokens of a row, or positions of an image.
        steps: number of steps of each stage.
        dtype: the dtype of the saved weights.
    """

    accelerator: Any
    recipe: Recipe
    directory: Directory
    identity: dict[str, Any]
    sources: tuple[str, ...]
    module: Any
    teacher: Any | None
    new: frozenset[str]
    corpus: Corpus
    length: int
    steps: list[int]
    dtype: torch.dtype | None

    @property
    def settings(self) -> Settings:
        """Settings of the recipe."""
        return self.recipe.settings

    @property
    def processes(self) -> int:
        """Number of processes that share each step's rows."""
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process is the one that measures and saves."""
        return bool(self.accelerator.is_main_process)


def prepare(
    accelerator: Any,
    recipe: Recipe,
    student: str | Path | Program,
    teacher: str | Path | Program | None,
    data: Sequence[str | Path],
    tokens: int,
    directory: Directory,
    trust: bool = False,
    dtype: torch.dtype | str | None = None,
) -> Setup:
    """Open the models and build the rows; the arguments are those of `recover`.

    Raises UsageError for a model or settings that cannot be trained.
    """
    settings, processes = recipe.settings, int(accelerator.num_processes)
    if settings.batch % processes:
        raise UsageError(
            f"{settings.batch} rows cannot be shared by {processes} processes",
            where="recipe recover, option batch",
        )
    if not data:
        raise UsageError("there is nothing to train on", hint="give files or directories")
    opened = (
        student if isinstance(student, Program) else capture(str(student), trust_remote_code=trust)
    )
    program, saved_dtype = _program(opened, trust), dtype_of(dtype, opened.dtype)
    # raises before anything is trained if the model cannot be saved in that dtype
    retype(program, saved_dtype)
    original = None if teacher is None else _program(teacher, trust)
    if teacher is None and any(s.teaches for s in recipe.stages):
        teacher = program.origin.model
        original = _recorded(program, trust)
    identity = {
        "student": _name(student),
        "teacher": None if teacher is None else _name(teacher),
        "data": [str(d) for d in data],
        "tokens": tokens,
        "recipe": recipe.to_data(),
        "dtype": str(saved_dtype).removeprefix("torch."),
    }
    images = image_input(program)
    length = settings.length if images is None else images.positions
    for each in (program, original):
        if each is not None and images is None:
            check_length(each, length, "recipe recover, option length", "give at most {limit}")
    steps = _steps(recipe, tokens / (settings.batch * length))
    # stages without steps may still fit weights on rows at their start
    tokens = sum(steps) * settings.batch * length or tokens
    corpus = _corpus(program, images, recipe, data, tokens, length)
    module = program.to_module().to(accelerator.device)
    lowered = None if original is None else original.to_module().to(accelerator.device).eval()
    if lowered is not None:
        lowered.requires_grad_(False)
    if settings.checkpointing:
        module.gradient_checkpointing_enable()
    return Setup(
        accelerator,
        recipe,
        directory,
        identity,
        program.origin.paths,
        module,
        lowered,
        new_names(module, lowered),
        corpus,
        length,
        steps,
        saved_dtype,
    )


def _corpus(
    program: Program,
    images: ImageInput | None,
    recipe: Recipe,
    data: Sequence[str | Path],
    tokens: int,
    length: int,
) -> Corpus:
    settings = recipe.settings
    if images is not None:
        return image_corpus(data, images, held_rows=settings.held_rows, seed=settings.seed)
    tokenizer = tokenizer_of(program)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer", where=program.origin.model)
    return make_corpus(
        data,
        lambda text: plain_ids(tokenizer, text),
        length=length,
        tokens=tokens,
        held_rows=settings.held_rows,
        pack=settings.pack,
        before=special_ids(tokenizer)[0],
        end=tokenizer.eos_token_id,
        repeats=settings.repeats,
        seed=settings.seed,
    )


def _program(model: str | Path | Program, trust: bool, revision: str | None = None) -> Program:
    """Capture a model in fp32, or convert a Program to it."""
    if isinstance(model, Program):
        return retype(model, torch.float32) if model.dtype in HALVES else model
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
    return capture(str(model), dtype=torch.float32, **options)


def _recorded(program: Program, trust: bool) -> Program:
    """Capture the original that a Program's origin names; raises UsageError if it has moved."""
    try:
        return _program(program.origin.model, trust, program.origin.revision)
    except UntrustedCodeError:
        raise
    except UsageError as error:
        raise UsageError(
            f"the original is not where it was when the model was made from it: {error.message}",
            where=program.origin.model,
            hint="say where it is now: --teacher, in Python teacher=",
        ) from error


def _name(model: str | Path | Program) -> str:
    return model.origin.model if isinstance(model, Program) else str(model)


def _steps(recipe: Recipe, total: float) -> list[int]:
    """Divide `total` steps among the stages by their shares, at least one for each with a share."""
    shares = sum(stage.share for stage in recipe.stages)
    return [max(round(total * s.share / shares), 1) if s.share else 0 for s in recipe.stages]
