"""Models that are recurrent already: captured, rolled and run as they are."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from transformers import DynamicCache
from typer.testing import CliRunner

import reroll
from reroll.cli import app
from reroll.errors import CaptureError
from reroll.export.onnx import Onnx
from reroll.export.onnx.emit.check import check_graph
from reroll.rewrite.capture.export import rolled
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import RECENT, RECURRENCE, SHORT_CONVOLUTION
from tests.slow import slow
from tests.tiny.types import build

# the types, and the mixer of each; a short convolution alone has none
RULES = {
    "qwen3_next": "gated_deltanet",
    "bamba": "mamba2",
    "mamba": "mamba",
    "lfm2": None,
    "qwen3_5_text": "gated_deltanet",
    "olmo_hybrid": "gated_deltanet",
    "granitemoehybrid": "mamba2",
    "falcon_h1": "mamba2",
    "nemotron_h": "mamba2",
    "kimi_linear": "kda",
}
QUICK = ("qwen3_next", "bamba", "mamba", "lfm2")
OTHERS = [name for name in RULES if name not in QUICK]
TYPES = [*QUICK, *slow(*OTHERS)]
LENGTHS = (13, 9, 6)
WISHES: dict[str, Any] = {
    "max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


@cache
def original(name: str) -> Any:
    return build(name).eval()


@cache
def flat(name: str) -> reroll.Program:
    return reroll.capture(original(name), roll=False)


@cache
def lowered(name: str) -> Any:
    return rolled(flat(name)).to_module()


def rows() -> dict[str, torch.Tensor]:
    """Three rows of other lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, LENGTHS[0]), generator=generator)
    mask = (torch.arange(LENGTHS[0]) >= LENGTHS[0] - torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def nodes(program: reroll.Program, target: Any) -> list[Any]:
    return [n for _, graph in program.graphs() for n in graph.nodes if n.target is target]


@pytest.mark.parametrize("name", TYPES)
def test_the_flat_graph_is_the_original(name: str) -> None:
    ids = rows()["input_ids"]
    with torch.no_grad():
        expected = original(name)(ids, use_cache=False).logits
        actual = run(flat(name), {"input_ids": ids})["logits"]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", TYPES)
def test_layers_are_rolled_and_computed_by_mixers(name: str) -> None:
    program = lowered(name).program
    assert max(loop.trips for loop in program.loops) > 1
    assert nodes(program, SHORT_CONVOLUTION)
    rules = {argument(n, "rule") for n in nodes(program, RECURRENCE)}
    assert rules == {RULES[name]} - {None}
    with torch.no_grad():
        expected, actual = (
            m(**rows(), use_cache=False).logits for m in (original(name), lowered(name))
        )
    seen = rows()["attention_mask"].bool()
    distance = (actual - expected)[seen].pow(2).mean().sqrt()
    assert distance <= 1e-5 * expected[seen].pow(2).mean().sqrt()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 5}, {"num_beams": 3}],
    ids=["cache", "no cache", "chunked prefill", "beams"],
)
@pytest.mark.parametrize("name", TYPES)
def test_it_generates_the_tokens_of_the_original(name: str, options: dict[str, Any]) -> None:
    beams = {k: v for k, v in options.items() if k == "num_beams"}
    expected = original(name).generate(**rows(), **WISHES, **beams)
    assert torch.equal(lowered(name).generate(**rows(), **WISHES, **options), expected)


@pytest.mark.parametrize("name", TYPES)
def test_loss_and_gradients_are_the_original_s(name: str) -> None:
    ids, both = rows()["input_ids"][:1], []
    for model in (original(name), lowered(name)):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        both.append(
            sum(p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None)
        )
        model.zero_grad()
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=0)


def test_an_argument_that_the_op_does_not_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_next").eval()
    layer = next(m for m in model.modules() if hasattr(m, "conv1d"))
    forward = type(layer).forward

    def packed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs, cu_seq_lens_q=torch.tensor([0, 3]))

    monkeypatch.setattr(type(layer), "forward", packed)
    with pytest.raises(CaptureError, match="called with cu_seqlens"):
        reroll.capture(model, roll=False)


