"""The Triton bundle in the interpreter, beside the torch module; its source as golden text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

import reroll
from reroll.errors import ExportError, UsageError
from reroll.export.triton import Triton
from reroll.export.triton.linears import fused_of
from reroll.export.triton.module import module_text
from reroll.kernels import configurations
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.program import Program
from tests.captured import captured
from tests.conformance.mixer_suite import assert_close
from tests.conformance.target_suite import TargetSuite
from tests.export.onnx.test_onnx_recurrence import linearized

GOLDEN = Path(__file__).parent / "golden_triton.py.txt"
# not the number of heads, of slots, of a window
PROMPT, STEPS = 11, 16


class TestTriton(TargetSuite):
    target = "triton"
    models = ("llama", "qwen2")


def load(directory: Path) -> Any:
    """The module of a bundle."""
    spec = spec_from_file_location(f"bundle_{abs(hash(directory))}", directory / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def agree(program: Program, directory: Path, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """Prefill and decode steps of a bundle against the torch module; returns the bundle's model."""
    Triton(arch=("sm_90",)).write(program, directory)
    loaded = load(directory)
    for name in [n for n in vars(loaded) if n.startswith("LINEAR_TILES_")]:
        # blocks do not show, and the interpreter is quicker with few
        getattr(loaded, name)["sm_90"].update(BN=256, BK=256)
    bundle = loaded.Model(directory, slots=6, max_length=64)
    module, slots = program.to_module(), [4, 1]
    start = ids.shape[1] - STEPS
    # as `generate` gives them: padding has no position
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    counted = any(item.name == "position_ids" for item in program.inputs)

    def given(begin: int, end: int) -> dict[str, torch.Tensor]:
        rest = {"position_ids": positions[:, begin:end]} if counted else {}
        return {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]} | rest

    with torch.no_grad():
        wanted = module(**given(0, start), use_cache=True)
        found = bundle.prefill(ids[:, :start], mask[:, :start], slots)
        real = mask[:, :start].bool()
        tolerance = tolerances.FORWARD_TRITON_FP32
        assert_close(found[real], wanted.logits[real], tolerance, "prefill")
        for t in range(start, ids.shape[1]):
            wanted = module(
                **given(t, t + 1), past_key_values=wanted.past_key_values, use_cache=True
            )
            logits = bundle.decode(ids[:, t], slots)
            assert_close(logits, wanted.logits[:, -1], tolerance, f"token {t}")
    return bundle


