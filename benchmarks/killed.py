"""Killing commands at moments spread over the run: what is left, and what follows.

A process with everything imported forks for each run of a command, and the fork is killed. See
`benchmarks/cases/killed.yaml`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Container
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Table, markdown

# events of `sys.addaudithook` that change a file
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod"}
# what differs between two runs that write the same
TIMES = {"seconds", "seconds_left", "tokens_per_second", "smooth", "total"}


def prepare(folder: Path, options: Namespace) -> None:
    """Make a tiny model and what the commands need of it."""
    import accelerate  # noqa: F401

    import reroll.recover  # noqa: F401
    from reroll.rewrite.analysis.samples import sample_text
    from tests import tiny

    tiny.save(tiny.llama(layers=2), folder / "model", tiny.tokenizer())
    (folder / "recipe.yaml").write_text(json.dumps(options.recipe), encoding="utf-8")
    (folder / "text.txt").write_text(sample_text(), encoding="utf-8")
    for text in options.before:
        if refused := cli(shlex.split(text.replace("WORK", str(folder)))):
            raise SystemExit(refused)


def cli(arguments: list[str]) -> str:
    """Run the command line; the message of a refusal."""
    from reroll.cli import app

    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        status = app(arguments, prog_name="reroll", standalone_mode=False)
    return said.getvalue().strip().splitlines()[-1] if status else ""


# ---- processes


def fork(arguments: list[str], place: Path, kill_at: int = -1) -> int:
    """Run a command in a fork, whose number is returned.

    Before its call with the number `kill_at` that changes a file in `place`, the fork kills itself.
    How many calls there were is in a file beside `place` at the end.
    """
    if process := os.fork():
        return process
    status = 99
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        calls = watch(place, kill_at)
        status = bool(cli(arguments))
        place.with_suffix(".calls").write_text(str(len(calls)))
    finally:
        os._exit(status)


def watch(place: Path, kill_at: int) -> list[str]:
    """List the calls of this process that change a file in `place`, and stop it before one."""
    calls: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        changes = (opens or event in CHANGES) and f"{place}/" in f"{arguments[0]}/"
        # the library of the system is asked to exchange two directories
        if changes or (event, arguments) == ("ctypes.dlopen", (None,)):
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(event)

    sys.addaudithook(hook)
    return calls


def finish(arguments: list[str], place: Path) -> int:
    """Run a command to its end in a fork; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(arguments, place), 0)[1])


def killed_after(seconds: float, process: int) -> float | None:
    """Kill a fork after so many seconds; if it ends before, after how many it did."""
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < seconds:
        if os.waitpid(process, os.WNOHANG)[0]:
            return now
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    return None if os.WIFSIGNALED(os.waitpid(process, 0)[1]) else seconds


# ---- what is left


