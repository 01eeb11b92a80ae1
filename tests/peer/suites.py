"""Test cases of transformers' common tests on a kind of model, lowered or original."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import random
import signal
import traceback
import unittest
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reroll
from reroll.rewrite.checkpoint import MemorySource
from reroll.rewrite.ir.program import Program
from reroll.runtime.models.auto import model_class
from reroll.runtime.models.config import RerollConfig
from tests import captured, tiny
from tests.peer.distribution import test_module
from tests.peer.kinds import KINDS, Kind, Tester
from tools.peer_tests import FOLDER

# entries of a configuration that a run reads and no capture: they need no capture of their own
RUN_ONLY = ("output_hidden_states", "output_attentions", "return_dict", "gradient_checkpointing")


def case_of(name: str, *, lowered: bool) -> type[unittest.TestCase]:
    """The test case of a kind: transformers' common tests, and for a decoder its training tests."""
    kind = KINDS[name]
    common = test_module("test_modeling_common")
    pair = kind.original.config().is_encoder_decoder
    bases = [common.ModelTesterMixin, common.GenerationTesterMixin]
    if not pair:
        # these train on tokens of one text
        bases.append(test_module("test_training_mixin").TrainingTesterMixin)
    tested = lowered_class(kind) if lowered else kind.original.model_class
    body = {
        "all_model_classes": (tested,),
        "is_encoder_decoder": pair,
        # the training tests declare this as a property
        "model_tester": None,
        "setUp": lambda self: setattr(self, "model_tester", Tester(kind.original)),
        **(kind.flags if lowered else {}),
    }
    return type(f"{name.title().replace(' ', '')}Test", (*bases, unittest.TestCase), body)


def lowered_class(kind: Kind) -> Any:
    """The class of a lowered model, made of the original's configuration as tests make models."""
    with quiet():
        original = kind.original.model_class(kind.original.config())
        lowered = model_class(program_of(kind, original))

    # a test may make another model of a model's own configuration
    made: dict[int, tuple[Any, Program]] = {}

    def __init__(self: Any, config: Any, program: Program | None = None) -> None:
        if program is None and id(config) in made:
            lowered.__init__(self, config, made[id(config)][1])
            self.load_weights()
            return
        if program is not None or isinstance(config, RerollConfig):
            lowered.__init__(self, config, program)
            return
        with torch.device("cpu"):
            program = program_of(kind, kind.original.model_class(copy.deepcopy(config)))
        # the original takes entries out of its configuration that it has read
        program = replace(program, origin=replace(program.origin, config=config.to_dict()))
        lowered.__init__(self, RerollConfig.from_program(program), program)
        made[id(self.config)] = self.config, program
        if torch.get_default_device().type != "meta":
            self.load_weights()

    # its name and module are those of the class itself, whose models it stands for
    return type(
        lowered.__name__, (lowered,), {"__init__": __init__, "__module__": lowered.__module__}
    )


def program_of(kind: Kind, original: Any) -> Program:
    """The Program of an original after the kind's passes."""
    program = _captured(original)
    known = dict(original.named_parameters(remove_duplicate=False))
    own = {
        n: known[n].detach() if n in known else program.source.load(n)
        for n in program.source.names()
    }
    program = replace(program, source=MemorySource(own))
    program = replace(program, origin=replace(program.origin, config=original.config.to_dict()))
    if not kind.passes:
        return program
    return reroll.run_passes(program, kind.passes, measure="off", tokenizer=tiny.tokenizer())


def _captured(original: Any) -> Program:
    """The Program of a capture, which is kept: another of random weights has its graph."""
    entries = {k: v for k, v in original.config.to_dict().items() if k not in RUN_ONLY}
    entries = {k: v for k, v in entries.items() if not k.startswith("init")}
    key = f"{_code()} {original.dtype} {type(original).__name__} {sorted(entries.items())}"
    file = FOLDER / "captures" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pickle"
    if not file.exists():
        with quiet():
            program = reroll.capture(copy.deepcopy(original).eval())
        file.parent.mkdir(parents=True, exist_ok=True)
        captured.write(program, file)
    return captured.read(file)


@cache
def _code() -> str:
    """A digest of the code that captures."""
    digest = hashlib.sha256()
    for file in sorted(Path(reroll.__file__).parent.glob("rewrite/**/*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# ---- running


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep output off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def names_of(case: type[unittest.TestCase], chosen: Sequence[str] = ()) -> list[str]:
    """The names of a case's tests, or of those that contain one of `chosen`."""
    names = unittest.defaultTestLoader.getTestCaseNames(case)
    return [n for n in names if not chosen or any(part in n for part in chosen)]


def outcome(case: type[unittest.TestCase], name: str, seconds: int = 300) -> tuple[str, str]:
    """Run a test: "passed", "skipped" with the reason, or "failed" with its traceback."""
    # what one test draws or sets must not reach the next
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    result = unittest.TestResult()
    try:
        with quiet(), within(seconds):
            torch.manual_seed(0)
            case(name).run(result)
    except TimeoutError as error:
        return "failed", "".join(traceback.format_exception_only(error))
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    if broken := result.failures + result.errors:
        return "failed", broken[0][1]
    if result.skipped:
        return "skipped", result.skipped[0][1]
    return "passed", ""


def last_line(trace: str) -> str:
    """The line of a traceback that names the error, cut to what a table holds.

    An assertion that says nothing stands beside its code.
    """
    lines = [line for line in trace.splitlines() if line and not line.startswith((" ", "hint"))]
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    last = (named or lines or [""])[-1]
    if last.startswith("AssertionError"):
        asserted = [line.strip() for line in trace.splitlines() if line.startswith("    self.")]
        last = " in ".join([last, *asserted[-1:]])
    return last[:300]
