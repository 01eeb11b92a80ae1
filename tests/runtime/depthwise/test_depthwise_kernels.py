"""Depth-wise batching through kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import reroll
from reroll.kernels import dispatch, interpreter, layers
from reroll.rewrite.analysis import tolerances
from reroll.runtime.depthwise import DepthScheduler
from reroll.runtime.depthwise.engine import Engine
from reroll.runtime.depthwise.fused import LowRank, Score
from tests.conformance.mixer_suite import assert_close
from tests.runtime.depthwise.test_depthwise import PROMPTS, alone, lowered

interpreted = pytest.mark.skipif(
    not interpreter.active(), reason="kernels are tested in Triton's interpreter"
)
CRITERIA = ["at=[2], threshold=0.006", "at=[2], criterion=entropy, threshold=0.05"]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels of layers that have run."""
    names = []
    for name in ("depth_lora", "confidence"):
        real = getattr(layers, name)
        monkeypatch.setattr(
            layers, name, lambda *a, name=name, real=real: names.append(name) or real(*a)
        )
    return names


@interpreted
@pytest.mark.parametrize("exits", CRITERIA)
def test_every_stream_gets_what_it_gets_alone(exits, launched):
    model, prompts = lowered(exits), PROMPTS[:3]
    expected = [alone(model, p, 6) for p in prompts]
    with DepthScheduler(model, slots=3, length=16) as scheduler, dispatch.use("triton"):
        numbers = [scheduler.submit(p, max_new_tokens=6) for p in prompts]
        assert [list(scheduler.stream(n)) for n in numbers] == expected
        report = scheduler.depth_report()
    assert set(launched) == {"depth_lora", "confidence"}
    assert 2 < report.mean < 4


def test_on_a_cpu_nothing_is_chosen_that_needs_a_gpu(launched):
    with DepthScheduler(lowered(CRITERIA[0]), slots=1, length=16) as scheduler:
        scheduler.submit(PROMPTS[0], max_new_tokens=3)
        scheduler.run()
    assert not launched


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("exits", CRITERIA)
def test_parts_that_a_kernel_does(exits, name):
    engine = Engine(lowered(exits, name=name), slots=1, length=8)
    fusions = list(engine.step.fusions.values())
    assert [type(s) for s in fusions] == [LowRank] * 7
    assert sum(bool(s.bias) for s in fusions) == (3 if name == "qwen2" else 0)
    # no layer has the low-rank term of another
    assert all(s.down.replace("lora_down.", "") == s.weight for s in fusions)
    assert all(s.up.replace("lora_up.", "") == s.weight for s in fusions)
    (score,) = engine.test.fusions.values()
    assert isinstance(score, Score)
    assert score.criterion == ("entropy" if "entropy" in exits else "margin")


@pytest.mark.parametrize(
    "exits", ["at=[2], threshold=0.006, head=own", "at=[2], criterion=saturation, threshold=0.7"]
)
def test_scores_of_which_there_is_no_kernel_are_left_to_pytorch(exits):
    engine = Engine(lowered(exits), slots=1, length=8)
    for fusion in engine.test.fusions.values():
        # a head of its own for each exit is another weight in each trip
        assert len({id(w) for w in engine.weights[fusion.weight]}) > 1


@interpreted
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("trips", [[0, 0, 0], [0, 2, 2], [1, 1, 3]])
def test_one_trip_of_rows_at_different_depths(trips, name, launched):
    """With layers that have a bias, which `tie` leaves to each trip, and without."""
    carried = []
    for backend in ("eager", "triton"):
        engine = Engine(lowered(name=name), slots=3, length=8)
        rows = engine.start([0, 1, 2], [5, 6, 7])
        for row, trip in zip(rows, trips, strict=True):
            row.trip = trip
        with dispatch.use(backend), torch.no_grad():
            engine.run_step(rows)
        carried.append(torch.cat([row.carry[0] for row in rows]))
    assert launched == ["depth_lora"] * 7
    assert_close(carried[1], carried[0], tolerances.FORWARD_TRITON_FP32, "carry")


def test_everything_stays_on_the_models_device():
    """No GPU is here: tensors without data have a device of their own just as well."""
    with torch.no_grad():
        engine = Engine(lowered().to("meta"), slots=3, length=8)
        rows = engine.start([0, 1, 2], [5, 6, 7])
        engine.pool.lengths = [0, 2, 1]
        rows = rows[:1] + engine.start([1, 2], [5, 6])
        for row, trip in zip(rows, [0, 2, 2], strict=True):
            row.trip = trip
        engine.run_step(rows)
        assert engine.logits(rows).device.type == "meta"


@interpreted
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_model(real_model, launched):
    """A trip of SmolLM2 for rows at three depths, and its exit."""
    program = reroll.run_passes(
        reroll.capture(str(real_model("smollm2-135m-instruct")), dtype="float32"),
        "tie(blocks=10, init=average), relax(rank=8), insert_exits(at=[11], threshold=0.5)",
        measure=False,
    )
    model, hidden = program.to_module(), []
    for backend in ("eager", "triton"):
        engine = Engine(model, slots=3, length=8)
        rows = engine.start([0, 1, 2], [500, 600, 700])
        for row, trip in zip(rows, [0, 10, 20], strict=True):
            row.trip = trip
        with dispatch.use(backend), torch.no_grad():
            engine.run_step(rows)
        hidden.append(torch.cat([row.carry[0] for row in rows]))
    assert launched == ["depth_lora"] * 7 + ["confidence"]
    assert_close(hidden[1], hidden[0], tolerances.FORWARD_TRITON_FP32, "hidden")
