"""Killing convert, recover and export at moments spread over the run: what is left, what follows.

    python -m benchmarks.killed [--moments 36] [--commands convert,recover,export] [--json FILE]

A process with everything imported forks for each run of a command on a tiny model, and the fork is
killed (SIGKILL). Three quarters of the moments are times, spread evenly from the start of the run
to its end; the others are calls that change files, spread evenly over all such calls of the run
(opening to write, renaming, making and removing), each killed just before it is made. In every
other run the output is there already and is to be replaced.

After each kill the output has to be absent, as it was before, or finished. If anything is left
beside it, the same command runs to its end and has to give what an uninterrupted run gives, bit for
bit but for the times that it took, and leave nothing beside it. Moments that a results file has are
not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

COMMANDS = ("convert", "recover", "export")
# of the moments, how many are times; the others are calls that change files
TIMED = 0.75

RECIPE = """
recover:
  length: 16
  batch: 2
  held_rows: 2
  save_every: 1
  stages:
    - distil: {lr: 0.003, share: 0.5}
    - tune: {lr: 0.001, share: 0.5}
"""
STEPS = 8


def prepare(folder: Path) -> dict[str, list[str]]:
    """A tiny model and what is made of it; the commands to be killed, without their output.

    What is done here imports and builds what the commands need, so that forks have it. Nothing is
    trained: threads of autograd do not outlive a fork.
    """
    import accelerate  # noqa: F401
    import torch

    import reroll.recover  # noqa: F401
    from reroll.rewrite.analysis.samples import sample_text
    from tests import tiny

    # threads of products do not outlive a fork, either
    torch.set_num_threads(1)
    model, rolled, tied = (str(folder / name) for name in ("model", "rolled", "tied"))
    tiny.save(tiny.llama(layers=2), Path(model), tiny.tokenizer())
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "text.txt").write_text(sample_text(), encoding="utf-8")
    passes = ["--passes", "tie(blocks=1), relax(rank=2)", "--measure", "off"]
    data = ["--data", str(folder / "text.txt"), "--recipe", str(folder / "recipe.yaml")]
    tokens = ["--tokens", str(STEPS * 2 * 16)]
    cli(["convert", model, rolled])
    cli(["convert", model, tied, *passes])
    cli(["export", rolled, str(folder / "exported"), "--check"])
    cli(["compare", rolled, tied, "--max-tokens", "64", "--length", "16"])
    return {
        "convert": ["convert", model, "OUT", *passes],
        "recover": ["recover", tied, "OUT", "--teacher", rolled, *data, *tokens],
        "export": ["export", rolled, "OUT", "--check"],
    }


def cli(arguments: list[str]) -> None:
    """Run the command line."""
    from reroll.cli import app

    with redirect_stdout(io.StringIO()):
        status = app(arguments, prog_name="reroll", standalone_mode=False)
    if status:
        raise SystemExit(status)


# ---- processes


def fork(work: Callable[[], None], place: Path, told: int = -1, kill_at: int = -1) -> int:
    """Do some work in a fork, whose number is returned.

    Each call of it that changes a file in `place` writes a byte to the file descriptor `told`;
    before the one with the number `kill_at`, the fork kills itself.
    """
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        watch(place, told, kill_at)
        work()
        status = 0
    finally:
        os._exit(status)


_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod"}


def watch(place: Path, told: int, kill_at: int) -> None:
    """Tell of the calls of this process that change a file in `place`, and stop it before one."""
    calls = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        opens = event == "open" and bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        changes = (opens or event in _CHANGES) and str(place) in str(arguments[0])
        # the library of the system is asked to exchange two directories
        if not changes and (event, arguments) != ("ctypes.dlopen", (None,)):
            return
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        if told >= 0:
            os.write(told, b".")

    sys.addaudithook(hook)


def finish(work: Callable[[], None], place: Path) -> tuple[int, int, float]:
    """Some work done in a fork: its exit status, calls that changed files, and seconds."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    start = time.perf_counter()
    process = fork(work, place, writing)
    os.close(writing)
    calls = 0
    with os.fdopen(reading, "rb") as file:
        while data := file.read1(4096):
            calls += len(data)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return status, calls, time.perf_counter() - start


# ---- what is left

_TIMES = {"seconds", "seconds_left", "tokens_per_second", "smooth", "total"}


