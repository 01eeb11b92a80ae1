"""Runs of a tiny model: they learn, resume exactly, and are the same over two processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import reroll
from reroll.errors import CheckpointError, RecoveryError, UsageError
from reroll.recover import Recipe, recover, tensorboard
from reroll.recover import recipe as recipes
from reroll.recover.checkpoints import Directory, _write_state
from reroll.rewrite.analysis.samples import sample_text
from reroll.rewrite.checkpoint import write_file
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")

TOKENS = 4 * 16 * 12
SETTINGS = {"length": 16, "batch": 4, "held_rows": 4, "save_every": 3}


def recipe(*stages: Any, **settings: Any) -> Recipe:
    return recipes.parse({"recover": {**SETTINGS, **settings, "stages": list(stages)}})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("made") / "model", tiny.tokenizer())


@pytest.fixture(scope="module")
def tied(original: Path) -> Path:
    program = reroll.run_passes(
        reroll.capture(str(original)), "tie(blocks=2), relax(rank=2)", measure=False
    )
    program.save(str(original.with_name("tied")))
    return original.with_name("tied")


@pytest.fixture(scope="module")
def text(original: Path) -> Path:
    file = original.with_name("text.txt")
    file.write_text(sample_text(), encoding="utf-8")
    return file


def log(out: Path) -> list[dict[str, Any]]:
    lines = (out / "recovery.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


STAGES = [
    {"align": {"lr": 3e-3, "share": 0.5, "start_tokens": 100}},
    {"distil": {"lr": 3e-3, "hidden": 0.1, "ce": 0.1}},
    {"tune": {"lr": 1e-3, "share": 0.25, "optimizer": "muon"}},
]


def test_stages_bring_a_model_nearer(tied: Path, text: Path, tmp_path: Path) -> None:
    stages = [{"align": {"lr": 1e-2}}, {"distil": {"lr": 5e-3}}]
    report = recover(
        str(tied), tmp_path / "out", data=[text], recipe=recipe(*stages), tokens=4 * TOKENS
    )
    before, between, after = (line["kl"] for line in report.measures)
    assert between < 0.8 * before
    assert after < 0.8 * between
    # what is measured is what is saved
    saved = reroll.load(tmp_path / "out")
    assert saved.weights["model.layers.*.mlp.up_proj.weight"].index == (0, 1, 0, 1)
    assert saved.origin.steps[-1].text.startswith("recover(")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert model(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()
    assert not (tmp_path / "out.run").exists()


@pytest.mark.slow
def test_a_stage_without_a_share_only_starts(tied: Path, text: Path, tmp_path: Path) -> None:
    """Least squares, and no step: what is saved is what they gave, alone or before other stages."""
    start = {"align": {"share": 0, "start_tokens": 100}}
    alone = recover(str(tied), tmp_path / "out", data=[text], recipe=recipe(start), tokens=TOKENS)
    assert alone.tokens == 0
    before, fitted, after = (line["kl"] for line in alone.measures)
    assert fitted == after < before
    changed = {n for n, t in _tensors(tied) if not torch.equal(t, _found(tmp_path / "out", n))}
    assert changed
    assert all("lora" in name for name in changed)
    then = recover(
        str(tied), tmp_path / "two", data=[text], recipe=recipe(start, "distil"), tokens=TOKENS
    )
    assert [line["before"] for line in then.measures] == [
        "align", "the steps of align", "distil", ""
    ]  # fmt: skip
    assert {line["stage"] for line in log(tmp_path / "two")} == {"distil"}
    assert len(log(tmp_path / "two")) == TOKENS // (4 * 16)


def _found(path: Path, name: str) -> torch.Tensor:
    found: torch.Tensor = dict(_tensors(path))[name]
    return found


def test_steps_are_written_for_tensorboard(tied: Path, text: Path, tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tensorboard(tmp_path / "board")
    out = tmp_path / "out"
    recover(str(tied), out, data=[text], recipe=recipe("tune"), tokens=TOKENS, on_step=board)
    found = accumulators.EventAccumulator(str(tmp_path / "board")).Reload()
    events = [(e.step, e.value) for e in found.Scalars("loss")]
    assert events == [(s["steps"], pytest.approx(s["loss"])) for s in log(out)]


def test_only_what_a_stage_names_is_trained(tied: Path, text: Path, tmp_path: Path) -> None:
    stage = {"distil": {"train": ["lora_up"], "lr": 1e-2}}
    recover(str(tied), tmp_path / "out", data=[text], recipe=recipe(stage), tokens=TOKENS)
    before, after = (dict(_tensors(p)) for p in (tied, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_up" in name}


def _tensors(path: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors").items()


def test_adapters_are_merged(original: Path, text: Path, tmp_path: Path) -> None:
    reroll.capture(str(original)).save(str(tmp_path / "rolled"))
    stage = {"tune": {"train": "lora", "lr": 1e-2, "lora_on": ["q_proj", "up_proj"]}}
    stages, out = recipe(stage), tmp_path / "out"
    report = recover(str(tmp_path / "rolled"), out, data=[text], recipe=stages, tokens=4 * TOKENS)
    assert report.measures[-1]["perplexity"] < report.measures[0]["perplexity"]
    before, after = (dict(_tensors(tmp_path / p)) for p in ("rolled", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "up_proj" in name}


def test_adapters_and_named_weights_train_together(
    original: Path, text: Path, tmp_path: Path
) -> None:
    reroll.capture(str(original)).save(str(tmp_path / "rolled"))
    train = ["lora", "down_proj"]
    stages = recipe({"tune": {"train": train, "lr": 1e-2, "lora_on": ["q_proj"]}})
    out = tmp_path / "out"
    recover(str(tmp_path / "rolled"), out, data=[text], recipe=stages, tokens=2 * TOKENS)
    before, after = (dict(_tensors(tmp_path / p)) for p in ("rolled", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}


def test_a_shared_weight_takes_no_adapter(tied: Path, text: Path, tmp_path: Path) -> None:
    stage = {"tune": {"train": "lora"}}
    with pytest.raises(UsageError, match="one weight for several depths"):
        recover(str(tied), tmp_path / "out", data=[text], recipe=recipe(stage), tokens=TOKENS)
    assert not (tmp_path / "out").exists()


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tied: Path, text: Path) -> Path:
    """A run of all stages that nothing interrupted."""
    out = tied.with_name("whole")
    recover(str(tied), out, data=[text], recipe=recipe(*STAGES), tokens=TOKENS)
    return out


MEASURED = [
    ("align", 0),
    ("the steps of align", 0),
    ("distil", 3),
    ("tune", 10),
    ("", 12),
]


# within a stage, after one's last step, and before the next one's first checkpoint
@pytest.mark.parametrize("stop", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_a_run_goes_on_as_if_it_had_not_stopped(
    tied: Path, text: Path, whole: Path, tmp_path: Path, stop: int
) -> None:
    arguments: Any = {"data": [text], "recipe": recipe(*STAGES), "tokens": TOKENS}

    def stopping(step: Any) -> None:
        if step["steps"] == stop:
            raise Stopped

    with pytest.raises(Stopped):
        recover(str(tied), tmp_path / "out", **arguments, on_step=stopping)
    assert not (tmp_path / "out").exists()
    report = recover(str(tied), tmp_path / "out", **arguments)
    assert [(m["before"], m["steps"]) for m in report.measures] == MEASURED
    again = log(tmp_path / "out")
    assert [s["steps"] for s in again] == list(range(1, 13))
    assert [s["loss"] for s in again] == [s["loss"] for s in log(whole)]
    saved = [_tensors(p) for p in (whole, tmp_path / "out")]
    for (name, a), (_, b) in zip(*saved, strict=True):
        assert torch.equal(a, b), name


def test_what_a_checkpoint_has_is_in_the_log(
    tied: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run is killed as soon as the checkpoint is written."""
    save_step = Directory.save_step

    def stopping(self: Directory, progress: Any, *rest: Any) -> None:
        save_step(self, progress, *rest)
        if progress.steps == 2:
            raise Stopped

    arguments: Any = {"data": [text], "tokens": TOKENS // 3, "recipe": recipe("tune", save_every=1)}
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Directory, "save_step", stopping)
        recover(str(tied), tmp_path / "out", **arguments)
    recover(str(tied), tmp_path / "out", **arguments)
    assert [s["steps"] for s in log(tmp_path / "out")] == [1, 2, 3, 4]


