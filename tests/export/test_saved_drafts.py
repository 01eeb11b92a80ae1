"""A directory with one set of weights and two programs: a model and its draft."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import reroll
from reroll.cli.app import app
from reroll.errors import CheckpointError, UsageError
from reroll.rewrite.checkpoint import SafetensorsSource
from reroll.rewrite.ir.drafts import added_bytes
from reroll.rewrite.ir.program import Program
from tests import captured, tiny

WINDOW = "window(size=8, sinks=2)"
DELTA = "linearize(mixer=gated_deltanet, window=4, sinks=1)"
RELAX = "tie(blocks=2), relax(rank=2)"
IDS = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(0))


def tokens(text: str) -> list[int]:
    return [3 + ord(c) % 60 for c in text]


def drafted(passes: str, name: str = "llama", dtype: torch.dtype = torch.float32) -> Program:
    program = captured.captured(name, dtype)
    return program.with_draft(program.twin(passes, tokenizer=tokens))


def sizes(directory: Path) -> dict[str, int]:
    return {
        str(f.relative_to(directory)): f.stat().st_size for f in directory.rglob("*.safetensors")
    }


def generated(module: Any, draft: Any, **options: Any) -> Tensor:
    return reroll.generate(module, IDS, draft, max_new_tokens=20, ends=(), **options)


def plain(module: Any) -> Tensor:
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: Tensor = module.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", [WINDOW, DELTA, RELAX])
def test_weights_are_written_once(passes: str, dtype: torch.dtype, tmp_path: Path) -> None:
    program = drafted(passes, dtype=dtype)
    program.with_draft(None).save(str(tmp_path / "alone"))
    program.save(str(tmp_path / "both"))
    found, alone = sizes(tmp_path / "both"), sizes(tmp_path / "alone")
    assert found["model.safetensors"] == alone["model.safetensors"]
    assert program.draft is not None
    added = added_bytes(program, program.draft)
    if passes == WINDOW:
        assert set(found) == {"model.safetensors"}
        assert added == 0
    else:
        own = SafetensorsSource(tmp_path / "both" / "draft")
        assert sum(own.meta(name).bytes for name in own.names()) == added > 0
    # the draft computes what it did before it was saved
    loaded = reroll.load(tmp_path / "both")
    assert loaded.draft is not None
    expected, actual = (p.to_module()(IDS).logits for p in (program.draft, loaded.draft))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("passes", [WINDOW, DELTA, RELAX])
def test_in_memory_the_model_and_its_draft_share_their_weights(passes: str, tmp_path: Path) -> None:
    drafted(passes).save(str(tmp_path / "out"))
    program = reroll.load(tmp_path / "out")
    module = program.to_module()
    assert program.draft is not None
    made = reroll.twin(module, program.draft)
    own = {t.data_ptr() for t in module.state_dict(keep_vars=True).values()}
    other = {t.data_ptr(): t.nbytes for t in made.parameters()}
    assert sum(size for place, size in other.items() if place not in own) == added_bytes(
        program, program.draft
    )


def test_the_saved_draft_is_used(tmp_path: Path) -> None:
    drafted(WINDOW).save(str(tmp_path / "out"))
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = plain(captured.captured("llama").to_module())
    for draft in ("auto", "draft"):
        assert torch.equal(generated(module, draft), expected)
        assert "draft" in module.speculation_report.drafts
    drafts = module.speculation_report.drafts
    assert drafts["draft"][0] > 0
    assert torch.equal(generated(module, ["draft", "lookup"]), expected)


def test_a_program_drafts_for_its_model() -> None:
    program = captured.captured("llama")
    twin, module = program.twin(WINDOW), program.to_module()
    assert torch.equal(generated(module, twin), plain(module))
    assert module.speculation_report.drafts["draft"][0] > 0


def test_it_stays_with_the_program(tmp_path: Path) -> None:
    program = drafted(DELTA)
    copied = pickle.loads(pickle.dumps(program))
    assert str(copied.draft) == str(program.draft)
    program.save(str(tmp_path / "a"))
    reroll.load(tmp_path / "a").save(str(tmp_path / "b"))
    module = reroll.load(tmp_path / "b").to_module()
    module.save_pretrained(tmp_path / "c")
    saved = [(tmp_path / name / "draft" / "program.json").read_bytes() for name in "abc"]
    assert saved[0] == saved[1] == saved[2]
    # passes make another program of it
    assert reroll.run_passes(program, WINDOW, measure="off").draft is None


def test_in_another_dtype_both_are(tmp_path: Path) -> None:
    drafted(WINDOW, dtype=torch.bfloat16).save(str(tmp_path / "half"))
    module = reroll.load(tmp_path / "half").to_module(dtype="float32")
    assert module.program.draft.dtype == torch.float32
    made = reroll.twin(module, module.program.draft)
    assert {p.data_ptr() for p in made.parameters()} <= {p.data_ptr() for p in module.parameters()}
    assert torch.equal(generated(module, "draft"), plain(module))


def test_a_trained_model_keeps_its_draft(tmp_path: Path) -> None:
    """What both have is the model's present weights, in memory and saved."""
    drafted(WINDOW).save(str(tmp_path / "out"))
    module = reroll.load(tmp_path / "out").to_module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05
    module.save_pretrained(tmp_path / "trained")
    assert set(sizes(tmp_path / "trained")) == {"model.safetensors"}
    again = reroll.load(tmp_path / "trained")
    assert again.draft is not None
    made = reroll.twin(module, module.program.draft)
    assert torch.equal(again.draft.to_module()(IDS).logits, made(IDS).logits)
    assert torch.equal(generated(again.to_module(), "draft"), plain(module))


