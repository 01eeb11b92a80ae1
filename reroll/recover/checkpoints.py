"""Checkpoints of a run: written whole or not at all, and the last one read back.

A run's directory holds

- `stage-I/model.safetensors`: the weights with which stage I began, if it is not the first;
- `step-N/`: what stage I has trained since, and its optimizer, after N steps of the run;
- `run.json`: the settings, which a run that goes on must share;
- `log.jsonl`: a line per step;
- `lock`: which process is at work here.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from reroll.errors import CheckpointError, UsageError
from reroll.rewrite.checkpoint import write_file

log = logging.getLogger(__name__)

LOCK = "lock"
# the last one, and the one before it should the last one be damaged by the machine
KEPT = 2


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Its stage, the steps within that; the steps, the tokens, and the seconds of training in all.
    """

    stage: int = 0
    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Directory:
    """The directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the directory; UsageError if one is at work in it.

        The lock is the system's, so that it ends with its process, however that ends.
        """
        lock = self._locked()
        try:
            yield
        finally:
            if [p.name for p in self.path.glob("*")] == [LOCK]:
                shutil.rmtree(self.path)
            lock.close()

    def _locked(self) -> TextIO:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UsageError(
                f"another run is writing there: process {lock.read() or '?'}",
                where=str(self.path),
                hint="wait until it is done, or name another OUT",
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    def open(self, settings: Mapping[str, Any], resume: bool) -> None:
        """Begin a run, or go on with one of the same settings; UsageError for other settings."""
        file = self.path / "run.json"
        if not resume:
            self.clear()
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            if changed:
                raise UsageError(
                    f"an unfinished run has other settings: {', '.join(changed)}",
                    where=str(self.path),
                    hint="give the settings of that run, or --restart to begin anew",
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        _write(file, lambda p: p.write_text(json.dumps(settings, indent=1), encoding="utf-8"))

    def save_stage(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the weights with which a stage begins."""

        def write(folder: Path) -> None:
            folder.mkdir()
            whole = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
            write_file(whole, folder / "model.safetensors")

        _write(self.path / f"stage-{number}", write)

    def load_stage(self, number: int) -> dict[str, Tensor]:
        """The weights with which a stage began."""
        file = self.path / f"stage-{number}" / "model.safetensors"
        try:
            return load_file(file)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint cannot be read: {error}", str(file), "use --restart"
            ) from error

    def save_step(self, progress: Progress, tensors: Mapping[str, Tensor], optimizer: Any) -> None:
        """Keep what the running stage has trained."""

        def write(folder: Path) -> None:
            folder.mkdir()
            whole = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
            write_file(whole, folder / "trained.safetensors")
            _write_state(optimizer, folder / "optimizer.pt")
            (folder / "progress.json").write_text(json.dumps(vars(progress)), encoding="utf-8")

        _write(self.path / f"step-{progress.steps:09d}", write)
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(old)
        # what the kept checkpoints may stand on stays
        for number in range(progress.stage - KEPT + 1):
            shutil.rmtree(self.path / f"stage-{number}", ignore_errors=True)

    def last(self) -> tuple[Progress, dict[str, Tensor], Any] | None:
        """The last checkpoint that can be read: how far it is, what was trained, the optimizer."""
        for folder in reversed(self._steps()):
            try:
                data = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
                tensors = load_file(folder / "trained.safetensors")
                # weights_only: a checkpoint is data, and runs nothing
                optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
            except Exception as error:
                log.warning("%s cannot be read, and is passed over: %s", folder, error)
                continue
            return Progress(**data), tensors, optimizer
        return None

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the log."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_log(self, steps: int) -> list[dict[str, Any]]:
        """Drop what the log says of what comes after `steps` steps, and is done again.

        Returns the measures on held-out rows that remain.
        """
        file = self.path / "log.jsonl"
        kept: list[str] = []
        measures = []
        if not file.is_file():
            return []
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                # the end of a line that was being written
                continue
            measured = line.get("held_out")
            # a measure comes after the step that it counts
            if line["steps"] < steps or (line["steps"] == steps and measured is None):
                kept.append(text + "\n")
                measures += [] if measured is None else [measured]
        _write(file, lambda p: p.write_text("".join(kept), encoding="utf-8"))
        return measures

    def copy_log(self, file: Path) -> None:
        """Copy the log, if anything has been logged."""
        log = self.path / "log.jsonl"
        if log.is_file():
            shutil.copyfile(log, file)

    def clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.path.glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _steps(self) -> list[Path]:
        return sorted(p for p in self.path.glob("step-*") if p.suffix != ".part")


def _write_state(state: Any, file: Path) -> None:
    """Pickle an optimizer's state; OSError if the disk does not take it."""
    with file.open("wb") as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:
            # torch hides what the disk said behind an error of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _write(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file or folder beside its place, then rename it there."""
    part = target.with_name(target.name + ".part")
    if part.is_dir():
        shutil.rmtree(part)
    try:
        write(part)
    except OSError as error:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint cannot be written: {error.strerror or error}",
            where=str(target),
            hint="make room; the run then goes on from the checkpoint before",
        ) from error
    if target.is_dir():
        shutil.rmtree(target)
    part.replace(target)