def test_other_settings_do_not_go_on(tied: Path, text: Path, tmp_path: Path) -> None:
    def stopping(_: Any) -> None:
        raise Stopped

    arguments: Any = {"data": [text], "tokens": TOKENS}
    with pytest.raises(Stopped):
        recover(str(tied), tmp_path / "out", **arguments, recipe=recipe("tune"), on_step=stopping)
    with pytest.raises(UsageError, match="other settings: recipe"):
        recover(str(tied), tmp_path / "out", **arguments, recipe=recipe("distil"))
    recover(str(tied), tmp_path / "out", **arguments, recipe=recipe("distil"), restart=True)


def test_a_loss_that_is_not_finite_stops_the_run(tied: Path, text: Path, tmp_path: Path) -> None:
    stages = recipe({"tune": {"lr": 1e30, "warmup": 0.0, "clip": 0.0}}, save_every=1)
    with pytest.raises(RecoveryError, match="not finite"):
        recover(str(tied), tmp_path / "out", data=[text], recipe=stages, tokens=TOKENS)
    assert Directory(tmp_path / "out.run").last() is not None
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    tied: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = torch.save
    calls = []

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        saved(*args)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        recover(str(tied), tmp_path / "out", data=[text], recipe=recipe("tune"), tokens=TOKENS)
    found = Directory(tmp_path / "out.run").last()
    assert found is not None
    assert found[0].steps == 3


