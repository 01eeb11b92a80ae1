"""What single mixers do beyond what all of them do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.mixers import compiled, make, registered
from reroll.mixers.decay import REACH, bounded_size, running_sums
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured
from tests.conformance.mixer_suite import assert_close, draw, with_gradients
from tests.passes.sequences import in_parts, prompts


def test_taylor_features_are_the_exponential_to_second_order() -> None:
    q, k = torch.randn(2, 1, 1, 9, 16, dtype=torch.float64)
    mixer = make("linear", {"feature_map": "taylor"})
    out, _ = mixer.parallel(q, k, torch.eye(9, dtype=torch.float64)[None, None], ())
    score = (q @ k.mT)[0, 0] / 4
    weights = (1 + score + score**2 / 2).tril()
    assert_close(out[0, :, 0], weights / weights.sum(-1, keepdim=True), 1e-10, "weights")


def test_a_delta_rule_overwrites() -> None:
    k = torch.tensor([1.0, 0.0]).expand(1, 1, 2, 2)
    v = torch.tensor([[5.0], [7.0]])[None, None]
    _, (state,) = make("deltanet", {"scale": 1.0}).chunk(k, k, v, (torch.ones(1, 1, 2),))
    assert_close(state[0, 0], torch.tensor([[7.0], [0.0]]), 1e-5, "the second value alone is left")


def test_slots_that_tokens_overwrite_are_attention() -> None:
    """To the last token of each slot, with the log of what its softmax divides by."""
    time, slots, gone = 40, 6, -40.0
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, time, 8, dtype=torch.float64) for n in (4, 2, 2))
    chosen = torch.randint(slots, (2, 2, time))
    gate = gone * torch.nn.functional.one_hot(chosen, slots).double()
    mixer = make("gsa", {"slots": slots, "floor": gone, "log_mass": True})
    ones = torch.nn.functional.pad(v, (0, 1), value=1.0)
    told = [form(q, k, ones, (gate,)) for form in (mixer.parallel, mixer.chunk, mixer.recur)]
    # the last token of each slot, up to each token
    seen = torch.zeros(2, 2, time, time, dtype=torch.bool)
    for i, j, t in itertools.product(range(2), range(2), range(time)):
        seen[
            i, j, t, list({int(slot): n for n, slot in enumerate(chosen[i, j, : t + 1])}.values())
        ] = True
    scores = q @ k.repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~seen.repeat_interleave(2, 1), -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    for out, _ in told:
        assert_close(out[..., :-1].transpose(1, 2), expected, 1e-10, "the mean of values")
        assert_close(out[..., -1].transpose(1, 2), scores.logsumexp(-1), 1e-10, "the log mass")


def test_a_write_of_two_flips_the_state() -> None:
    mixer = make("deltanet", {"negative": True})
    k, start = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    _, (state,) = mixer.step(k, k, torch.zeros(1, 1, 1, 1), (torch.full((1, 1, 1), 2.0),), (start,))
    assert_close(state[0, 0], torch.tensor([[-3.0], [4.0]]), 1e-5, "its first row has turned round")


def test_two_flips_are_a_rotation() -> None:
    mixer = make("deltaproduct")
    angle = 0.3
    first = torch.tensor([[[[1.0, 0.0]]]])
    second = torch.tensor([math.cos(angle), math.sin(angle)]).expand(1, 1, 1, 1, 2)
    none = torch.zeros(1, 1, 1, 1)
    gates = (none[..., 0], torch.full((1, 1, 1, 2), 2.0), second, none[..., None])
    _, (state,) = mixer.step(first, first, none, gates, (torch.tensor([[[[1.0], [0.0]]]]),))
    turned = torch.tensor([[math.cos(2 * angle)], [math.sin(2 * angle)]])
    assert_close(state[0, 0], turned, 1e-5, "turned by twice the angle between the keys")


def test_mlstm_output_does_not_depend_on_its_maximum() -> None:
    mixer = make("mlstm")
    inputs = draw(mixer)
    c, n, m = inputs.state
    moved = (c / math.e, n / math.e, m + 1)
    assert_close(mixer.chunk(*inputs[:4], moved)[0], mixer.chunk(*inputs)[0], 1e-5, "out")


@pytest.mark.parametrize("name", sorted(registered()))
def test_extreme_gates_overflow_nowhere(name: str) -> None:
    mixer = make(name)
    inputs = draw(mixer, torch.float32, time=130)
    gates = tuple(
        gate.activation(torch.randn(g.shape).clamp(-2, 2) * 20)
        for gate, g in zip(mixer.gates(6, 5), inputs.gates, strict=True)
    )
    for form in (mixer.parallel, mixer.chunk):
        found = with_gradients(form, inputs._replace(gates=gates))
        for key, value in found.items():
            assert value.isfinite().all(), f"{form.__name__}: {key}"


def test_a_chunk_is_as_long_as_the_floor_allows() -> None:
    assert bounded_size(64, -2.5) == 64
    assert bounded_size(64, -5.0) == 32
    assert bounded_size(48, -5.0) == 32
    assert bounded_size(64, -1000.0) == 1
    for floor in (-0.1, -2.5, -7.0):
        assert bounded_size(64, floor) * -floor <= REACH


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gla", {"floor": 0.0}),
        ("kda", {"floor": 1.0}),
        ("hgrn2", {"lower_bound": 1.0}),
        ("gsa", {"slots": 0}),
        ("deltaproduct", {"steps": 1}),
        ("retention", {"chunk_size": 0}),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"mixer {name}"):
        make(name, options)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces without the compiler, which takes its time."""
    compiled._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    yield
    compiled._compiled.cache_clear()


def compare_pieces(name: str, padded: bool) -> None:
    mixer, time = make(name), 100
    inputs, padding = draw(mixer, torch.float32, time=time), None
    if padded:
        padding = torch.ones(2, time)
        padding[0, :20] = 0
    wanted = with_gradients(mixer.chunk, inputs, padding=padding)
    found = with_gradients(lambda *a, **k: compiled.chunk(mixer, *a, **k), inputs, padding=padding)
    for key, value in found.items():
        wide = key.startswith("gradient")
        tolerance = tolerances.GRADIENT if wide else tolerances.FORWARD[torch.float32]
        assert_close(value, wanted[key], tolerance, key)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", sorted(registered()))
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_are_the_chunk_form(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "PIECE", 32)
    compare_pieces(name, padded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retention", "gated_deltanet"])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_pieces_are_the_chunk_form(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "PIECE", 64)
    compare_pieces(name, padded)


@pytest.mark.usefixtures("uncompiled")
@torch.no_grad()
def test_a_model_reads_its_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PIECE", 8)
    text = "linearize(mixer=gla, window=5, sinks=2, gain=0.5)"
    model = run_passes(captured("llama"), text, measure=False).to_module()
    inputs = prompts()
    expected, _ = in_parts(model, inputs, [23])
    with dispatch.use("compiled"):
        whole = model(**inputs, use_cache=False).logits
        found, _ = in_parts(model, inputs, [13, 1, 9])
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(whole[seen], expected[seen])
    torch.testing.assert_close(found[seen], expected[seen])


@pytest.mark.parametrize("time", [1, 8, 24, 64, 100])
def test_running_sums(time: int) -> None:
    x = torch.randn(2, time, 3, dtype=torch.float64)
    assert_close(running_sums(x), x.cumsum(-2), 1e-10, "sums")
