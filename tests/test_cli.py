"""The command line: what it prints where, how it exits, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import reroll
from reroll.cli import terminal
from reroll.cli.app import app
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")

PASSES = "tie(blocks=2), relax(rank=4)"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def data(*arguments: object) -> Any:
    """The JSON document that a command prints, which has to be all of its stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: object, status: int = 2) -> str:
    """What a command that fails says on stderr: nothing on stdout, and no traceback."""
    result = run(*arguments)
    assert result.exit_code == status, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def command(arguments: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "reroll.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        # a shell that started the tests in the background may have had interrupts ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return tiny.save(tiny.llama(), path, tiny.tokenizer(prefix=True))


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    path = model.parent / "out"
    result = run("convert", model, path, "--passes", PASSES)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 40)
    return path


# ---- what commands report


def test_inspect(model: Path) -> None:
    found = data("inspect", model)
    assert found["captured_exactly"] is True
    assert found["loops"][0]["trips"] == 4
    shown = run("inspect", model)
    assert shown.exit_code == 0
    assert "4 layers roll into one loop" in shown.stdout
    assert "captured exactly" in shown.stdout


def test_inspect_without_weights(model: Path) -> None:
    assert data("inspect", model, "--no-check")["captured_exactly"] is None


def test_convert_reports_what_it_did(model: Path, tmp_path: Path, text: Path) -> None:
    found = data("convert", model, tmp_path / "out", "--passes", PASSES, "--text", text)
    assert [step["pass"] for step in found["passes"]] == ["tie(blocks=2)", "relax(rank=4)"]
    assert found["parameters"]["after"] < found["parameters"]["before"]
    assert found["passes"][0]["measured"]["quality"]["previous"]["inputs"] == "text"
    assert "model.safetensors" in found["files"]
    assert set(found["seconds"]) == {"capture", "passes", "save", "total"}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", text]