@pytest.mark.parametrize("write", [write_file, _write_state])
def test_what_the_system_says_is_told(tmp_path: Path, write: Any) -> None:
    """safetensors and torch both hide it behind errors of their own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write({"a": torch.zeros(100_000)}, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_two_runs_on_one_output(tied: Path, text: Path, tmp_path: Path) -> None:
    arguments: Any = {"data": [text], "recipe": recipe("tune"), "tokens": TOKENS}

    def again(step: Any) -> None:
        if step["steps"] == 1:
            with pytest.raises(UsageError, match=f"another run .* process {os.getpid()}"):
                recover(str(tied), tmp_path / "out", **arguments)

    recover(str(tied), tmp_path / "out", **arguments, on_step=again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert len(log(tmp_path / "out")) == 12


def test_a_lock_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "out.run")
    directory.path.mkdir()
    (directory.path / "lock").write_text("1 on elsewhere")
    with directory.exclusive():
        assert (directory.path / "lock").read_text().startswith(f"{os.getpid()} on ")
        (directory.path / "run.json").write_text("{}")
    with directory.exclusive():
        pass
    assert (directory.path / "run.json").is_file()


def test_an_original_that_has_moved(
    original: Path, tied: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    program = reroll.load(tied)
    gone = replace(program, origin=replace(program.origin, model=str(tmp_path / "gone")))
    arguments: Any = {"data": [text], "recipe": recipe("distil"), "tokens": 64}
    with pytest.raises(UsageError, match="gone: the original is not where it was") as told:
        recover(gone, tmp_path / "out", **arguments)
    assert "--teacher" in str(told.value.hint)
    assert list(tmp_path.iterdir()) == []
    recover(gone, tmp_path / "out", **arguments, teacher=str(original))


def test_outputs_that_would_replace_what_is_read(original: Path, tied: Path, text: Path) -> None:
    arguments: Any = {"data": [text], "recipe": recipe("distil"), "tokens": 64, "overwrite": True}
    before = sorted(original.parent.rglob("*"))
    # the student, its original, what holds all, and a place inside of the student
    for out in (tied, original, original.parent, tied / "out"):
        with pytest.raises(UsageError):
            recover(str(tied), out, **arguments)
    assert sorted(original.parent.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["join", "separate"])
def test_micro_batches_give_the_same_steps(tied: Path, tmp_path: Path, pack: str) -> None:
    data = tmp_path / "text.jsonl"
    parts = sample_text().split(".")
    data.write_text("\n".join(json.dumps({"text": p}) for p in parts), encoding="utf-8")
    losses = []
    for micro in (None, 1):
        out = tmp_path / f"out{micro}"
        stages = recipe(*STAGES, micro=micro, pack=pack)
        recover(str(tied), out, data=[data], recipe=stages, tokens=TOKENS)
        losses.append([s["loss"] for s in log(out)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


COMMAND = ["-m", "reroll.cli", "recover"]


def _arguments(tied: Path, text: Path, out: Path, folder: Path, **settings: Any) -> list[str]:
    import yaml

    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(*STAGES, **settings).to_data()), encoding="utf-8")
    return [
        str(tied), str(out), "--data", str(text), "--recipe", str(file), "--tokens", str(TOKENS)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(
    tied: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    arguments = _arguments(tied, text, tmp_path / "two", tmp_path)
    # accelerate's own launcher starts several processes on accelerators only
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launch, *COMMAND, *arguments]
    subprocess.run(command, check=True, env=environment, timeout=300)
    measured = reroll.load(tmp_path / "two").origin.steps[-1].measured
    assert measured["processes"] == 2
    one, two = log(whole), log(tmp_path / "two")
    assert [s["loss"] for s in two] == pytest.approx([s["loss"] for s in one], rel=1e-4)
    assert [s["tokens"] for s in two] == [s["tokens"] for s in one]


@pytest.mark.slow
def test_kill_and_go_on(tied: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = _arguments(tied, text, out, tmp_path, save_every=1)
    for _ in range(20):
        process = subprocess.Popen([sys.executable, *COMMAND, *arguments])
        steps = out.with_name("out.run")
        known = len(list(steps.glob("step-*")))
        while process.poll() is None and len(list(steps.glob("step-*"))) <= known:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    else:
        subprocess.run([sys.executable, *COMMAND, *arguments], check=True)
    assert [s["loss"] for s in log(out)] == [s["loss"] for s in log(whole)]


@pytest.mark.slow
def test_a_linearized_model_learns_what_its_window_hides(
    original: Path, text: Path, tmp_path: Path
) -> None:
    passes = "linearize(mixer=gla, feature_map=hedgehog, window=4, sinks=1, combine=disjoint)"
    program = reroll.run_passes(reroll.capture(str(original)), passes, measure=False)
    program.save(str(tmp_path / "linear"))
    stages = [{"align": {"lr": 1e-2}}, {"distil": {"lr": 1e-2, "train": "new"}}]
    settings = recipe(*stages, length=48, precision="bf16", checkpointing=True)
    report = recover(
        str(tmp_path / "linear"), tmp_path / "out", data=[text], recipe=settings, tokens=4000
    )
    assert report.measures[-1]["kl"] < 0.9 * report.measures[0]["kl"]
    before, after = (dict(_tensors(tmp_path / p)) for p in ("linear", "out"))
    assert all(torch.equal(before[n], after[n]) for n in before if "proj.weight" in n)
