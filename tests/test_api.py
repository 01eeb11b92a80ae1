"""The public functions of the package, and what importing it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reroll
from reroll.errors import ProgramError, UsageError
from reroll.rewrite.analysis.costs import flops_per_token, state_bytes
from tests import tiny

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def program() -> reroll.Program:
    return reroll.capture(tiny.llama())


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names() -> None:
    for name in ("capture", "run_passes", "parse", "load", "Program", "Pass", "__version__"):
        assert hasattr(reroll, name), name
        assert name in dir(reroll)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reroll.nothing


def test_a_tokenizer_of_transformers_and_a_function_are_taken(program: reroll.Program) -> None:
    tokenizer = tiny.tokenizer(prefix=True)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rewritten = (
        reroll.run_passes(program, "tie(blocks=1)", text="the cat sat " * 40, tokenizer=each)
        for each in (tokenizer, ids)
    )
    one, other = (dict(p.origin.steps[0].measured) for p in rewritten)
    assert one
    assert one == other


def test_import_is_light() -> None:
    heavy = run("import reroll, sys; print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert heavy == "[]"


def test_text_parses_back(program: reroll.Program) -> None:
    assert str(reroll.parse(str(program))) == str(program)


def test_parsed_program_costs_the_same(program: reroll.Program) -> None:
    parsed = reroll.parse(str(program))
    assert flops_per_token(parsed) == flops_per_token(program)
    assert state_bytes(parsed, 1024) == state_bytes(program, 1024)


def test_parsed_program_runs_with_a_source(program: reroll.Program) -> None:
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = program.to_module()(input_ids=ids).logits
        actual = reroll.parse(str(program), program).to_module()(input_ids=ids).logits
    assert torch.equal(actual, expected)


def test_parsed_program_finds_its_tensors_in_a_directory(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "model")
    program = reroll.capture(str(path))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = program.to_module()(input_ids=ids).logits
        actual = reroll.parse(str(program), str(path)).to_module()(input_ids=ids).logits
    assert torch.equal(actual, expected)


def test_parse_reports_the_line() -> None:
    with pytest.raises(ProgramError, match="line 1"):
        reroll.parse("no program")


@pytest.mark.parametrize("form", ["text", "list", "recipe", "path"])
def test_passes_in_every_form(form: str, program: reroll.Program, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes:\n  - tie: {blocks: 2}\n  - relax: {rank: 4}\n")
    forms = {
        "text": "tie(blocks=2), relax(rank=4)",
        "list": ["tie(blocks=2)", {"relax": {"rank": 4}}],
        "recipe": str(recipe),
        "path": recipe,
    }
    done = reroll.run_passes(program, forms[form], measure=False)
    assert [step.text for step in done.origin.steps] == ["tie(blocks=2)", "relax(rank=4)"]
    assert program.origin.steps == ()


def test_measures_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    path = tiny.save(tiny.llama(), tmp_path / "model", tiny.tokenizer())
    done = reroll.run_passes(reroll.capture(str(path)), "tie(blocks=2)", measure=True)
    assert done.origin.steps[0].measured["quality"]["previous"]["inputs"] == "text"


def test_measures_without_a_tokenizer(program: reroll.Program) -> None:
    done = reroll.run_passes(program, "tie(blocks=2)", measure=True)
    assert done.origin.steps[0].measured["quality"]["previous"]["inputs"] == "random tokens"


def test_load_gives_the_saved_program(program: reroll.Program, tmp_path: Path) -> None:
    program.save(str(tmp_path / "out"))
    loaded = reroll.load(tmp_path / "out")
    assert loaded.loops[0].trips == program.loops[0].trips
    assert loaded.parameters() == program.parameters()


def test_load_refuses_other_models(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a model that reroll converted"):
        reroll.load(tiny.save(tiny.llama(), tmp_path / "model"))
    with pytest.raises(UsageError):
        reroll.load(tmp_path / "missing")


AUTO_LOADING = """
{imports}
model = AutoModelForCausalLM.from_pretrained({path!r})
config = AutoConfig.from_pretrained({path!r})
print(type(model).__name__, model.config.model_type, type(config).__name__)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import reroll\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM\nimport reroll",
        # the modules that transformers' auto classes are imported from, in another order
        "import reroll, transformers.modeling_layers\n"
        "from transformers import AutoConfig, AutoModelForCausalLM",
    ],
    ids=["before", "after", "layers first"],
)
def test_auto_classes_load_what_was_saved(
    imports: str, program: reroll.Program, tmp_path: Path
) -> None:
    program.save(str(tmp_path / "out"))
    out = run(AUTO_LOADING.format(imports=imports, path=str(tmp_path / "out")))
    assert out == "RerollForCausalLM reroll RerollConfig"