def test_convert_keeps_the_tokenizer(model: Path, out: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_convert_without_passes_only_rolls(model: Path, tmp_path: Path) -> None:
    found = data("convert", model, tmp_path / "out")
    assert found["passes"] == []
    assert found["parameters"]["after"] == found["parameters"]["before"]


def test_convert_by_recipe(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes:\n  - tie: {blocks: 2}\n  - relax: {rank: 4}\n")
    options = ["--recipe", recipe, "--measure", "off", "--stop-after", "1"]
    found = data("convert", model, tmp_path / "out", *options)
    assert [step["pass"] for step in found["passes"]] == ["tie(blocks=2)"]
    assert "quality" not in found["passes"][0]["measured"]


def test_convert_prints_programs_and_times(model: Path, tmp_path: Path) -> None:
    options = ["--passes", PASSES, "--print-after", "tie", "--timing", "--measure", "off"]
    result = run("convert", model, tmp_path / "out", *options)
    assert result.exit_code == 0
    assert result.stderr.count("program dtype=f32") == 1
    assert "body model.layers" in result.stderr
    assert "capture" in result.stdout
    assert "total" in result.stdout


def test_convert_again(model: Path, tmp_path: Path) -> None:
    """What was converted can be converted further."""
    data("convert", model, tmp_path / "one", "--measure", "off")
    options = ["--passes", "tie(blocks=2)", "--measure", "off"]
    found = data("convert", tmp_path / "one", tmp_path / "two", *options)
    assert found["parameters"]["after"] < found["parameters"]["before"]
    assert len(reroll.load(tmp_path / "two").origin.steps) == 1


USERS_PASS = '''
from reroll import Pass
from reroll.rewrite.pipeline.base import option


class Nothing(Pass):
    """Do nothing."""

    name = "nothing"
    contract = "exact"
    times: int = option(1, help="how often")

    def run(self, program, context):
        context.remark("did nothing")
        return program
'''


def test_passes_of_the_users_own(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "my_passes.py"
    file.write_text(USERS_PASS)
    options = ["--load", file, "--passes", "nothing(times=2)", "--measure", "off"]
    found = data("convert", model, tmp_path / "out", *options)
    assert found["passes"][0]["remarks"] == ["did nothing"]
    listed = data("passes", "--load", file)["passes"]
    assert "nothing" in [each["name"] for each in listed]


def test_a_recipe_by_its_name(model: Path, tmp_path: Path) -> None:
    found = data("convert", model, tmp_path / "exact", "--recipe", "exact")
    assert found["passes"] == []
    wrong = run("convert", model, tmp_path / "none", "--recipe", "linearise")
    assert wrong.exit_code == 2
    assert "there is no recipe 'linearise'" in wrong.stderr
    assert "linearize" in wrong.stderr


USERS_PLUGINS = '''
from reroll.evaluate.measure import Measure
from reroll.export.targets import Target
from reroll.mixers.gla import GLA
from reroll.recover.stages.tune import Tune

class Mixed(GLA):
    """A mixer of one's own."""
    name = "mixed_by_me"

class Written(Target):
    """A target of one's own."""
    name = "written_by_me"

    def write(self, program, directory, progress=None):
        (directory / "words.txt").write_text(str(program))
        return {"words": len(str(program))}

class Tuned(Tune):
    """A stage of one's own."""
    name = "tuned_by_me"

class Counted(Measure):
    """A measure of one's own."""
    name = "counted_by_me"

    def run(self, bench):
        return {name: {"parameters": 7} for name in bench.sides}

    def headline(self, found):
        return {"counted": found["parameters"]}
'''


def test_plugins_of_every_kind(model: Path, out: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USERS_PLUGINS)
    load = ["--load", file]
    found = data("plugins", *load)["plugins"]
    mine = {p["kind"]: p["name"] for p in found if p["from"] == str(file)}
    assert mine == {
        "mixer": "mixed_by_me", "target": "written_by_me", "stage": "tuned_by_me",
        "measure": "counted_by_me",
    }  # fmt: skip
    assert {"tie", "gla", "onnx", "distil", "perplexity"} <= {
        p["name"] for p in found if p["from"] == "reroll"
    }
    passes = ["--passes", "linearize(mixer=mixed_by_me)", "--measure", "off"]
    data("convert", model, tmp_path / "linear", *passes, *load)
    assert "mixed_by_me" in run("show", tmp_path / "linear", *load).stdout
    data("export", out, tmp_path / "written", "--target", "written_by_me", *load)
    assert (tmp_path / "written" / "words.txt").read_text().startswith("program")
    measured = data("evaluate", out, "--measures", "counted_by_me", "--text", text, *load)
    assert measured["measures"]["counted_by_me"]["result"]["model"] == {"parameters": 7}


def test_compare(model: Path, out: Path, text: Path) -> None:
    options = ["--text", text, "--length", 32, "--max-tokens", 128]
    found = data("compare", model, out, *options)
    assert found["kl"] > 0
    assert found["tokens"] == 128
    assert found["inputs"]["text"] == str(text)
    shown = run("compare", model, out, *options)
    assert shown.exit_code == 0
    for word in ("perplexity", "KL divergence", "top-1 agreement", "parameters", "state at 1,024"):
        assert word in shown.stdout


def test_generate(model: Path, out: Path) -> None:
    prompts = ["--prompt", "It was", "--prompt", "In the beginning there was"]
    options = ["--max-new-tokens", 5]
    found = data("generate", out, *prompts, *options)
    assert [o["prompt"] for o in found["outputs"]] == ["It was", "In the beginning there was"]
    assert all(0 <= o["tokens"] <= 5 for o in found["outputs"])
    alone = data("generate", out, *prompts[:2], *options)
    assert alone["outputs"] == found["outputs"][:1]
    for more in (["--beams", 2], ["--temperature", 0.7, "--top-k", 5, "--top-p", 0.9], ["--chat"]):
        data("generate", out, *prompts, *options, *more)


@pytest.mark.parametrize("draft", ["auto", "lookup", "window(size=8)", "int8", "exact"])
def test_generate_with_a_draft(model: Path, draft: str) -> None:
    options = ["--prompt", "It was", "--prompt", "In the beginning", "--max-new-tokens", 12]
    expected = data("generate", model, *options)["outputs"]
    found = data("generate", model, *options, "--speculate", draft)
    assert found["outputs"] == expected
    assert found["speculation"]["tokens"] == 24
    assert found["speculation"]["near_ties"] == []
    assert "steps" in run("generate", model, *options, "--speculate", draft).stdout
    assert "no beams" in refused("generate", model, *options, "--speculate", draft, "--beams", 2)
    data("generate", model, *options, "--speculate", draft, "--temperature", 0.7, "--top-k", 5)


def test_generate_stops_at_a_text(model: Path) -> None:
    options = ["generate", model, "--prompt", "It was", "--max-new-tokens", 12]
    whole = data(*options)["outputs"][0]["text"]
    stop = next(letter for letter in whole[1:-1] if letter.isascii() and letter.isalpha())
    for more in ([], ["--speculate", "lookup"], ["--speculate", "auto", "--exact"]):
        found = data(*options, "--stop", stop, *more)["outputs"][0]
        assert whole.startswith(found["text"])
        assert stop in found["text"]
        assert found["tokens"] < 12
    assert "without a draft" in refused(*options, "--exact")
    assert "is empty" in refused(*options, "--stop", "")


def test_generate_goes_on_from_a_state(model: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("In the beginning there was", encoding="utf-8")
    file, new = tmp_path / "a.state", ["--max-new-tokens", 8]
    tokenizer = AutoTokenizer.from_pretrained(model)
    added = tokenizer(" and", return_tensors="pt").input_ids
    for each in (model, out):
        first = ["generate", each, "--prompt-file", tmp_path / "prompt.txt", *new]
        begun = data(*first, "--save-state", file, "--overwrite")
        assert begun["outputs"] == data(*first)["outputs"]
        with safe_open(file, "pt") as opened:
            read = torch.cat([opened.get_tensor("tokens"), added], 1)
        whole = AutoModelForCausalLM.from_pretrained(each).generate(
            read, attention_mask=torch.ones_like(read), max_new_tokens=8, do_sample=False
        )
        text = tokenizer.decode(whole[0, read.shape[1] :], skip_special_tokens=True)
        for more in ([], ["--speculate", "lookup"]):
            went_on = data("generate", each, "--prompt", " and", "--load-state", file, *new, *more)
            assert went_on["outputs"][0]["text"] == text
    assert "another program" in refused(
        "generate", model, "--prompt", "a", "--load-state", file, status=2
    )
    assert "exists" in refused("generate", out, "--prompt", "a", "--save-state", file)
    assert "no prompt" in refused("generate", out)


def test_generate_reads_twice(out: Path) -> None:
    options = ("--max-new-tokens", 6)
    twice = data("generate", out, "--prompt", "to be", "--read-twice", *options)["outputs"][0]
    repeated = data("generate", out, "--prompt", "to be\n\nto be", *options)["outputs"][0]
    assert twice["prompt"] == "to be"
    assert twice["text"] == repeated["text"]


def test_generate_samples_by_seed(out: Path) -> None:
    options = ["--prompt", "It was", "--temperature", 1, "--max-new-tokens", 8]
    first, again, other = (data("generate", out, *options, "--seed", s) for s in (1, 1, 2))
    assert first["outputs"] == again["outputs"]
    assert first["outputs"] != other["outputs"]


def test_a_rolled_model_generates_what_the_original_does(model: Path, tmp_path: Path) -> None:
    data("convert", model, tmp_path / "out")
    options = ["--prompt", "It was", "--max-new-tokens", 16]
    original = data("generate", model, *options)
    assert data("generate", tmp_path / "out", *options)["outputs"] == original["outputs"]


def test_passes() -> None:
    found = {each["name"]: each for each in data("passes")["passes"]}
    assert {"tie", "relax", "fold_norms"} <= set(found)
    assert found["tie"]["contract"] == "approximate"
    assert found["relax"]["requires"] == ["tie"]
    assert found["tie"]["options"][0]["name"] == "blocks"
    shown = run("passes", "tie")
    assert "blocks" in shown.stdout
    assert "required" in run("passes", "insert_exits").stdout
    assert "relax" in run("passes").stdout


def test_show_prints_text_that_parses(model: Path, out: Path) -> None:
    shown = run("show", out)
    assert shown.exit_code == 0
    assert str(reroll.parse(shown.stdout)) == shown.stdout
    assert "loop model.layers" in shown.stdout
    assert "loop" not in run("show", model, "--flat").stdout.partition("weights {")[0]
    assert data("show", out)["format"] >= 1


def test_show_writes_a_page(model: Path, out: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    shown = run("show", out, "--html", page, "--against", model)
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "page.html" in shown.stderr
    text = page.read_text(encoding="utf-8")
    assert "tie(blocks=2)" in text
    assert text.count("<article>") == 2
    found = data("show", out, "--html", page)
    assert set(found) == {"page", "programs"}
    assert found["programs"][0]["name"] == "out"
    assert page.read_text(encoding="utf-8").count("<article>") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "other"], "--html FILE"),
        (["--html", "page.html", "--lowered"], "exclude each other"),
        (["--html", "/nowhere/page.html"], "no such directory"),
        (["--html", "/usr/share"], "not a file"),
    ],
)
def test_pages_that_are_refused_before_a_model_is_opened(arguments: list[str], words: str) -> None:
    assert words in refused("show", "no-such-model", *arguments)


def test_a_page_replaces_nothing_that_is_read(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "program.txt"
    file.write_text(run("show", out).stdout)
    assert "read from there" in refused("show", file, "--html", file)
    assert "read from there" in refused("show", out, "--html", file, "--against", file)


def test_diff(model: Path, out: Path, tmp_path: Path) -> None:
    same = run("diff", model, model)
    assert (same.exit_code, same.stdout) == (0, "")
    differs = run("diff", model, out)
    assert differs.exit_code == 1
    assert "lora_down" in differs.stdout
    file = tmp_path / "program.txt"
    file.write_text(run("show", model).stdout)
    assert run("diff", model, file).exit_code == 0


def test_version_and_help() -> None:
    assert run("--version").stdout == f"reroll {reroll.__version__}\n"
    for name in ("inspect", "convert", "compare", "generate", "passes", "diff", "show"):
        assert run(name, "--help").exit_code == 0


# ---- what commands refuse


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("/no/such/model", "no-such-model-at-all", empty, tmp_path / "no.gguf"):
        said = refused("inspect", name)
        assert said.startswith("error: ")
    for arguments in (
        ["show", empty],
        ["generate", empty, "--prompt", "a"],
        ["compare", empty, empty],
    ):
        refused(*arguments)
    out = tmp_path / "out"
    refused("convert", empty, out)
    assert not out.exists()


@pytest.fixture
def damaged(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "damaged"
    path.mkdir()
    for file in model.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            content = content[: len(content) // 2]
        (path / file.name).write_bytes(content)
    return path


def test_truncated_weights(damaged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refused("convert", damaged, out, status=1)
    assert "model.safetensors" in said
    assert not out.exists()
    refused("inspect", damaged, status=1)
    refused("generate", damaged, "--prompt", "a", status=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_damaged_configuration(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for content in ("{", "[]", '{"model_type": "no-such-type"}', '{"model_type": "reroll"}'):
        (path / "config.json").write_text(content)
        result = run("inspect", path)
        assert result.exit_code in (1, 2)
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


def test_pipelines_that_are_wrong(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases = {
        "tye(blocks=2)": "did you mean tie?",
        "tie(block=2)": "did you mean blocks?",
        "tie(blocks=many)": "an integer",
        "tie(blocks=2": "tie",
        "tie": "blocks",
    }
    for passes, hint in cases.items():
        assert hint in refused("convert", model, out, "--passes", passes)
    refused("convert", model, out, "--recipe", tmp_path / "no.yaml")
    refused("convert", model, out, "--passes", "tie(blocks=2)", "--recipe", tmp_path / "no.yaml")
    refused("convert", model, out, "--passes", "tie(blocks=2)", "--stop-after", "relax")
    refused("convert", model, out, "--load", tmp_path / "no.py")
    refused("convert", model, out, "--passes", "tie(blocks=9)", status=1)
    refused("convert", model, out, "--passes", "relax(rank=4)", status=1)
    assert list(tmp_path.iterdir()) == []


def test_options_that_are_wrong(model: Path, out: Path, tmp_path: Path) -> None:
    new = tmp_path / "out"
    refused("convert", model, new, "--no-such-option")
    refused("convert", model)
    refused("convert", model, new, "--measure", "sometimes")
    refused("convert", model, new, "--dtype", "int8")
    refused("compare", model, out, "--attention", "flash")
    refused("compare", model, out, "--length", "1")
    refused("generate", out)
    prompt = ["generate", out, "--prompt", "a"]
    for option in (["--temperature", 0], ["--top-p", 2], ["--beams", 0], ["--max-new-tokens", 0]):
        refused(*prompt, *option)
    refused("passes", "tye")
    refused("no-such-command")
    assert not new.exists()


def test_text_that_is_none(model: Path, out: Path, tmp_path: Path) -> None:
    for name, content in {"binary": b"\xff\xfe\x00\x80", "empty": b"", "missing": None}.items():
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        said = refused(
            "convert", model, tmp_path / "out", "--text", file, "--passes", "tie(blocks=2)"
        )
        assert name in said
        assert name in refused("compare", model, out, "--text", file)
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be(model: Path, out: Path, tmp_path: Path) -> None:
    assert "--overwrite" in refused("convert", model, out)
    file = tmp_path / "file"
    file.write_text("kept")
    refused("convert", model, file, "--overwrite")
    refused("convert", model, file / "out")
    refused("convert", model, "/proc/out")
    assert file.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["convert", "export"])
def test_outputs_are_refused_before_any_work(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*args: object, **kwargs: object) -> None:
        raise AssertionError("work began")

    copied = tmp_path / "model"
    shutil.copytree(model, copied)
    (tmp_path / "link").symlink_to(copied)
    monkeypatch.setattr("reroll.capture", begun)
    monkeypatch.chdir(tmp_path)
    for out in (copied, "model/../model", "link", ".", tmp_path, "model/out", "n" * 300):
        said = refused(command, copied, out, "--overwrite")
        assert "where:" in said
        assert "hint:" in said
    assert sorted(p.name for p in copied.iterdir()) == sorted(p.name for p in model.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]


def test_the_original_of_what_is_converted_is_not_replaced(model: Path, tmp_path: Path) -> None:
    original, out = tmp_path / "original", tmp_path / "out"
    shutil.copytree(model, original)
    data("convert", original, out)
    assert "it is read from there" in refused("convert", out, original, "--overwrite")
    assert "model.safetensors" in [p.name for p in original.iterdir()]
    assert not (original / "program.json").exists()


def test_overwrite_replaces(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    found = data("convert", model, target, "--overwrite", "--measure", "off")
    assert "old" not in found["files"]
    assert list(tmp_path.iterdir()) == [target]


def test_models_that_do_not_generate(tmp_path: Path) -> None:
    path = tiny.save(tiny.bert(), tmp_path / "bert", tiny.tokenizer())
    assert "does not generate" in refused("generate", path, "--prompt", "a")
    bare = tiny.save(tiny.llama(), tmp_path / "bare")
    assert "no tokenizer" in refused("generate", bare, "--prompt", "a")


def test_what_nobody_expected(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        sys.stdout.write("a library prints this")
        raise ZeroDivisionError("something else")

    monkeypatch.setattr("reroll.capture", broken)
    said = refused("convert", model, tmp_path / "out", status=1)
    assert "ZeroDivisionError: something else" in said
    assert "--debug" in said
    assert "a library prints this" in said
    result = run("convert", model, tmp_path / "out", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


# ---- as a process


def test_as_a_process(model: Path) -> None:
    process = command(["inspect", model, "--no-check", "--json"])
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["loops"][0]["trips"] == 4
    process = command(["inspect", model / "missing"])
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith("error: ")


def test_help_is_quick() -> None:
    code = "import sys; sys.argv = ['reroll', '--help']\nfrom reroll.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupt_leaves_nothing(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        USERS_PASS.replace(
            'context.remark("did nothing")',
            "import sys, time; print('waiting', file=sys.stderr, flush=True); time.sleep(600)",
        )
    )
    options = ["--load", slow, "--passes", "nothing"]
    process = command(["convert", model, tmp_path / "out", *options])
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "waiting" in line:
                break
        time.sleep(0.2)
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".pyc") == ["slow.py"]


def test_a_log_without_a_terminal_tells_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LOG_INTERVAL", 0.0)
    with terminal.Bars() as bars:
        bars(3, 8, "weights")
    assert "weights 3/8" in capsys.readouterr().err


def test_show_prints_the_lowered_code_and_its_passes(model: Path) -> None:
    result = run("show", str(model), "--lowered", "--print-after", "make_masks")
    assert result.exit_code == 0
    text = result.stdout
    assert text.index("==== after make_masks") < text.index("make_mask") < text.index("==== main")
    assert "def forward(self" in text[text.index("==== main") :]
    wrong = run("show", str(model), "--lowered", "--print-after", "masks")
    assert wrong.exit_code == 2
    assert "make_masks" in wrong.stderr
    assert "add --lowered" in run("show", str(model), "--print-after", "make_masks").stderr
