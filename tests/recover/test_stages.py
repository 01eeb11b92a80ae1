"""Losses against their formulas, learning rates, what is trained, and recipes."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from reroll.errors import UsageError
from reroll.recover import Batch, Models, load_recipe
from reroll.recover.hooks import record_trips
from reroll.recover.losses import cross_entropy, mean_over_pieces
from reroll.recover.optimizers import make_optimizer, rate
from reroll.recover.recipe import parse
from reroll.recover.stage import arguments, stages
from reroll.recover.stages.align import Align, relative_error
from reroll.recover.stages.distil import Distil
from reroll.recover.stages.exits import Exits
from reroll.recover.stages.tune import Tune
from reroll.recover.trainable import new_names, training
from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime.functions.loops import read_out
from tests import captured


@pytest.fixture(scope="module")
def models() -> Models:
    """A model tied with residuals, and its original."""
    program = captured.captured("llama")
    tied = run_passes(program, "tie(blocks=2), relax(rank=2)", measure=False).to_module()
    return Models(tied, tied, program.to_module().eval().requires_grad_(False))


@pytest.fixture
def batch() -> Batch:
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return Batch(ids, mask)


def test_distillation_is_the_kl_divergence(models: Models, batch: Batch) -> None:
    keep = batch.mask.bool()
    p = models.ask(batch)[keep].div(2).log_softmax(-1)
    q = models.run(batch)[keep].div(2).log_softmax(-1)
    for direction, (a, b) in {"forward": (p, q), "reverse": (q, p)}.items():
        expected = 4 * (a.exp() * (a - b)).sum(-1).mean()
        loss = Distil(temperature=2.0, direction=direction).loss(batch, models)
        torch.testing.assert_close(loss.value, expected)


def test_the_likeliest_tokens_and_the_rest(models: Models, batch: Batch) -> None:
    whole = Distil().loss(batch, models).value
    found = [Distil(top_k=k).loss(batch, models).value for k in (1, 8, 32, 63, 64)]
    # a coarser partition never shows more, and the finest one shows all
    assert all(a <= b + 1e-6 for a, b in pairwise(found))
    torch.testing.assert_close(found[-1], whole)
    assert found[0] < 0.9 * whole


def test_a_model_distilled_from_itself_has_nothing_to_learn(batch: Batch) -> None:
    model = captured.captured("llama").to_module()
    same = Models(model, model, model)
    for stage in (Distil(hidden=1.0), Align()):
        assert stage.loss(batch, same).value.item() == pytest.approx(0, abs=1e-6)


def test_cross_entropy_skips_padding(models: Models, batch: Batch) -> None:
    logits = models.run(batch)
    expected = F.cross_entropy(
        torch.cat((logits[0, :8], logits[1, :4])),
        torch.cat((batch.data[0, 1:], batch.data[1, 1:5])),
    )
    torch.testing.assert_close(cross_entropy(logits, batch.labels), expected)
    torch.testing.assert_close(Tune().loss(batch, models).value, expected)


def test_aligned_trips_see_what_the_original_sees(models: Models, batch: Batch) -> None:
    states = models.teacher(
        input_ids=batch.data, attention_mask=batch.mask, output_hidden_states=True
    ).hidden_states
    loss = Align().loss(batch, models).value
    weights = batch.mask.float()
    errors = []
    for trip, (x, y) in enumerate(pairwise(states[:4])):
        # a model whose first trips were the original's would come to the same
        seen: list[Any] = []
        part = models.module._assembly.loops["model.layers"].modules[trip]
        handle = part.register_forward_hook(lambda _m, _a, out, s=seen: s.append(out[0]))
        Align().loss(batch, models)
        handle.remove()
        errors.append(relative_error(seen[0], y, x, weights))
    assert len(errors) == 3
    # the mean over four trips, of which the last one's target is not among the hidden states
    assert 4 * loss - sum(errors) >= -1e-6
    assert sum(errors) > 0


def test_what_attention_gives_can_be_aligned(batch: Batch) -> None:
    program = captured.captured("llama")
    teacher = program.to_module().eval()
    student = run_passes(program, "window(size=2, sinks=0, layers=[0])").to_module().eval()
    models = Models(student, student, teacher)
    loss = Align(into="o_proj").loss(batch, models)
    seen: list[Any] = []
    for model in (student, teacher):
        first = model.get_submodule("model.layers.0.self_attn.o_proj")
        handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(**arguments(batch))
        handle.remove()
    # the other layers see what the original's see, and compute the same
    first_error = relative_error(*seen, torch.zeros_like(seen[1]), batch.mask.float())
    torch.testing.assert_close(4 * loss.value, first_error)
    assert loss.parts["worst_trip"] == 0
    assert first_error > 1e-3
    with pytest.raises(UsageError, match="is called c_proj"):
        Align(into="c_proj").check_models(models)


def test_trips_run_freely_in_the_end(models: Models, batch: Batch) -> None:
    start = Align(free=1.0).loss(batch, models).value
    end = Align(free=1.0).loss(Batch(batch.data, batch.mask, progress=1.0), models).value
    assert not torch.isclose(start, end)
    assert torch.isclose(start, Align(free=0.0).loss(batch, models).value)


def test_align_needs_trips_that_correspond(models: Models) -> None:
    Align().check_models(models)
    six = captured.captured("t5").to_module()
    with pytest.raises(UsageError, match="has 6 trips, which 4 cannot share evenly"):
        Align().check_models(Models(models.module, models.module, six))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_what_a_trip_returns_is_read_out_as_the_model_would(name: str, batch: Batch) -> None:
    model = captured.captured(name).to_module().eval()
    whole = Models(model, model, None)
    with record_trips(model.trip_modules()) as seen:
        logits = whole.run(batch)
    assert torch.equal(read_out(model, seen[-1][1], **arguments(batch)), logits)
    assert not torch.allclose(read_out(model, seen[1][1], **arguments(batch)), logits)
    assert torch.equal(whole.run(batch), logits)


def test_exits_are_weighted(models: Models, batch: Batch) -> None:
    found = {}
    for weights in ("aggressive", "weighted"):
        stage = Exits(at=[1, 3], weights=weights)
        loss = stage.loss(batch, models)
        values = [loss.parts[key] for key in ("after_1", "after_3", "full")]
        factors = [0.1, 0.1, 1.0] if weights == "aggressive" else [1.0, 2.0, 3.0]
        expected = sum(a * v for a, v in zip(factors, values, strict=True)) / sum(factors)
        assert loss.value.item() == pytest.approx(expected, rel=1e-5)
        found[weights] = values
    assert found["aggressive"] == found["weighted"]
    torch.testing.assert_close(
        torch.tensor(found["weighted"][2]), Distil().loss(batch, models).value.detach()
    )
    with pytest.raises(UsageError, match="4 trips"):
        Exits(at=[4]).check_models(models)


def test_exits_train_the_heads_that_they_have(batch: Batch) -> None:
    program = captured.captured("llama")
    options = "at=[1, 3], criterion=saturation, head=own"
    model = run_passes(program, f"insert_exits({options})", measure=False).to_module()
    found = Models(model, model, program.to_module().eval().requires_grad_(False))
    first = Exits(at=[1]).loss(batch, found)
    first.value.backward()
    heads = {n: p for n, p in model.named_parameters() if n.startswith("exits.")}
    assert {n: p.grad is not None and bool(p.grad.any()) for n, p in heads.items()} == {
        n: n.startswith("exits.1.") for n in heads
    }
    with torch.no_grad():
        heads["exits.1.lm_head.weight"].zero_()
    # that of the full depth is another one
    second = Exits(at=[1]).loss(batch, found)
    assert second.parts["after_1"] != first.parts["after_1"]
    assert second.parts["full"] == first.parts["full"]


def test_new_weights_are_those_that_the_original_lacks(models: Models) -> None:
    found = new_names(models.module, models.teacher)
    assert found
    assert all("lora_" in name for name in found)
    with training(models.module, Align(), found) as module:
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        assert trained
        assert trained <= found
    models.module.requires_grad_(True)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_go_on_from_their_state(name: str) -> None:
    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        stage = Tune.make({"optimizer": name, "lr": 0.1})
        return model, make_optimizer(stage, model.parameters())

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(torch.eye(4)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    other, again = make()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (other, again)):
        step(*pair)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learning_rates_rise_and_fall() -> None:
    stage = Tune(lr=1.0, warmup=0.1, final=0.2)
    rates = [rate(stage, step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=0.01)


def test_recipes_say_what_is_wrong() -> None:
    for data, message in (
        ({}, "no stages"),
        ({"recover": {"stages": []}}, "at least one stage"),
        ({"recover": {"stages": ["distill"]}}, "did you mean distil"),
        ({"recover": {"stages": [{"distil": {"temprature": 1}}]}}, "did you mean temperature"),
        ({"recover": {"stages": [{"distil": {"lr": "high"}}]}}, "lr must be a number"),
        ({"recover": {"stages": ["tune"], "batch": 0}}, "batch must be an integer, 1 or more"),
        ({"recover": {"stages": ["tune"], "lenght": 3}}, "did you mean length"),
    ):
        with pytest.raises(UsageError, match=message):
            parse(data)


def test_recipes_come_back_from_their_data() -> None:
    data = {"recover": {"batch": 2, "stages": [{"align": {"free": 0.1}}, {"tune": {}}]}}
    assert parse(parse(data).to_data()).to_data() == parse(data).to_data()


def test_shipped_recipes_can_be_read() -> None:
    found = [p for p in Path("reroll/recipes").glob("*.yaml") if "recover:" in p.read_text("utf-8")]
    assert found
    for path in found:
        assert load_recipe(path).stages
        assert load_recipe(path.stem).stages == load_recipe(path).stages


def test_the_stages_that_there_are() -> None:
    assert {"align", "distil", "exits", "tune"} <= set(stages())
    for cls in stages().values():
        assert cls.documentation()
        assert all(o["help"] for o in cls.describe()["options"])


def test_a_loss_in_pieces_is_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, 70, 11, generator=generator, dtype=torch.float64)

    def loss(ours: Any, theirs: Any) -> Any:
        return (ours.softmax(-1) * theirs).square().sum()

    found = []
    for compute in (
        lambda x: mean_over_pieces(x, loss, others),
        lambda x: loss(x, others) / len(x),
    ):
        x = logits.clone().requires_grad_()
        value = compute(x)
        found.append((value.double(), *torch.autograd.grad(3 * value, x)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        assert float(mean_over_pieces(logits, loss, others)) == pytest.approx(float(found[0][0]))
    assert float(mean_over_pieces(logits[:0], loss, others[:0])) == 0
