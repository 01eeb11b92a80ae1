"""All mixers on the queries, keys and values of a real model's layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reroll.mixers import make, registered
from reroll.rewrite.analysis import tolerances
from tests.conformance.mixer_suite import assert_close

MODEL = Path("models/smollm2-135m-instruct")
TEXT = Path("data/text")
LAYER, LENGTH = 12, 300


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """What one attention of the model is given, on text."""
    if not (MODEL / "model.safetensors").exists():
        pytest.skip(f"{MODEL} is not there: `make models` fetches it")
    text = next(p for p in sorted(TEXT.iterdir()) if p.suffix == ".txt").read_text()
    ids = AutoTokenizer.from_pretrained(MODEL)(text[:4000], return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    attention, found = model.model.layers[LAYER].self_attn, {}
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(
            lambda module, args, out, name=name: found.__setitem__(name, out)
        )
    with torch.no_grad():
        model(ids[:, :LENGTH])
    q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in found.values())
    return q, k, v


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registered()))
def test_the_forms_agree_on_a_real_layer(name: str, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = tensors
    mixer = make(name)
    seed = torch.Generator().manual_seed(0)
    gates = [
        # a gate of the key, as Liger has it, or a random one
        next(iter(gate.from_key.values()))(k)
        if gate.from_key and name != "gsa"
        else gate.activation(torch.randn(*k.shape[:3], *gate.shape, generator=seed))
        for gate in mixer.gates(64, 64)
    ]
    wide = (q.double(), k.double(), v.double(), [g.double() for g in gates])
    wanted, end = mixer.parallel(*wide)
    # the definition itself in fp32 says how far rounding alone takes these tensors
    rounding = tolerances.relative_rms(mixer.recur(q, k, v, gates)[0], wanted)
    out, state = mixer.chunk(q, k, v, gates)
    assert_close(out, wanted, max(tolerances.FORWARD[torch.float32], 3 * rounding), "chunk")
    for found, expected in zip(state, end, strict=True):
        assert_close(found, expected, 1e-5, "state")
    half, after = 140, 141
    first, start = mixer.chunk(q[:, :, :half], k[:, :, :half], v[:, :, :half],
                               [g[:, :, :half] for g in gates])  # fmt: skip
    one, start = mixer.step(q[:, :, half:after], k[:, :, half:after], v[:, :, half:after],
                            [g[:, :, half:after] for g in gates], start)  # fmt: skip
    rest, start = mixer.chunk(q[:, :, after:], k[:, :, after:], v[:, :, after:],
                              [g[:, :, after:] for g in gates], start)  # fmt: skip
    split = torch.cat([first, one, rest], 1)
    assert_close(split, wanted, max(tolerances.FORWARD[torch.float32], 3 * rounding), "split")