def prompts(vocabulary: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, of which one is padded on the left."""
    torch.manual_seed(0)
    ids, mask = torch.randint(3, vocabulary, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("mixer=retention, window=5, sinks=2", marks=pytest.mark.slow),
        pytest.param("mixer=gla, window=0, sinks=0", marks=pytest.mark.slow),
        "mixer=gated_deltanet, window=4, sinks=0",
        "mixer=mamba2, window=3, sinks=1",
        pytest.param("mixer=linear, window=5, sinks=2", marks=pytest.mark.slow),
        pytest.param("mixer=deltanet, window=0, sinks=0", marks=pytest.mark.slow),
        pytest.param("mixer=kda, window=4, sinks=1", marks=pytest.mark.slow),
        pytest.param("mixer=hgrn2, window=3, sinks=0", marks=pytest.mark.slow),
    ],
)
def test_it_computes_what_the_module_computes(options: str, tmp_path: Path) -> None:
    bundle = agree(linearized(options), tmp_path, *prompts(64, PROMPT + STEPS))
    errors = bundle.selftest()
    assert {"run_scan_0", "run_step_0"} <= set(errors)
    assert ("run_near_0" in errors) == ("window=0" not in options)
    assert all(error < tolerances.FORWARD_TRITON_FP32 for error in errors.values())


def test_attention_alone(tmp_path: Path) -> None:
    bundle = agree(captured("llama"), tmp_path, *prompts(64, PROMPT + STEPS))
    assert list(bundle.selftest()) == [
        "run_near_0",
        "norm",
        "turned",
        "gated",
        "run_linear_0",
        "run_linear_1",
    ]


def test_low_rank_terms_and_norms_are_in_their_layers_kernel(tmp_path: Path) -> None:
    """A tied and relaxed model: a step launches a kernel for each layer, a prompt uses PyTorch."""
    program = reroll.run_passes(captured("qwen2"), "tie(blocks=2, init=average), relax(rank=3)",
                                measure=False)  # fmt: skip
    errors = agree(program, tmp_path, *prompts(64, PROMPT + STEPS)).selftest()
    assert all(error < tolerances.FORWARD_TRITON_FP32 for error in errors.values())
    text = (tmp_path / "model.py").read_text()
    body = text[text.index("def trip_of_model_layers") : text.index("class Named")]
    # q, k and v; o; both halves of the gated unit; down; and the head
    assert body.count("run_linear_") == 3 + 1 + 1 + 1 + 1
    assert "F.linear" not in body
    assert body.count("Normed(") == 3
    assert [line for line in text.splitlines() if "'rank': 3" in line and "'bias': True" in line]


def test_a_norm_that_others_read_is_computed_by_itself() -> None:
    program = captured("llama").edit()
    (_, graph) = next(named for named in program.graphs() if named[0] != "main")
    first, second = (n for n in graph.nodes if "rms_norm" in str(n.target))
    with graph.inserting_after(first):
        graph.call_function(torch.ops.aten.neg.default, (first,))
    norms = [f.norm for f in fused_of(program).values()]
    assert first not in norms
    assert second in norms


def test_layers_without_tiles_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "linear_tiles", lambda *_: None)
    text = module_text(captured("llama"), ("sm_90",))
    body = text[text.index("def trip_of_model_layers") : text.index("class Named")]
    assert "run_linear" not in body
    assert body.count("F.linear(") == 7 + 1
    assert "= norm(" in body
    assert "= gated(" in body


def test_a_wrong_kernel_does_not_pass_the_self_test(tmp_path: Path) -> None:
    program = linearized("mixer=retention, window=0, sinks=0")
    Triton(arch=("sm_90",)).write(program, tmp_path)
    text = (tmp_path / "model.py").read_text()
    assert text.count("return S * tl.trans(tl.exp(Gn))") == 1
    (tmp_path / "model.py").write_text(
        text.replace("return S * tl.trans(tl.exp(Gn))", "return S * tl.trans(tl.exp(0.9 * Gn))")
    )
    bundle = load(tmp_path).Model(tmp_path)
    with pytest.raises(RuntimeError, match="scan_0"):
        bundle.selftest()


def test_it_generates_what_the_module_generates(tmp_path: Path) -> None:
    program = linearized("mixer=retention, window=5, sinks=2")
    Triton(arch=("sm_90",)).write(program, tmp_path)
    found = load(tmp_path).Model(tmp_path).generate([[5, 6, 7, 8]], 6)
    wanted = program.to_module().generate(
        torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert found == wanted[:, 4:].tolist()


def test_it_imports_torch_and_triton_alone(tmp_path: Path) -> None:
    Triton(arch=("sm_90",)).write(linearized("mixer=retention, window=5, sinks=2"), tmp_path)
    code = (
        "import sys, model; m = model.Model('.'); m.generate([[3, 4]], 2)\n"
        "bad = {'reroll', 'transformers', 'safetensors', 'numpy.testing'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"TRITON_INTERPRET": "1", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_source_is_golden() -> None:
    """After a change that is meant, REROLL_UPDATE_GOLDEN=1 writes the file: look at its diff."""
    text = module_text(linearized("mixer=retention, window=5, sinks=2"), ("sm_90",))
    if os.environ.get("REROLL_UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_what_a_bundle_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no logits"):
        Triton(arch=("sm_90",)).write(captured("bert"), tmp_path)
    for mixer in ("rwkv6", "mamba"):
        with pytest.raises(ExportError, match=f"the mixer {mixer}"):
            Triton(arch=("sm_90",)).write(linearized(f"mixer={mixer}, window=0, sinks=0"), tmp_path)
    with pytest.raises(UsageError, match="unknown GPUs: sm_12"):
        Triton.parse(["--arch", "sm_12"])


@pytest.mark.slow
def test_binaries_are_written_without_a_gpu(tmp_path: Path) -> None:
    program = linearized("mixer=retention, window=5, sinks=2")
    found = Triton(arch=("sm_90",), precompiled=True).write(program, tmp_path)
    names = [b["name"] for b in found["binaries"]]
    assert names == ["scan_0", "step_0", "near_0", "linear_0", "linear_1"]
    for binary in found["binaries"]:
        assert (tmp_path / binary["file"]).read_bytes()[:4] == b"\x7fELF"


@pytest.mark.slow
# seven minutes of processor time, most of an hour on a core that others use too
@pytest.mark.timeout(3600)
def test_a_real_model(real_model: Any, tmp_path: Path) -> None:
    """SmolLM2, tied and linearized with gains that let the mixer be heard."""
    program = reroll.capture(str(real_model("smollm2-135m-instruct")), dtype="float32")
    program = reroll.run_passes(
        program,
        "tie(blocks=10, init=average), relax(rank=8), "
        "linearize(mixer=retention, window=16, sinks=4, gain=0.5)",
        measure=False,
    )
    ids, mask = prompts(49152, 28 + STEPS)
    bundle = agree(program, tmp_path, ids, mask)
    assert bundle.selftest()
    assert json.loads((tmp_path / "manifest.json").read_text())["gpu_speed"] == "not measured"
