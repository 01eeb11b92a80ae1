"""Windows and Liger's GLA on SmolLM2: against the formulas written out, and token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

import reroll
from reroll.evaluate.suite import choose, evaluate
from reroll.rewrite.analysis.samples import sample_text

pytestmark = pytest.mark.slow

LENGTH, WINDOW = 60, 24
PROMPT = 40


@pytest.fixture(scope="module")
def path(real_model: Callable[[str], Path]) -> str:
    return str(real_model("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def ids(path: str) -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return torch.tensor(tokenizer(sample_text()).input_ids)[None, :LENGTH]


def stepwise(model: Any, ids: Tensor) -> Tensor:
    """Logits of a prompt, and then of one token after the other."""
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :PROMPT], past_key_values=cache).logits]
    for t in range(PROMPT, ids.shape[1]):
        parts.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    return torch.cat(parts, 1)


def close(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 1e-5


@torch.no_grad()
def test_the_window_token_by_token(path: str, ids: Tensor) -> None:
    program = reroll.capture(path, dtype="float32")
    model = reroll.run_passes(program, f"window(size={WINDOW}, sinks=4)", measure=False).to_module()
    close(stepwise(model, ids), model(ids, use_cache=False).logits)


@pytest.mark.parametrize(("gates", "divisor"), [("liger", 1.0), ("liger-code", 16.0)])
@torch.no_grad()
def test_liger_gla(path: str, ids: Tensor, gates: str, divisor: float) -> None:
    """Liger (arXiv 2503.01496), equations 5 to 8, on transformers' own model of the weights."""
    program = reroll.capture(path, dtype="float32")
    text = (
        f"linearize(mixer=gla, mixer_options={{scale: 1.0, floor: -20.0}}, gates={gates}, "
        f"feature_map=softmax, rotary=false, combine=sum, window={WINDOW}, sinks=0)"
    )
    model = reroll.run_passes(program, text, measure=False).to_module()
    whole = model(ids, use_cache=False).logits
    close(whole, _published(path, ids, divisor))
    # in the released code, decoding computes something else than training
    close(stepwise(model, ids), whole)


def test_the_layers_that_stay_are_those_that_copy(path: str) -> None:
    """A passage for the second time, further back than the window: chosen layers predict it."""
    program = reroll.capture(path, dtype="float32")
    ask = choose("copying(lengths=[200], passages=2)", "quick")
    copied = {}
    for keep in ("4", '"auto:0.25"'):
        after = reroll.run_passes(program, f"window(size=64, sinks=4, keep={keep})", measure=False)
        found = evaluate(after, None, ask, text=sample_text())
        copied[keep] = found["measures"]["copying"]["result"]["model"]["lengths"][0]["again"]
    # 0.98 with attention everywhere, 0.4 where the passage is not seen
    assert copied["4"] < 0.6
    assert copied['"auto:0.25"'] > 0.85


def _published(path: str, ids: Tensor, divisor: float) -> Tensor:
    """Logits of the original whose attention is half a window and half a GLA recurrence."""
    raw: dict[str, Tensor] = {}

    def both(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        at = torch.arange(q.shape[2])
        far = (at[:, None] < at) | (at[:, None] - at >= WINDOW)
        scores = (q @ k.mT * options["scaling"]).masked_fill(far, -torch.inf)
        near = scores.softmax(-1) @ v
        # the recurrence reads both before their rotary embedding
        plain_q = raw["q"].unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        plain_k = raw["k"].unflatten(-1, (q.shape[1] // groups, -1)).transpose(1, 2)
        plain_k = plain_k.repeat_interleave(groups, 1)
        keep = (F.logsigmoid(plain_k) / divisor).exp()
        query, key = plain_q.softmax(-1), plain_k.softmax(-1)
        state, outs = torch.zeros(1, q.shape[1], q.shape[3], v.shape[3]), []
        for t in range(q.shape[2]):
            state = keep[:, :, t, :, None] * state + key[:, :, t, :, None] * v[:, :, t, None, :]
            outs.append((query[:, :, t, None] @ state)[:, :, 0])
        out = 0.5 * near + 0.5 * torch.stack(outs, 2)
        return out.transpose(1, 2), None

    AttentionInterface.register("liger_by_hand", both)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="liger_by_hand"
    ).eval()
    for layer in model.model.layers:
        for name in ("q", "k"):
            projection = getattr(layer.self_attn, f"{name}_proj")
            projection.register_forward_hook(
                lambda _, __, out, name=name: raw.__setitem__(name, out)
            )
    return model(ids, use_cache=False).logits  # type: ignore[no-any-return]
