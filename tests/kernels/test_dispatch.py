"""What is chosen to run a mixer, and that it gives what the mixer gives."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.mixers import compiled, make
from reroll.rewrite.analysis import tolerances
from reroll.runtime.functions.recurrences import recur
from tests.conformance.mixer_suite import assert_close, draw
from tests.export.onnx.test_onnx_recurrence import linearized

MIXERS = ["retention", "gla", "deltanet", "gated_deltanet", "kda", "mamba"]


@pytest.mark.parametrize("name", MIXERS)
def test_kernels_are_the_step_form(name: str) -> None:
    mixer = make(name)
    x = draw(mixer, torch.float32, time=1)
    padding = torch.tensor([[1], [0]])
    with dispatch.use("triton"):
        out, state = dispatch.step(mixer, *x[:4], x.state, padding)
    wanted, end = mixer.step(*x[:4], x.state, padding)
    assert_close(out, wanted, tolerances.FORWARD_TRITON_FP32, "out")
    assert_close(state[0], end[0], tolerances.FORWARD_TRITON_FP32, "state")


@pytest.mark.parametrize(
    "name", ["retention", "mamba2", "gla", "hgrn2", "deltanet", "gated_deltanet", "kda", "mamba"]
)
def test_kernels_are_the_chunk_form(name: str) -> None:
    mixer = make(name)
    x = draw(mixer, torch.float32, time=40)
    padding = torch.ones(2, 40)
    padding[0, :9] = 0
    with dispatch.use("triton"):
        out, state = dispatch.chunk(mixer, *x[:4], x.state, padding)
    wanted, end = mixer.chunk(*x[:4], x.state, padding)
    assert_close(out, wanted, tolerances.FORWARD_TRITON_FP32, "out")
    assert_close(state[0], end[0], tolerances.FORWARD_TRITON_FP32, "state")


SEGMENTS = torch.tensor([[0] * 3 + [1] * 17 + [0] * 20, [5] * 40])


@pytest.mark.parametrize("backend", ["triton", "compiled"])
@pytest.mark.parametrize("name", ["retention", "gla", "gated_deltanet", "mamba"])
def test_packed_sequences(
    name: str, backend: dispatch.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    # compiling takes long, and has tests of its own
    monkeypatch.setattr(compiled, "_compiled", lambda mixer: mixer.chunk)
    mixer = make(name)
    x = draw(mixer, torch.float32, time=40)
    padding = torch.ones(2, 40)
    padding[0, 5:7] = 0
    with dispatch.use(backend):
        out, state = dispatch.chunk(mixer, *x[:4], x.state, padding, SEGMENTS)
    wanted, end = mixer.parallel(*x[:4], x.state, padding, SEGMENTS)
    assert_close(out, wanted, tolerances.FORWARD_TRITON_FP32, "out")
    assert_close(state[0], end[0], tolerances.FORWARD_TRITON_FP32, "state")


@pytest.mark.parametrize("name", ["retention", "gla"])
def test_packed_sequences_train_in_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from reroll.kernels import forms

    sequences: list[int] = []
    real = forms.diagonal
    monkeypatch.setattr(forms, "diagonal", lambda *a: sequences.append(len(a[5]) - 1) or real(*a))
    mixer = make(name)
    x = draw(mixer, torch.float32, time=40)
    grads = []
    for backend in ("eager", "triton"):
        leaves = [t.clone().requires_grad_() for t in (*x[:3], *x.gates, x.state[0])]
        q, k, v, g, start = leaves
        with dispatch.use(backend):  # type: ignore[arg-type]
            out, end = dispatch.chunk(mixer, q, k, v, [g], (start,), segments=SEGMENTS)
        grads.append(torch.autograd.grad(out.square().sum() + end[0].square().sum(), leaves))
    assert sequences == [4]
    for found, wanted in zip(grads[1], grads[0], strict=True):
        assert_close(found, wanted, tolerances.FORWARD_TRITON_FP32, "gradient")


def test_the_lowered_modules_recurrence_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from reroll.kernels import forms

    runs: list[str] = []
    real = forms.diagonal
    monkeypatch.setattr(forms, "diagonal", lambda *a: runs.append("kernel") or real(*a))
    mixer = make("retention")
    x = draw(mixer, torch.float32)
    wanted = recur(None, 0, *x[:3], list(x.gates), "retention", mixer.text(), delay=3)
    assert not runs, "on a CPU nothing is chosen that needs a GPU"
    with dispatch.use("triton"):
        out = recur(None, 0, *x[:3], list(x.gates), "retention", mixer.text(), delay=3)
    assert runs == ["kernel"]
    assert_close(out, wanted, tolerances.FORWARD_TRITON_FP32, "out")


@pytest.mark.parametrize("mixer", ["retention", "gated_deltanet", "mamba"])
def test_a_lowered_model_generates_through_kernels(mixer: str) -> None:
    module = linearized(f"mixer={mixer}, window=4, sinks=1").to_module()
    ids, mask = torch.tensor([[3, 4, 5, 6, 7, 8], [0, 0, 9, 8, 7, 6]]), torch.ones(2, 6)
    mask[1, :2] = 0
    answers = []
    for backend in ("eager", "triton"):
        with dispatch.use(backend), torch.no_grad():  # type: ignore[arg-type]
            done = module.generate(
                ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        answers.append(torch.stack(done.logits))
    assert_close(answers[1], answers[0], tolerances.FORWARD_TRITON_FP32, "logits")


@pytest.mark.slow
def test_a_lowered_model_is_compiled_with_kernels_in_its_graphs() -> None:
    module, found = linearized("mixer=retention, window=4, sinks=1").to_module(), set()

    def backend(graph: Any, _: Any) -> Any:
        found.update(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [1, 2, 9, 8, 7, 6]])
    with torch.no_grad():
        wanted = module(input_ids=ids, use_cache=False).logits
        with dispatch.use("triton"):
            out = torch.compile(module.forward, backend=backend)(input_ids=ids, use_cache=False)
    torch._dynamo.reset()
    assert "reroll_kernels.diagonal.default" in found
    assert_close(out.logits, wanted, tolerances.FORWARD_TRITON_FP32, "logits")


def test_it_trains_through_a_kernel() -> None:
    mixer = make("retention")
    x = draw(mixer, torch.float32)
    grads = []
    for backend in ("eager", "triton"):
        k = x.k.clone().requires_grad_()
        with dispatch.use(backend):  # type: ignore[arg-type]
            out, _ = dispatch.chunk(mixer, x.q, k, x.v, x.gates)
        grads.append(torch.autograd.grad(out.square().sum(), k)[0])
    assert_close(grads[1], grads[0], tolerances.FORWARD_TRITON_FP32, "gradient")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("rwkv6", {}, "there is no kernel for rwkv6"),
        ("gla", {"floor": -100.0}, "a chunk has fewer than 16 tokens"),
    ],
)
def test_a_forced_backend_says_why_it_cannot(
    name: str, options: dict[str, float], reason: str
) -> None:
    mixer = make(name, options)
    x = draw(mixer, torch.float32)
    with dispatch.use("triton"), pytest.raises(UsageError, match=reason):
        dispatch.chunk(mixer, *x[:4])


def test_the_delta_rule_does_not_train_here() -> None:
    mixer = make("gated_deltanet")
    x = draw(mixer, torch.float32)
    with dispatch.use("triton"), pytest.raises(UsageError, match="no backward here"):
        dispatch.chunk(mixer, x.q, x.k.clone().requires_grad_(), x.v, x.gates)


def test_names_of_backends() -> None:
    with pytest.raises(UsageError, match="did you mean triton"), dispatch.use("tritn"):  # type: ignore[arg-type]
        pass


def test_a_rejection_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="reroll.kernels.dispatch"):
        for _ in range(3):
            dispatch._say("triton", "mixer some mixer", "a reason of this test")
    assert [r.message for r in caplog.records] == [
        "mixer some mixer does not run on triton: a reason of this test"
    ]
