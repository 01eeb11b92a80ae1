"""A run: its stages in turn, on one process or many, from the last checkpoint on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reroll.bounds import TOKENS, check_number
from reroll.errors import RecoveryError, UntrustedCodeError, UsageError
from reroll.evaluate.tokenizing import plain_ids, special_ids, tokenizer_of
from reroll.recover.checkpoints import Directory, Progress
from reroll.recover.data import Corpus, make_corpus, take
from reroll.recover.images import ImageInput, image_corpus, image_input
from reroll.recover.measure import held_out
from reroll.recover.optimizers import make_optimizer, rate
from reroll.recover.recipe import Recipe, load_recipe
from reroll.recover.stage import Batch, Loss, Models, Stage, batch_of
from reroll.recover.trainable import new_names, training
from reroll.rewrite.analysis.reach import check_length
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.dtypes import HALVES, dtype_of, retype
from reroll.rewrite.ir.program import Program, Step
from reroll.rewrite.pipeline.pipeline import call_to_text, recipe_path
from reroll.runtime.lowering.recapture import stored_tensors
from reroll.writing import check_directory, new_directory

OnStep = Callable[[Mapping[str, Any]], None]

# of the loss that the progress shows
SMOOTHING = 0.9


@dataclass
class Report:
    """What a run did: tokens and seconds, and the held-out measures before and after it.

    Each of `measures` has the stage that it was taken before ("" at the end), the perplexity, and
    with an original its perplexity, the KL divergence from it in nats, and top-1 agreement. `main`
    says whether this process is the one that measured and saved.
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

    `teacher` is the original; by default what the student says it was made from.
    `trust_remote_code` runs Python code that comes with it. `data` are text files, directories, or
    names of Hugging Face datasets; for a model of images, directories of images. `tokens`, of which
    an image has one per position of the model, are shared among the recipe's stages by their
    `share`. Weights are kept and trained in fp32, and saved in `dtype`: the student's own if None.

    While it runs, checkpoints are in `out` + ".run"; the same call goes on from them, with the same
    losses as if it had not been interrupted, and `restart` begins anew. Under `accelerate launch`,
    processes share each step's rows.

    Raises UsageError for wrong arguments, RecoveryError if a loss is not finite, CheckpointError
    if a checkpoint cannot be written; in the last two cases the last checkpoint remains.
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
    with directory.held() if accelerator.is_main_process else nullcontext():
        run = _Run(
            accelerator, recipe, student, teacher, data, int(tokens), directory, trust, dtype
        )
        check_directory(out, overwrite=overwrite, sources=run.sources)
        return run.all(out, restart, overwrite, on_step or (lambda _: None))