@pytest.mark.parametrize("name", TYPES)
def test_tokens_that_were_taken_back_leave_no_trace(name: str) -> None:
    model = lowered(name)
    ids = rows()["input_ids"][:1]
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()

    def add(ids: torch.Tensor, start: int) -> torch.Tensor:
        # Bamba's own positions do not count the past
        at = torch.arange(start, start + ids.shape[1])[None]
        takes = any(item.name == "position_ids" for item in model.program.inputs)
        positions = {"position_ids": at} if takes else {}
        logits: torch.Tensor = model(ids, past_key_values=cache, **positions).logits
        return logits

    with torch.no_grad():
        add(ids[:, :8], 0)
        add(ids[:, 5:10] * 0 + 7, 8)
        cache.crop(-5)
        out = add(ids[:, 8:], 8)
        expected = model(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_it_is_saved_and_opened_again(name: str, tmp_path: Path) -> None:
    lowered(name).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = original(name).generate(**rows(), **WISHES)
    assert torch.equal(again.generate(**rows(), **WISHES), expected)


def test_a_directory_in_bf16(tmp_path: Path) -> None:
    model = build("bamba").eval().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    module = reroll.capture(str(tmp_path)).to_module()
    assert module.dtype == torch.bfloat16
    seen = rows()["attention_mask"].bool()
    with torch.no_grad():
        exact = original("bamba")(**rows()).logits[seen]
        errors = [(m(**rows()).logits[seen] - exact).norm() for m in (module, model)]
    assert 0 < errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(
    "passes",
    [
        "tie(blocks=1), relax(rank=4)",
        "window(size=8, sinks=2)",
        "linearize(mixer=gated_deltanet, window=4, sinks=1)",
        "insert_exits(at=[1])",
        "fold_norms",
        *slow("loop_core(prelude=0, core=1, coda=1, trips=3)"),
    ],
)
@pytest.mark.parametrize("name", ["bamba", "qwen3_next"])
def test_passes_rewrite_them_as_they_do_others(name: str, passes: str) -> None:
    module = reroll.run_passes(rolled(flat(name)), passes, measure=False).to_module()
    results = [
        module.generate(**rows(), **WISHES, **options)
        for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 5})
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_convolution_of_the_model_s_own_keeps_its_inputs() -> None:
    """LFM 3 has the function without the decorator; another name is traced, with its state."""
    model = build("lfm2").eval()
    module = sys.modules[type(model).__module__]
    function = module.causal_conv1d_fn

    def another(*args: Any, **kwargs: Any) -> torch.Tensor:
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "causal_conv1d_fn", another)
        program = reroll.capture(model)
    assert nodes(program, RECENT)
    assert not nodes(program, SHORT_CONVOLUTION)
    expected = model.generate(**rows(), **WISHES)
    assert torch.equal(program.to_module().generate(**rows(), **WISHES), expected)


@pytest.mark.parametrize("name", ["bamba", "mamba", "qwen3_next"])
def test_they_run_in_onnx_runtime(name: str, tmp_path: Path) -> None:
    found = Onnx(check=True).write(rolled(flat(name)), tmp_path)
    for graph in found["graphs"].values():
        assert graph["check"]["relative_rms_error"] < 3e-5
    states = {s["input"] for s in found["states"]}
    # a convolution and its recurrence belong to one layer
    assert {f"past_key_values.0.{part}" for part in ("conv_state", "recurrent_state")} <= states


@pytest.mark.parametrize("domain", ["com.microsoft", "nobody"])
def test_a_runtime_without_the_convolution_runs_its_function(domain: str, tmp_path: Path) -> None:
    program = rolled(flat("lfm2"))
    Onnx(graphs=("unrolled",)).write(program, tmp_path)
    path = tmp_path / "unrolled.onnx"
    model = onnx.load(path, load_external_data=False)
    named = [n for n in model.graph.node if n.op_type == "CausalConvWithState"]
    assert named
    for item in (*named, *model.functions):
        item.domain = domain
    model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    onnx.save(model, path)
    assert check_graph(path, program, program.to_module())["relative_rms_error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in RULES if name not in ("bamba", "mamba")])
def test_a_directory_is_exported_and_checked(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build(name).to(dtype).save_pretrained(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--target", "onnx"]
    result = CliRunner().invoke(app, [*words, "--check"])
    assert result.exit_code == 0, result.output
