"""Write the checkpoints of a run, each whole or not at all, and read the last one back.

A run's directory holds

- `stage-I/model.safetensors`: the weights at the start of stage I, if it is not the first;
- `step-N/`: the weights that stage I has trained since, and its optimizer, after N steps of the
  run;
- `run.json`: the settings, which must be the same when a run continues;
- `log.jsonl`: a line per step;
- `lock`: the process that is writing here.
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
# number of checkpoints to keep: the last one, and one before it in case the last is damaged
KEPT = 2


@dataclass(frozen=True)
class Progress:
    """Progress of a run: its stage, the steps within it, and steps, tokens and seconds in all."""

    stage: int = 0
    step: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Directory:
    """Directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the directory against other runs; raises UsageError if another run has the lock.

        The lock is the operating system's, so it is released when its process ends, however that
        ends.
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
        """Begin a run, or continue one; raises UsageError if that one has other settings."""
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
        """Save the weights at the start of a stage."""

        def write(folder: Path) -> None:
            folder.mkdir()
            whole = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
            write_file(whole, folder / "model.safetensors")

        _write(self.path / f"stage-{number}", write)

    def load_stage(self, number: int) -> dict[str, Tensor]:
        """Load the weights at the start of a stage; raises CheckpointError on failure."""
        file = self.path / f"stage-{number}" / "model.safetensors"
        try:
            return load_file(file)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint cannot be read: {error}", str(file), "use --restart"
            ) from error

    def save_step(self, progress: Progress, tensors: Mapping[str, Tensor], optimizer: Any) -> None:
        """Save the weights that the running stage trains, and its optimizer."""

        def write(folder: Path) -> None:
            folder.mkdir()
            whole = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
            write_file(whole, folder / "trained.safetensors")
            _write_state(optimizer, folder / "optimizer.pt")
            (folder / "progress.json").write_text(json.dumps(vars(progress)), encoding="utf-8")

        _write(self.path / f"step-{progress.steps:09d}", write)
        for old in self._steps()[:-KEPT]:
            shutil.rmtree(old)
        # stages that a kept checkpoint may need stay
        for number in range(progress.stage - KEPT + 1):
            shutil.rmtree(self.path / f"stage-{number}", ignore_errors=True)

    def last(self) -> tuple[Progress, dict[str, Tensor], Any] | None:
        """Return the last readable checkpoint: its progress, the trained weights, the optimizer."""
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
        """Append a line to the log."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def cut_log(self, steps: int) -> list[dict[str, Any]]:
        """Remove the log's lines after `steps` steps, which will run again.

        Returns the remaining measurements on held-out rows.
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
                # a line that was cut off by an interruption
                continue
            measured = line.get("held_out")
            # a measurement at `steps` is taken again when the run continues
            if line["steps"] < steps or (line["steps"] == steps and measured is None):
                kept.append(text + "\n")
                measures += [] if measured is None else [measured]
        _write(file, lambda p: p.write_text("".join(kept), encoding="utf-8"))
        return measures

    def copy_log(self, file: Path) -> None:
        """Copy the log, if there is one."""
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
    """Pickle an optimizer's state; raises OSError if the disk is full or fails."""
    with file.open("wb") as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:
            # torch wraps the disk's error in one of its own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _write(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file or folder under another name, then rename it; raises CheckpointError."""
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