class _Run:
    def __init__(
        self,
        accelerator: Any,
        recipe: Recipe,
        student: str | Path | Program,
        teacher: str | Path | Program | None,
        data: Sequence[str | Path],
        tokens: int,
        directory: Directory,
        trust: bool = False,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        self.recipe, self.settings, self.directory = recipe, recipe.settings, directory
        self.accelerator = accelerator
        self.world = int(self.accelerator.num_processes)
        self.main = bool(self.accelerator.is_main_process)
        if self.settings.batch % self.world:
            raise UsageError(
                f"{self.settings.batch} rows cannot be shared by {self.world} processes",
                where="recipe recover, option batch",
            )
        if not data:
            raise UsageError("there is nothing to train on", hint="give files or directories")
        opened = (
            student
            if isinstance(student, Program)
            else capture(str(student), trust_remote_code=trust)
        )
        program, self.dtype = _program(opened, trust), dtype_of(dtype, opened.dtype)
        # refused before anything is trained, should it not be known how
        retype(program, self.dtype)
        self.sources = program.origin.paths
        original = None if teacher is None else _program(teacher, trust)
        if teacher is None and any(s.teaches for s in recipe.stages):
            teacher = program.origin.model
            original = _recorded(program, trust)
        self.identity = {
            "student": _name(student),
            "teacher": None if teacher is None else _name(teacher),
            "data": [str(d) for d in data],
            "tokens": tokens,
            "recipe": recipe.to_data(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        seen = image_input(program)
        self.length = self.settings.length if seen is None else seen.positions
        for each in (program, original):
            if each is not None and seen is None:
                check_length(
                    each, self.length, "recipe recover, option length", "give at most {limit}"
                )
        self.steps = _steps(recipe, tokens / (self.settings.batch * self.length))
        # stages without steps may still begin with something
        tokens = sum(self.steps) * self.settings.batch * self.length or tokens
        self.corpus = (
            self._texts(program, data, tokens) if seen is None else self._images(seen, data)
        )
        device = self.accelerator.device
        self.module = program.to_module().to(device)
        self.teacher = None if original is None else original.to_module().to(device).eval()
        if self.teacher is not None:
            self.teacher.requires_grad_(False)
        if self.settings.checkpointing:
            self.module.gradient_checkpointing_enable()
        self.new = new_names(self.module, self.teacher)
        self.measures: list[dict[str, Any]] = []

    def all(self, out: Path, restart: bool, overwrite: bool, on_step: OnStep) -> Report:
        """Run what is left, and save the result."""
        if self.main:
            self.directory.open(self.identity, resume=not restart)
        self.accelerator.wait_for_everyone()
        found = self.directory.last()
        progress = Progress() if found is None else found[0]
        if self.main:
            self.measures = self.directory.cut_log(progress.steps)
        if progress.stage:
            self.module.load_state_dict(self.directory.load_stage(progress.stage))
        for number in range(progress.stage, len(self.recipe.stages)):
            own = found if found is not None and found[0].stage == number else None
            if own is None:
                progress = replace(progress, stage=number, step=0)
                if self.main and number:
                    self.directory.save_stage(number, stored_tensors(self.module)[1])
                self._measure(self.recipe.stages[number].name, progress)
            progress = self._stage(number, progress, own, on_step)
        self._measure("", progress)
        report = Report(str(out), progress.tokens, progress.seconds, self.main, self.measures)
        if self.main:
            self._save(out, report, overwrite)
        self.accelerator.wait_for_everyone()
        return report

    def _texts(self, program: Program, data: Sequence[str | Path], tokens: int) -> Corpus:
        tokenizer = tokenizer_of(program)
        if tokenizer is None:
            raise UsageError("the model has no tokenizer", where=program.origin.model)
        return make_corpus(
            data,
            lambda text: plain_ids(tokenizer, text),
            length=self.length,
            tokens=tokens,
            held_rows=self.settings.held_rows,
            pack=self.settings.pack,
            before=special_ids(tokenizer)[0],
            end=tokenizer.eos_token_id,
            repeats=self.settings.repeats,
            seed=self.settings.seed,
        )

    def _images(self, seen: ImageInput, data: Sequence[str | Path]) -> Corpus:
        return image_corpus(data, seen, held_rows=self.settings.held_rows, seed=self.settings.seed)

    # ---- one stage

    def _stage(self, number: int, progress: Progress, found: Any, on_step: OnStep) -> Progress:
        stage, steps = self.recipe.stages[number], self.steps[number]
        self.module.train()
        with training(self.module, stage, self.new) as trained:
            optimizer = make_optimizer(stage, trained.parameters())
            if found is not None:
                _restore(trained, found[1])
                optimizer.load_state_dict(found[2])
            models = Models(trained, self.module, self.teacher)
            stage.begin(models)
            if found is None:
                self._start(stage, models, progress)
            objective, optimizer = self.accelerator.prepare(_Objective(stage, models), optimizer)
            smooth: float | None = None
            before, first, earlier = progress.tokens, progress.steps, progress.seconds
            start = time.perf_counter()
            for step in range(progress.step, steps):
                lr = rate(stage, step, steps)
                line, count = self._step(objective, optimizer, progress, lr, steps)
                seconds = time.perf_counter() - start
                progress = Progress(
                    number,
                    step + 1,
                    progress.steps + 1,
                    progress.tokens + count,
                    earlier + seconds,
                )
                last = step + 1 == steps
                speed = (progress.tokens - before) / seconds
                smooth = (
                    line["loss"]
                    if smooth is None
                    else (SMOOTHING * smooth + (1 - SMOOTHING) * line["loss"])
                )
                left = sum(self.steps) - progress.steps
                done = {
                    **asdict(progress),
                    "stage": stage.name,
                    **line,
                    "smooth": smooth,
                    "lr": lr,
                    "total_steps": sum(self.steps),
                    "tokens_per_second": speed,
                    "seconds_left": left * seconds / (progress.steps - first),
                }
                # before the checkpoint: what the log says beyond that is cut when a run goes on
                if self.main and (progress.steps % self.settings.log_every == 0 or last):
                    self.directory.log(done)
                if progress.steps % self.settings.save_every == 0 or last:
                    self._save_step(progress, trained, optimizer)
                if self.main:
                    on_step(done)
        self.accelerator.free_memory()
        self.module.requires_grad_(True)
        return progress

    def _start(self, stage: Stage, models: Models, progress: Progress) -> None:
        """What a stage does before its first step; measured if it does something."""

        def rows(tokens: int) -> list[Batch]:
            count = -(-tokens // self.length)
            found = take(self.corpus.train, progress.steps * self.settings.batch, count)
            size = self.settings.micro or self.settings.batch
            return [batch_of(self.module, piece) for piece in found.split(size)]

        parts = stage.start(models, rows)
        if parts:
            self._measure(f"the steps of {stage.name}", progress, parts)

    def _step(
        self, objective: nn.Module, optimizer: Any, progress: Progress, lr: float, steps: int
    ) -> tuple[dict[str, float], int]:
        """One step over all processes: what is logged of it, and its tokens."""
        settings = self.settings
        rows = take(self.corpus.train, progress.steps * settings.batch, settings.batch)
        count = int(rows.mask.sum())
        # the rows are dealt out to the processes in turn
        rank = int(self.accelerator.process_index)
        own = rows.pick(range(rank, len(rows), self.world))
        pieces = own.split(settings.micro or len(own))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        seed = settings.seed * 1_000_003 + progress.steps
        torch.manual_seed(seed)
        totals: dict[str, float] = {}
        for index, piece in enumerate(pieces):
            batch = batch_of(self.module, piece, progress.step / steps, seed)
            share = batch.tokens() / count
            last = index + 1 == len(pieces)
            with nullcontext() if last else self.accelerator.no_sync(objective):
                with self._autocast():
                    loss = Loss(*objective(batch))
                # gradients are averaged over processes, and should be summed
                self.accelerator.backward(loss.value * (share * self.world))
            for name, value in {"loss": loss.value.item(), **loss.parts}.items():
                totals[name] = totals.get(name, 0.0) + share * value
        values = torch.tensor(list(totals.values()), device=self.accelerator.device)
        values = self.accelerator.reduce(values, "sum")
        line = dict(zip(totals, values.tolist(), strict=True))
        stage = self.recipe.stages[progress.stage]
        norm = self._clip(stage, objective)
        if not torch.isfinite(values[0]) or not torch.isfinite(norm):
            raise RecoveryError(
                f"the loss of step {progress.steps + 1} is not finite",
                where=f"stage {stage.name}",
                hint=f"lower its lr; the last checkpoint is in {self.directory.path}",
            )
        optimizer.step()
        return {**line, "gradient_norm": float(norm)}, count

    def _clip(self, stage: Stage, objective: nn.Module) -> Tensor:
        parameters = [p for p in objective.parameters() if p.grad is not None]
        bound = stage.clip or float("inf")
        norm: Tensor = self.accelerator.clip_grad_norm_(parameters, bound)
        return norm

    def _autocast(self) -> Any:
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    # ---- what is kept

    def _save_step(self, progress: Progress, trained: nn.Module, optimizer: Any) -> None:
        tensors = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        if self.main:
            self.directory.save_step(progress, tensors, optimizer.state_dict())
        self.accelerator.wait_for_everyone()

    def _measure(
        self, stage: str, progress: Progress, parts: Mapping[str, float] | None = None
    ) -> None:
        """Measure on the held-out rows, and write it down."""
        if self.main:
            with self._autocast():
                found = held_out(self.module, self.teacher, self.corpus.held_out)
            line = {
                "before": stage,
                "steps": progress.steps,
                "tokens": progress.tokens,
                **found,
                **(parts or {}),
            }
            self.directory.log({"held_out": line, "steps": progress.steps})
            self.measures.append(line)
        self.accelerator.wait_for_everyone()

    def _save(self, out: Path, report: Report, overwrite: bool) -> None:
        program = retype(self.module.to_program(), self.dtype)
        names = [stage.name for stage in self.recipe.stages]
        measured = {
            "tokens": report.tokens,
            "processes": self.world,
            "held_out": report.measures,
        }
        text = call_to_text("recover", {"stages": names})
        record = Step(text, report.seconds, (), measured)
        origin = replace(program.origin, steps=(*program.origin.steps, record))
        with new_directory(out, overwrite=overwrite) as temporary:
            replace(program, origin=origin).save(str(temporary), overwrite="files")
            self.directory.copy_log(temporary / "recovery.jsonl")
        self.directory.clear()


class _Objective(nn.Module):
    """A stage's loss as a module, so that what wraps it sees all that the loss depends on."""

    def __init__(self, stage: Stage, models: Models) -> None:
        super().__init__()
        self.student = models.student
        self.stage, self.models = stage, models

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss = self.stage.loss(batch, self.models)
        return loss.value, loss.parts


def _accelerator() -> Any:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    # a stage need not reach all that it may train
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    # precision is ours: accelerate keeps one for the whole process
    return Accelerator(mixed_precision="no", kwargs_handlers=handlers)


def _program(model: str | Path | Program, trust: bool, revision: str | None = None) -> Program:
    """A model in fp32."""
    if isinstance(model, Program):
        return retype(model, torch.float32) if model.dtype in HALVES else model
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust}
    return capture(str(model), dtype=torch.float32, **options)


def _recorded(program: Program, trust: bool) -> Program:
    """The original that a Program says it was made from."""
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
    """Steps of each stage that has a share, at least one, of so many in all."""
    shares = sum(stage.share for stage in recipe.stages)
    return [max(round(total * s.share / shares), 1) if s.share else 0 for s in recipe.stages]


def _restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])