def test_another_vocabulary_has_no_draft(tmp_path: Path) -> None:
    drafted(WINDOW).save(str(tmp_path / "out"))
    module = reroll.load(tmp_path / "out").to_module()
    module.resize_token_embeddings(70)
    module.save_pretrained(tmp_path / "larger")
    assert reroll.load(tmp_path / "larger").draft is None


def test_saving_without_a_draft_removes_an_earlier_one(tmp_path: Path) -> None:
    drafted(DELTA).save(str(tmp_path / "out"))
    captured.captured("llama").to_module().save_pretrained(tmp_path / "out")
    assert set(sizes(tmp_path / "out")) == {"model.safetensors"}
    assert reroll.load(tmp_path / "out").draft is None


class TestRefused:
    def test_a_draft_of_another_program(self) -> None:
        program = captured.captured("llama")
        windowed = reroll.run_passes(program, WINDOW, measure="off")
        with pytest.raises(UsageError, match="that of another program") as told:
            windowed.with_draft(program.twin("window(size=4)"))
        assert told.value.hint
        assert told.value.where
        with pytest.raises(UsageError, match="that of another program"):
            program.with_draft(captured.captured("gpt2").twin(WINDOW))
        with pytest.raises(UsageError, match="that of another program"):
            reroll.twin(program.to_module(), captured.captured("gpt2").twin(WINDOW))

    def test_other_weights_of_the_same_names(self, tmp_path: Path) -> None:
        programs = []
        for seed in (0, 1):
            # the same path at both times, as of a checkpoint that was replaced
            shutil.rmtree(tmp_path / "model", ignore_errors=True)
            tiny.save(tiny.llama(seed=seed), tmp_path / "model")
            captured_ = reroll.capture(str(tmp_path / "model"))
            captured_.save(str(tmp_path / str(seed)))
            programs.append(reroll.load(tmp_path / str(seed)))
        with pytest.raises(UsageError, match="has other values"):
            programs[0].with_draft(programs[1].twin(WINDOW))

    def test_what_gives_no_logits(self) -> None:
        program = captured.captured("bert")
        with pytest.raises(UsageError, match="give logits"):
            program.with_draft(program)

    def test_a_directory_whose_program_was_replaced(self, tmp_path: Path) -> None:
        drafted(WINDOW).save(str(tmp_path / "out"))
        reroll.run_passes(captured.captured("llama"), RELAX, measure="off").save(
            str(tmp_path / "other")
        )
        shutil.copytree(tmp_path / "out" / "draft", tmp_path / "other" / "draft")
        with pytest.raises(CheckpointError, match="another program") as told:
            reroll.load(tmp_path / "other")
        assert "--draft" in str(told.value.hint)

    def test_damaged_files(self, tmp_path: Path) -> None:
        drafted(DELTA).save(str(tmp_path / "out"))
        (tmp_path / "out" / "draft" / "model.safetensors").unlink()
        with pytest.raises(reroll.errors.RerollError) as told:
            reroll.load(tmp_path / "out")
        assert "draft" in str(told.value)

    def test_no_saved_draft(self) -> None:
        with pytest.raises(UsageError, match="no draft was saved"):
            generated(captured.captured("llama").to_module(), "draft")