def contents(path: Path) -> dict[str, str]:
    """The files of a directory, hashed without the times that the run took."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(_timeless(file)).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _timeless(file: Path) -> bytes:
    if file.suffix not in (".json", ".jsonl", ".md"):
        return file.read_bytes()
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return re.sub(r"[\d.e-]+ s\b", "", text).encode()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    return json.dumps([_without_times(json.loads(line)) for line in lines]).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in _TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def beside(out: Path) -> list[str]:
    """What lies beside an output, and is no checkpoint that waits to be gone on from."""
    names = {p.name for p in out.parent.iterdir()} - {out.name}
    return sorted(names)


def is_writing(out: Path) -> bool:
    """Whether a run that was killed had begun to write something that is not done."""
    run = out.with_name(f"{out.name}.run")
    return any(n.startswith(".") for n in beside(out)) or any(run.glob("*.part"))


# ---- one command


class Victim:
    """A command that is killed, with what an uninterrupted run of it gives."""

    def __init__(self, name: str, arguments: list[str], folder: Path) -> None:
        self.name, self.folder = name, folder
        self.out = folder / name / "out"
        self.arguments = [str(self.out) if a == "OUT" else a for a in arguments]
        self._clean()
        status, self.calls, self.seconds = finish(lambda: cli(self.arguments), self.out.parent)
        assert status == 0, f"{name} failed with {status}"
        self.expected = contents(self.out)
        # what is replaced in every other run
        self.old = {"old.txt": hashlib.sha256(b"old").hexdigest()}

    def kill(self, number: int, moments: int) -> dict[str, Any]:
        """Kill one run, look, and run the command to its end; what was seen, as JSON data."""
        timed = round(TIMED * moments)
        replaces = bool(number % 2)
        arguments = [*self.arguments, "--overwrite"] if replaces else self.arguments
        # a run can be sooner done than the first was: then its moment comes sooner, too
        for _ in range(4):
            self._clean()
            if replaces:
                self.out.mkdir()
                (self.out / "old.txt").write_text("old")
            if number < timed:
                at: dict[str, Any] = {"seconds": self.seconds * (number + 0.5) / timed}
                killed = self._killed_after(at["seconds"], lambda: cli(arguments))
            else:
                at = {"call": round(self.calls * (number - timed + 0.5) / (moments - timed))}
                process = fork(lambda: cli(arguments), self.out.parent, kill_at=at["call"])
                killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
            if killed:
                break
        writing = is_writing(self.out)
        left, again = self._state(replaces), bool(beside(self.out))
        if left != "finished" and again:
            status, *_ = finish(lambda: cli(arguments), self.out.parent)
            left = left if status == 0 else f"{left}, and the next run failed with {status}"
        same = contents(self.out) == self.expected if again else None
        # a finished run that was killed before it tidied up has its checkpoints left
        rest = [n for n in beside(self.out) if not (left == "finished" and n == "out.run")]
        return {
            "command": self.name, "number": number, "replaces": replaces, **at, "killed": killed,
            "writing": writing or "call" in at, "left": left, "again": again, "same": same,
            "beside": rest,
        }  # fmt: skip

    def _killed_after(self, seconds: float, work: Callable[[], None]) -> bool:
        """Do some work in a fork and kill it after `seconds`, if it has not ended before."""
        start = time.perf_counter()
        process = fork(work, self.out.parent)
        while (now := time.perf_counter() - start) < seconds:
            if os.waitpid(process, os.WNOHANG)[0]:
                self.seconds = now
                return False
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(process, 0)[1])

    def _state(self, replaces: bool) -> str:
        if not self.out.exists():
            return "LOST" if replaces else "absent"
        found = contents(self.out)
        if found == self.expected:
            return "finished"
        return "as before" if replaces and found == self.old else "HALF WRITTEN"

    def _clean(self) -> None:
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()


def is_right(record: dict[str, Any]) -> bool:
    """Whether nothing was lost or half written, and the next run gave what it should."""
    fine = record["left"] in ("absent", "as before", "finished")
    # what was killed after its output was done may leave what it wrote with
    tidy = record["left"] == "finished" or not record["beside"]
    return fine and record["same"] is not False and tidy


def table(records: list[dict[str, Any]]) -> str:
    """The figures, command by command, as Markdown."""
    lines = [
        "| command | killed | while files were written | output absent | as before | finished "
        "| run again, the same | wrong |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(r["command"] for r in records):
        own = [r for r in records if r["command"] == name]
        left = Counter(r["left"] for r in own)
        counts = [
            sum(r["killed"] for r in own), sum(r["killed"] and r["writing"] for r in own),
            left["absent"], left["as before"], left["finished"],
            sum(r["same"] is True for r in own), sum(not is_right(r) for r in own),
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Kill what has not been killed yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=36, help="of each command")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--json", type=Path, help="results, which are added to")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    records: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        records = json.loads(options.json.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="killed-") as folder:
        commands = prepare(Path(folder))
        for name in options.commands.split(","):
            done = {r["number"] for r in records if r["command"] == name}
            todo = [n for n in range(options.moments) if n not in done]
            victim = Victim(name, commands[name], Path(folder)) if todo else None
            for number in todo:
                assert victim is not None
                record = victim.kill(number, options.moments)
                records.append(record)
                if not is_right(record):
                    print("WRONG", record, flush=True)
                if options.json is not None:
                    text = ",\n".join(json.dumps(r) for r in records)
                    options.json.write_text(f"[\n{text}\n]\n", encoding="utf-8")
            print(f"{name}: {len(todo)} moments", flush=True)
    print(table(records))
    sys.exit(not all(map(is_right, records)))


if __name__ == "__main__":
    main()
