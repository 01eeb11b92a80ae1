"""Train a run: its stages, and in each the remaining steps.

A run is deterministic: the rows and random numbers of a step depend on its number only. So a run
that continues from a checkpoint has the losses of an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from reroll.errors import RecoveryError
from reroll.recover.checkpoints import Progress
from reroll.recover.data import take
from reroll.recover.held_out import held_out
from reroll.recover.optimizers import make_optimizer, rate
from reroll.recover.setup import Setup
from reroll.recover.stage import Batch, Loss, Models, Stage, batch_of
from reroll.recover.trainable import training
from reroll.runtime.lowering.recapture import stored_tensors

OnStep: TypeAlias = Callable[[Mapping[str, Any]], None]

# decay of the moving average of the loss that the progress bar shows
SMOOTHING = 0.9


@dataclass
class Trained:
    """Progress of a run, and its measurements on held-out rows, oldest first."""

    progress: Progress
    measures: list[dict[str, Any]]


def train(run: Setup, restart: bool, on_step: OnStep) -> Trained:
    """Train from the last checkpoint on, or from the beginning with `restart`."""
    if run.main:
        run.directory.open(run.identity, resume=not restart)
    run.accelerator.wait_for_everyone()
    checkpoint = run.directory.last()
    progress = Progress() if checkpoint is None else checkpoint[0]
    trained = Trained(progress, run.directory.cut_log(progress.steps) if run.main else [])
    if progress.stage:
        run.module.load_state_dict(run.directory.load_stage(progress.stage))
    for number in range(progress.stage, len(run.recipe.stages)):
        resumed = checkpoint is not None and checkpoint[0].stage == number
        if not resumed:
            trained.progress = replace(trained.progress, stage=number, step=0)
            if run.main and number:
                run.directory.save_stage(number, stored_tensors(run.module)[1])
            _measure(run, trained, run.recipe.stages[number].name)
        _train_stage(run, trained, checkpoint if resumed else None, on_step)
    _measure(run, trained, "")
    return trained


def _train_stage(run: Setup, trained: Trained, checkpoint: Any, on_step: OnStep) -> None:
    """Train the stage of `trained.progress`, from its next step to its last."""
    begun = trained.progress
    stage, steps = run.recipe.stages[begun.stage], run.steps[begun.stage]
    run.module.train()
    with training(run.module, stage, run.new) as student:
        optimizer = make_optimizer(stage, student.parameters())
        if checkpoint is not None:
            _, tensors, optimizer_state = checkpoint
            _restore(student, tensors)
            optimizer.load_state_dict(optimizer_state)
        models = Models(student, run.module, run.teacher)
        stage.check_models(models)
        if checkpoint is None:
            _start(run, trained, stage, models)
        objective, optimizer = run.accelerator.prepare(_Objective(stage, models), optimizer)
        smooth: float | None = None
        start = time.perf_counter()
        for step in range(begun.step, steps):
            before = trained.progress
            for group in optimizer.param_groups:
                group["lr"] = rate(stage, step, steps)
            line, tokens = _step(run, objective, optimizer, before, step / steps)
            seconds = time.perf_counter() - start
            progress = trained.progress = Progress(
                begun.stage,
                step + 1,
                before.steps + 1,
                before.tokens + tokens,
                begun.seconds + seconds,
            )
            loss = line["loss"]
            smooth = loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * loss
            left = sum(run.steps) - progress.steps
            done = {
                **asdict(progress),
                "stage": stage.name,
                **line,
                "smooth": smooth,
                "lr": rate(stage, step, steps),
                "total_steps": sum(run.steps),
                "tokens_per_second": (progress.tokens - begun.tokens) / seconds,
                "seconds_left": left * seconds / (progress.steps - begun.steps),
            }
            last = step + 1 == steps
            # before the checkpoint: lines after it are cut when a run continues
            if run.main and (progress.steps % run.settings.log_every == 0 or last):
                run.directory.log(done)
            if progress.steps % run.settings.save_every == 0 or last:
                _save(run, progress, student, optimizer)
            if run.main:
                on_step(done)
    run.accelerator.free_memory()
    run.module.requires_grad_(True)


def _step(
    run: Setup, objective: nn.Module, optimizer: Any, progress: Progress, done: float
) -> tuple[dict[str, float], int]:
    """Run one step over all processes; return the values to log, and the number of tokens.

    `done` is the part of the stage that is done, from 0 to 1.
    """
    settings, accelerator = run.settings, run.accelerator
    rows = take(run.corpus.train, progress.steps * settings.batch, settings.batch)
    count = int(rows.mask.sum())
    # the rows are dealt out to the processes in turn
    local = rows.pick(range(int(accelerator.process_index), len(rows), run.processes))
    pieces = local.split(settings.micro or len(local))
    optimizer.zero_grad()
    seed = settings.seed * 1_000_003 + progress.steps
    torch.manual_seed(seed)
    totals: dict[str, float] = {}
    for index, piece in enumerate(pieces):
        batch = batch_of(run.module, piece, done, seed)
        share = batch.tokens() / count
        last = index + 1 == len(pieces)
        with nullcontext() if last else accelerator.no_sync(objective):
            with _autocast(run):
                loss = Loss(*objective(batch))
            # accelerate averages gradients over processes, and the mean over tokens needs their sum
            accelerator.backward(loss.value * (share * run.processes))
        for name, value in {"loss": loss.value.item(), **loss.parts}.items():
            totals[name] = totals.get(name, 0.0) + share * value
    values = torch.tensor(list(totals.values()), device=accelerator.device)
    values = accelerator.reduce(values, "sum")
    stage = run.recipe.stages[progress.stage]
    parameters = [p for p in objective.parameters() if p.grad is not None]
    norm: Tensor = accelerator.clip_grad_norm_(parameters, stage.clip or float("inf"))
    if not torch.isfinite(values[0]) or not torch.isfinite(norm):
        raise RecoveryError(
            f"the loss of step {progress.steps + 1} is not finite",
            where=f"stage {stage.name}",
            hint=f"lower its lr; the last checkpoint is in {run.directory.path}",
        )
    optimizer.step()
    line = dict(zip(totals, values.tolist(), strict=True))
    return {**line, "gradient_norm": float(norm)}, count


def _start(run: Setup, trained: Trained, stage: Stage, models: Models) -> None:
    """Run what a stage does before its first step, and measure if it changed something."""
    settings = run.settings

    def rows(tokens: int) -> list[Batch]:
        count = -(-tokens // run.length)
        taken = take(run.corpus.train, trained.progress.steps * settings.batch, count)
        return [batch_of(run.module, p) for p in taken.split(settings.micro or settings.batch)]

    parts = stage.initialise(models, rows)
    if parts:
        _measure(run, trained, f"the steps of {stage.name}", parts)


def _measure(
    run: Setup, trained: Trained, before: str, parts: Mapping[str, float] | None = None
) -> None:
    """Measure on the held-out rows, and log it; `before` names what comes next."""
    if run.main:
        with _autocast(run):
            measured = held_out(run.module, run.teacher, run.corpus.held_out)
        steps, tokens = trained.progress.steps, trained.progress.tokens
        line = {"before": before, "steps": steps, "tokens": tokens, **measured, **(parts or {})}
        run.directory.log({"held_out": line, "steps": steps})
        trained.measures.append(line)
    run.accelerator.wait_for_everyone()


def _save(run: Setup, progress: Progress, student: nn.Module, optimizer: Any) -> None:
    tensors = {n: p for n, p in student.named_parameters() if p.requires_grad}
    if run.main:
        run.directory.save_step(progress, tensors, optimizer.state_dict())
    run.accelerator.wait_for_everyone()


def _restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])


def _autocast(run: Setup) -> Any:
    enabled = run.settings.precision == "bf16"
    return torch.autocast(run.accelerator.device.type, torch.bfloat16, enabled=enabled)


class _Objective(nn.Module):
    """Loss of a stage as a module, so that its wrappers cover all that the loss depends on."""

    def __init__(self, stage: Stage, models: Models) -> None:
        super().__init__()
        self.student = models.student
        self.stage, self.models = stage, models

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss = self.stage.loss(batch, self.models)
        return loss.value, loss.parts
