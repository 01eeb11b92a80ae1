"""Bundles of models that are recurrent already: short convolutions beside mixers and attentions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

import reroll
from reroll.errors import ExportError
from reroll.export.triton import Triton
from reroll.export.triton.module import module_text
from reroll.kernels import configurations
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.ir.ops import RECURRENCE, SHORT_CONVOLUTION
from tests.export.onnx.test_onnx_recurrence import linearized
from tests.export.triton.test_triton import PROMPT, STEPS, agree, load, prompts
from tests.tiny.types import build

VOCABULARY = 60


@cache
def program(name: str) -> reroll.Program:
    return reroll.capture(build(name).eval())


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("lfm2", {"run_near_0"}),
        ("bamba", {"run_near_0", "run_scan_0", "run_step_0"}),
        # no attention, and no positions
        pytest.param("mamba2", {"run_scan_0", "run_step_0"}, marks=pytest.mark.slow),
        # the delta rule, behind one convolution and behind three
        *(
            pytest.param(name, {"run_near_0", "run_scan_0", "run_step_0"}, marks=pytest.mark.slow)
            for name in ("qwen3_5_text", "olmo_hybrid")
        ),
    ],
)
def test_it_computes_what_the_module_computes(name: str, kernels: set[str], tmp_path: Path) -> None:
    """A prompt of which one row is padded, and further tokens."""
    bundle = agree(program(name), tmp_path, *prompts(VOCABULARY, PROMPT + STEPS))
    errors = bundle.selftest()
    assert kernels | {"run_convolve_0", "run_convolve_step_0"} <= set(errors)
    assert all(error < tolerances.FORWARD_TRITON_FP32 for error in errors.values())


def test_a_prompt_shorter_than_the_filter(tmp_path: Path) -> None:
    agree(program("lfm2"), tmp_path, *(x[:, -STEPS - 1 :] for x in prompts(VOCABULARY, STEPS + 9)))


def test_it_generates_what_the_module_generates(tmp_path: Path) -> None:
    Triton(arch=("sm_90",)).write(program("lfm2"), tmp_path)
    found = load(tmp_path).Model(tmp_path).generate([[5, 6, 7, 8]], 6)
    wanted = program("lfm2").to_module().generate(
        torch.tensor([[5, 6, 7, 8]]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )  # fmt: skip
    assert found == wanted[:, 4:].tolist()


def test_a_wrong_kernel_does_not_pass_the_self_test(tmp_path: Path) -> None:
    Triton(arch=("sm_90",)).write(program("lfm2"), tmp_path)
    text = (tmp_path / "model.py").read_text()
    assert text.count("sums += w * old.to(tl.float32)") == 1
    (tmp_path / "model.py").write_text(
        text.replace("sums += w * old.to(tl.float32)", "sums += 0.9 * w * old.to(tl.float32)")
    )
    with pytest.raises(RuntimeError, match="run_convolve_step_0"):
        load(tmp_path).Model(tmp_path).selftest()


def test_a_filter_without_tiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "convolution_tiles", lambda *_: None)
    with pytest.raises(ExportError, match="no tiles without spills for short convolutions of 3"):
        module_text(program("lfm2"), ("sm_90",))


def test_a_mask_that_is_read_otherwise_is_refused() -> None:
    """A bundle has the mask of the new tokens alone."""
    edited = program("lfm2").edit()
    (columns,) = edited.graph.find_nodes(
        op="call_function", target=torch.ops.aten.index_select.default
    )
    with edited.graph.inserting_after(columns):
        other = edited.graph.call_function(torch.ops.aten.neg.default, (columns.args[0],))
    columns.replace_all_uses_with(other)
    with pytest.raises(ExportError, match="cannot provide the input attention_mask"):
        module_text(edited, ("sm_90",))


def test_decays_without_a_floor_are_refused_by_name() -> None:
    edited = linearized("mixer=kda, window=0, sinks=0").edit()
    for _, graph in edited.graphs():
        for node in graph.find_nodes(op="call_function", target=RECURRENCE):
            node.update_arg(node.args.index("kda") + 1, json.dumps({"floor": None}))
    with pytest.raises(ExportError, match="the mixer kda with chunks of fewer than 16"):
        module_text(edited, ("sm_90",))


@pytest.mark.slow
def test_binaries_are_written_without_a_gpu(tmp_path: Path) -> None:
    found = Triton(arch=("sm_90",), precompiled=True).write(program("lfm2"), tmp_path)
    names = {b["name"] for b in found["binaries"]}
    assert {"convolve_0", "convolve_step_0"} <= names
    for binary in found["binaries"]:
        assert (tmp_path / binary["file"]).read_bytes()[:4] == b"\x7fELF"


def test_narrow_numbers_keep_wide_states(tmp_path: Path) -> None:
    """Bamba scans in fp32 whatever its weights are, and convolves in their dtype."""
    model = build("bamba").eval().to(torch.bfloat16)
    narrow = reroll.capture(model)
    Triton(arch=("sm_90",)).write(narrow, tmp_path)
    bundle = load(tmp_path).Model(tmp_path, slots=2, max_length=32)
    dtypes = {
        type(site).__name__: site.dtype for site in load(tmp_path).SITES if hasattr(site, "dtype")
    }
    assert dtypes == {"Convolution": torch.bfloat16, "Recurrence": torch.float32}
    ids, mask = prompts(VOCABULARY, PROMPT)
    module, wide = narrow.to_module(), program("bamba").to_module()
    with torch.no_grad():
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        wanted, exact = (m(input_ids=ids, **given).logits.float() for m in (module, wide))
        found = bundle.prefill(ids, mask).float()
    seen = mask.bool()
    # no further from fp32 than the module is
    error, usual = ((x[seen] - exact[seen]).norm() for x in (found, wanted))
    assert error < 1.2 * usual


def test_convolutions_are_counted_among_the_states() -> None:
    count = sum(
        node.target is SHORT_CONVOLUTION
        for _, graph in program("bamba").graphs() for node in graph.nodes
    )  # fmt: skip
    text = module_text(program("bamba"), ("sm_90",))
    assert count > 1
    assert text.count("    Convolution(") == text.count("run.convolution(") == count