class TestCommands:
    def run(self, *words: str) -> Any:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, result.output
        return result

    def test_convert_and_generate(self, tmp_path: Path) -> None:
        model = tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer())
        out = str(tmp_path / "out")
        passes = "window(size=64, sinks=2)"
        result = self.run("convert", str(model), out, "--draft", passes, "--json")
        found = json.loads(result.stdout)
        assert found["draft"] == {"passes": ["window(sinks=2)"], "added_bytes": 0}
        options = ["--prompt", "a b a b a b", "--max-new-tokens", "12", "--json"]
        texts = []
        for speculate in ([], ["--speculate", "auto"], ["--speculate", "draft"]):
            result = self.run("generate", out, *speculate, *options)
            told = json.loads(result.stdout)
            texts.append(told["outputs"][0]["text"])
            if speculate:
                assert "draft" in told["speculation"]["drafts"]
        assert texts[0] == texts[1] == texts[2]

    def test_a_wrong_pass_is_told_before_anything_is_written(self, tmp_path: Path) -> None:
        model = tiny.save(tiny.llama(), tmp_path / "model")
        out = tmp_path / "out"
        result = CliRunner().invoke(app, ["convert", str(model), str(out), "--draft", "windw"])
        assert result.exit_code != 0
        assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_windowed_twin_of_a_real_model_adds_nothing(real_model: Any, tmp_path: Path) -> None:
    """Beside its own state, the tensors of a twin take less than 5 MB."""
    program = reroll.capture(str(real_model("smollm2-135m-instruct")))
    program = program.with_draft(program.twin("window(size=256, sinks=4)"))
    program.save(str(tmp_path / "out"))
    assert not [name for name in sizes(tmp_path / "out") if name.startswith("draft")]
    loaded = reroll.load(tmp_path / "out")
    module = loaded.to_module()
    made = reroll.twin(module, loaded.draft)
    own = {t.untyped_storage().data_ptr() for t in _tensors(module)}
    other = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(made)}
    assert sum(size for place, size in other.items() if place not in own) < 5e6
    added = _resident_bytes(tmp_path / "out")
    assert added < 25e6, "resident memory of the second graph, code and allocator"


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


_RESIDENT = """
import gc, os, sys, reroll, torch
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
program = reroll.load(sys.argv[1])
module = program.to_module()
before = resident()
made = reroll.twin(module, program.draft)
print(resident() - before)
"""


def _resident_bytes(directory: Path) -> int:
    """The resident memory that a twin adds to a process, in bytes."""
    run = [sys.executable, "-c", _RESIDENT, str(directory)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_a_copied_model_has_a_draft_of_its_own_tensors(tmp_path: Path) -> None:
    drafted(WINDOW).save(str(tmp_path / "out"))
    module = reroll.load(tmp_path / "out").to_module()
    generated(module, "draft")
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += 0.05
    assert torch.equal(generated(copied, "draft"), plain(copied))