def contents(path: Path, timed: Container[str] = (".json", ".jsonl", ".md")) -> dict[str, str]:
    """The files of a directory, hashed; those that tell times without these."""
    found = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        data = _timeless(file) if file.suffix in timed else file.read_bytes()
        found[file.relative_to(path).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(file: Path) -> bytes:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return re.sub(r"[\d.e-]+ s\b", "", text).encode()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    return json.dumps([json.loads(line, object_hook=_without_times) for line in lines]).encode()


def _without_times(content: Row) -> Row:
    return {key: value for key, value in content.items() if key not in TIMES}


class Victim:
    """A command that is killed, with what an uninterrupted run of it gives."""

    def __init__(self, name: str, folder: Path, options: Namespace) -> None:
        self.out, self.options = folder / name / "out", options
        text = options.runs[name].replace("WORK", str(folder)).replace("OUT", str(self.out))
        self.arguments = shlex.split(text)
        self.prepare(replaces=False)
        start = time.perf_counter()
        status = finish(self.arguments, self.out.parent)
        assert status == 0, f"{name} failed with {status}"
        self.seconds = time.perf_counter() - start
        self.calls = int(self.out.parent.with_suffix(".calls").read_text())
        self.expected = contents(self.out)

    def kill(self, number: int, moments: int) -> Row:
        """Kill one run, look, and run the command to its end; what was seen."""
        replaces = bool(number % 2)
        arguments = [*self.arguments, "--overwrite"] if replaces else self.arguments
        # a run can be sooner done than the first was: then its moment comes sooner, too
        for _ in range(4):
            old = self.prepare(replaces)
            at, killed = self.killed_at(number, moments, arguments)
            if killed:
                break
        unfinished = self.out.with_name("out.run").glob("*.part")
        hidden = [name for name in self.beside() if name.startswith(".")]
        writing = "call" in at or bool(hidden) or any(unfinished)
        left, again = self.state(replaces, old), bool(self.beside())
        if left != "finished" and again:
            status = finish(arguments, self.out.parent)
            left += f", and the next run failed with {status}" if status else ""
        same = contents(self.out) == self.expected if again else None
        # a finished run that was killed before it tidied up has its checkpoints left
        rest = [n for n in self.beside() if not (left == "finished" and n == "out.run")]
        seen = {"writing": writing, "left": left, "again": again, "same": same, "beside": rest}
        return {"replaces": replaces, **at, "killed": killed, **seen}

    def killed_at(self, number: int, moments: int, arguments: list[str]) -> tuple[Row, bool]:
        """The moment with a number, and whether a run was killed at it."""
        timed = round(self.options.timed * moments)
        if number < timed:
            seconds = self.seconds * (number + 0.5) / timed
            ended = killed_after(seconds, fork(arguments, self.out.parent))
            self.seconds = self.seconds if ended is None else ended
            return {"seconds": seconds}, ended is None
        call = round(self.calls * (number - timed + 0.5) / (moments - timed))
        process = fork(arguments, self.out.parent, kill_at=call)
        return {"call": call}, os.WIFSIGNALED(os.waitpid(process, 0)[1])

    def beside(self) -> list[str]:
        """What lies beside the output."""
        return sorted({p.name for p in self.out.parent.iterdir()} - {self.out.name})

    def state(self, replaces: bool, old: dict[str, str]) -> str:
        """What the output is, after a kill."""
        if not self.out.exists():
            return "LOST" if replaces else "absent"
        found = contents(self.out)
        if found == self.expected:
            return "finished"
        return "as before" if replaces and found == old else "HALF WRITTEN"

    def prepare(self, replaces: bool) -> dict[str, str]:
        """Put what is to be replaced where the output goes, or nothing; its contents."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        if replaces:
            self.out.mkdir()
            (self.out / "old.txt").write_text("old")
        return contents(self.out)


def is_right(row: Row) -> bool:
    """Whether nothing was lost or half written, and the next run gave what it should."""
    fine = row["left"] in ("absent", "as before", "finished")
    # what was killed after its output was done may leave what it wrote with
    tidy = row["left"] == "finished" or not row["beside"]
    return fine and row["same"] is not False and tidy


def summary(content: Any) -> list[str]:
    """The figures, command by command, as Markdown, of what a file of results holds."""
    lines = []
    for name in dict.fromkeys(row["command"] for row in content["rows"]):
        own = [row for row in content["rows"] if row["command"] == name]
        left = Counter(row["left"] for row in own)
        lines.append({
            "command": name,
            "killed": sum(row["killed"] for row in own),
            "while files were written": sum(row["killed"] and row["writing"] for row in own),
            "output absent": left["absent"],
            "as before": left["as before"],
            "finished": left["finished"],
            "run again, the same": sum(row["same"] is True for row in own),
            "wrong": sum(not is_right(row) for row in own),
        })  # fmt: skip
    columns = dict.fromkeys(lines[0], "{:}") | {"command": "{}"}
    return markdown(columns, lines)


def measure(table: Table, options: Namespace) -> None:
    """Kill what has not been killed yet, and print the table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="killed-") as folder:
        prepare(Path(folder), options)
        for name in options.commands:
            cases = [{"command": name, "number": n} for n in range(options.moments)]
            if missing := list(table.missing(cases)):
                victim = Victim(name, Path(folder), options)
            for case in missing:
                table.add(case | victim.kill(case["number"], options.moments))
    print("\n".join(["", *summary({"rows": table.rows})]))
    sys.exit(not all(map(is_right, table.rows)))
