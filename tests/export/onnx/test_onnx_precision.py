from __future__ import annotations

from functools import cache

import onnx
import pytest
import torch
import transformers

import reroll
from reroll.export.onnx import Onnx
from reroll.export.onnx.graph import nodes_of
from reroll.export.onnx.plan.quantise import dequantised, quantised
from reroll.rewrite.ir.program import Program

pytestmark = pytest.mark.usefixtures("captured_once")


@cache
def wide(blocks: int | None) -> Program:
    """A llama whose matrices are worth quantising."""
    if blocks is not None:
        return reroll.run_passes(wide(None), f"tie(blocks={blocks}), relax(rank=8)", measure=False)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return reroll.capture(transformers.LlamaForCausalLM(config).eval())


@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_graphs_compute_what_rounded_weights_do(blocks, precision, tmp_path):
    found = Onnx(precision=precision, check=True).write(wide(blocks), tmp_path)
    for graph in found["graphs"].values():
        error = graph["check"]["relative_rms_error"]
        assert error < (2e-3 if precision == "fp16" else 1e-5)
        assert graph["check"]["quality"]["kl_divergence"] < 0.1


def test_quantised_weights_are_shared_and_in_the_loop(tmp_path):
    sizes = {}
    for precision in ("fp32", "int8", "int4"):
        path = tmp_path / precision
        path.mkdir()
        sizes[precision] = Onnx(precision=precision).write(wide(2), path)["weights"]["bytes"]
    assert sizes["int4"] < sizes["int8"] < 0.5 * sizes["fp32"]
    model = onnx.load(tmp_path / "int4" / "loop.onnx", load_external_data=False)
    kinds = [n.op_type for n in nodes_of(model.graph)]
    # two layers in the body, and the head
    assert kinds.count("MatMulNBits") == 2 * 7 + 1
    # the embedding is read from the bytes of the head
    table = next(t for t in model.graph.initializer if t.name.endswith(".view"))
    head = next(t for t in model.graph.initializer if t.name == table.name.removesuffix(".view"))
    assert table.external_data[1] == head.external_data[1]


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.005), (4, 0.09)])
def test_quantisation(bits, bound):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    q, scale, zero = quantised(weight, bits, 32)
    assert q.shape == (48, 2, 32)
    assert scale.shape == zero.shape == (48, 2)
    error = (dequantised(weight, bits, 32) - weight).norm() / weight.norm()
    assert 0 < error < bound
    # what is on the grid already stays, and so do zeros
    again = dequantised(dequantised(weight, bits, 32), bits, 32)
    assert torch.allclose(again, dequantised(weight, bits, 32), atol=0.05)
    assert not dequantised(torch.zeros(4, 32), bits, 32).any()
