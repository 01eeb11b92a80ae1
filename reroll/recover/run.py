"""Run a recovery from its arguments to the saved model; `train` has the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from reroll.bounds import TOKENS, check_number
from reroll.errors import UsageError
from reroll.recover.checkpoints import Directory
from reroll.recover.recipe import Recipe, load_recipe
from reroll.recover.setup import Setup, prepare
from reroll.recover.train import OnStep, train
from reroll.rewrite.ir.dtypes import retype
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Step
from reroll.rewrite.pipeline.call_text import call_to_text
from reroll.rewrite.pipeline.pipeline import recipe_path
from reroll.writing import check_directory, new_directory


@dataclass
class Report:
    """Result of a run: tokens and seconds, and measurements on held-out rows before and after it.

    Each of `measures` names in "before" the stage that follows it ("" at the end). It has the
    perplexity, and with an original the original's perplexity, the KL divergence from it in nats,
    and top-1 agreement. `main` says whether this process is the one that measured and saved.
    """

    out: str
    tokens: int
    seconds: float
    main: bool
    measures: list[dict[str, Any]] = field(default_factory=list)


def recover(
    student: str | Path | Program,
    out: str | Path,
    *,
    data: Sequence[str | Path],
    recipe: Recipe | str | Path,
    tokens: float,
    teacher: str | Path | Program | None = None,
    restart: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    on_step: OnStep | None = None,
) -> Report:
    """Train a rewritten model against its original, and save it to the directory `out`.

    `teacher` is the original; by default the model that the student's origin names.
    `trust_remote_code` runs Python code that comes with it. `data` are text files, directories, or
    names of Hugging Face datasets; for a model of images, directories of images. `tokens` are
    divided among the recipe's stages by their `share`; an image counts one token per position.
    Weights are kept and trained in fp32, and saved in `dtype`: the student's own if None.

    Checkpoints are in `out` + ".run" during the run. The same call continues from them, with the
    same losses as without the interruption; `restart` begins anew. Under `accelerate launch`,
    processes share each step's rows.

    Raises UsageError for wrong arguments, RecoveryError if a loss is not finite, CheckpointError if
    a checkpoint cannot be written. In the last two cases the last checkpoint remains.
    """
    check_number("tokens", tokens, TOKENS, "recover", integer=False)
    out = Path(out)
    directory = Directory(out.with_name(f"{out.name}.run"))
    read = [m for m in (student, teacher) if m is not None and not isinstance(m, Program)]
    recipe = recipe if isinstance(recipe, Recipe) else recipe_path(recipe)
    read += [*data, *([] if isinstance(recipe, Recipe) else [recipe])]
    check_directory(out, overwrite=overwrite, sources=read)
    check_directory(directory.path, overwrite=True, sources=read)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    accelerator = _accelerator()
    trust = trust_remote_code
    with directory.exclusive() if accelerator.is_main_process else nullcontext():
        run = prepare(
            accelerator, recipe, student, teacher, data, int(tokens), directory, trust, dtype
        )
        check_directory(out, overwrite=overwrite, sources=run.sources)
        trained = train(run, restart, on_step or (lambda _: None))
        progress = trained.progress
        report = Report(str(out), progress.tokens, progress.seconds, run.main, trained.measures)
        if run.main:
            _save(run, out, report, overwrite)
        accelerator.wait_for_everyone()
    return report


def _save(run: Setup, out: Path, report: Report, overwrite: bool) -> None:
    """Save the trained student with a record of the run, and remove the checkpoints."""
    program = retype(run.module.to_program(), run.dtype)
    names = [stage.name for stage in run.recipe.stages]
    measured = {"tokens": report.tokens, "processes": run.processes, "held_out": report.measures}
    record = Step(call_to_text("recover", {"stages": names}), report.seconds, (), measured)
    origin = replace(program.origin, steps=(*program.origin.steps, record))
    with new_directory(out, overwrite=overwrite) as temporary:
        replace(program, origin=origin).save(str(temporary), overwrite="files")
        run.directory.copy_log(temporary / "recovery.jsonl")
    run.directory.clear()


def _accelerator() -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # a stage's loss need not depend on all trainable weights
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    # accelerate keeps one precision per process, and each run has its own
    return Accelerator(mixed_precision="no", kwargs_handlers=handlers)


# ---- metrics for TensorBoard


def tensorboard(folder: str | Path) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that writes the metrics of each step to a folder that TensorBoard reads.

    For `recover(..., on_step=tensorboard(folder))`. Raises UsageError if TensorBoard is not
    installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "TensorBoard is not installed", hint="pip install 'reroll[tensorboard]'"
        ) from error

    # opened at the first call, so that only the process that writes opens a file
    @cache
    def writer() -> Any:
        return SummaryWriter(str(folder))

    def write(step: Mapping[str, Any]) -> None:
        for name, value in step.items():
            if isinstance(value, int | float) and name != "steps":
                writer().add_scalar(name, value, step["steps"])
        if step["steps"] == step["total_steps"]:
            writer().close()

    return write
