"""Saving and loading a converted model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import reroll
from reroll.errors import RerollError, UsageError
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured

RECIPES = ["", "tie(blocks=2)", "tie(blocks=2, init=average), relax(rank=4)"]


def program(passes: str = "") -> Any:
    made = captured("llama")
    return run_passes(made, passes, measure=False) if passes else made


def contents(directory: Path) -> dict[str, bytes]:
    return {
        f.relative_to(directory).as_posix(): f.read_bytes()
        for f in sorted(directory.rglob("*"))
        if f.is_file()
    }


@pytest.mark.parametrize("passes", RECIPES)
def test_save_load_save_gives_the_same_bytes(tmp_path: Path, passes: str) -> None:
    program(passes).save(str(tmp_path / "a"))
    reroll.load(tmp_path / "a").save(str(tmp_path / "b"))
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first
    assert first == second


@pytest.mark.parametrize("passes", RECIPES)
def test_transformers_loads_it(tmp_path: Path, passes: str) -> None:
    made = program(passes)
    made.save(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    ids = torch.randint(3, 64, (2, 9))
    assert torch.equal(loaded(ids).logits, made.to_module().eval()(ids).logits)


def test_an_existing_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError):
        program().save(str(tmp_path / "out"))
    assert contents(tmp_path / "out") == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda b: b[: len(b) // 2]),
        ("model.safetensors", lambda b: b"\xff" * 8 + b[8:]),
        ("config.json", lambda b: b[:40]),
        ("program.json", lambda b: b[:-30]),
        ("program.json", lambda b: b.replace(b"reroll.rms_norm", b"os.system_____")),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path: Path, name: str, damage: Any) -> None:
    program().save(str(tmp_path / "out"))
    file = tmp_path / "out" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises((RerollError, OSError)):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))


def _save_slowly(target: str, started: Any) -> None:
    import reroll.export.huggingface as huggingface

    made = program()
    move = os.replace

    def late(*args: Any, **kwargs: Any) -> None:
        started.set()
        time.sleep(60)
        move(*args, **kwargs)

    os.replace = os.rename = late  # type: ignore[assignment]
    huggingface.save(made, target)


def test_killed_while_saving_leaves_no_target(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_save_slowly, args=(str(tmp_path / "out"), started))
    process.start()
    assert started.wait(120)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "out").exists()
