from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.errors import PassError, UsageError
from reroll.passes.relax import rank_budget
from reroll.passes.relax import relax as module
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.interpret import materialise, run
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.pipeline.manager import run_passes
from reroll.rewrite.pipeline.pipeline import parse_pipeline
from tests.captured import SPECIAL, TEXT, captured
from tests.conformance.pass_suite import PassSuite

pytestmark = pytest.mark.usefixtures("captured_once")

IDS = {"input_ids": torch.arange(12).reshape(2, 6)}
UP = "model.layers.*.mlp.up_proj"


class TestConformance(PassSuite):
    pipeline = "tie(blocks=2), relax(rank=3)"
    models = ("llama", "gpt2", "gemma3")


class TestFull(PassSuite):
    pipeline = "tie(blocks=2), relax(rank=full)"


class TestZero(PassSuite):
    pipeline = "tie(blocks=3, layout=middle_cycle), relax(rank=3, init=zero, vectors=false)"
    models = ("gpt2", "whisper")


class TestBudget(PassSuite):
    pipeline = "tie(blocks=2), relax(budget=0.3, step=2)"


def relaxed(name: str, relax: str, tie: str = "blocks=2", dtype=torch.float32, **options):
    options = {"measure": False, **options}
    return run_passes(captured(name, dtype), f"tie({tie}), relax({relax})", **options)


def logits(program):
    return run(program, IDS)["logits"]


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3",
        "gpt2",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("qwen2", "smollm3", "gpt_neox", "bloom")
        ),
    ],
)
@pytest.mark.parametrize("rank", ["full", "10000"])
@pytest.mark.parametrize("tie", ["blocks=1, norms=true", "blocks=2, init=stepwise"])
def test_full_rank_restores_the_original(name, rank, tie):
    program = relaxed(name, f"rank={rank}", tie)
    assert same(program, captured(name))
    assert not program.reference
    assert logits(program).equal(logits(captured(name)))


def test_more_rank_is_nearer_to_the_original():
    expected = logits(captured("gpt2"))
    errors = [
        tolerances.relative_rms(logits(relaxed("gpt2", f"rank={rank}")), expected)
        for rank in (1, 16, 24, 31, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] == 0


@pytest.mark.parametrize("tie", ["blocks=2", "blocks=2, layout=sequence, init=lower"])
def test_the_factors_are_the_best_of_their_rank(tie):
    program = relaxed("llama", "rank=5", tie)
    weights, original = materialise(program), materialise(captured("llama"))
    index = program.weights[f"{UP}.weight"].index
    for trip, block in enumerate(index):
        residual = original[f"{UP}.weight", trip] - weights[f"{UP}.weight", block]
        product = weights[f"{UP}.lora_up.weight", trip] @ weights[f"{UP}.lora_down.weight", trip]
        u, s, v = torch.linalg.svd(residual.double(), full_matrices=False)
        best = (u[:, :5] * s[:5]) @ v[:5]
        assert (product - best).norm() <= 1e-5 * residual.norm() + 1e-12


def test_a_relaxed_layer_is_the_shared_layer_plus_its_residual():
    program = relaxed("gpt2", "rank=5")
    weights = materialise(program)
    merged = {}
    for name, weight in program.weights.items():
        stem = name.removesuffix(".weight")
        if "lora" in name:
            continue
        for trip in range(4 if weight.index else 1):
            entry = weight.index[trip] if weight.index else 0
            value = weights[name, entry]
            if f"{stem}.lora_up.weight" in program.weights:
                up, down = (weights[f"{stem}.lora_{k}.weight", trip] for k in ("up", "down"))
                value = value + up @ down
            merged[name, trip] = value
    expected = run(captured("gpt2"), IDS, weights=merged)["logits"]
    assert tolerances.relative_rms(logits(program), expected) <= tolerances.forward(torch.float32)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["llama", "gpt2"]),
    st.integers(1, 4),
    st.sampled_from(["cycle", "sequence", "middle_cycle"]),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_parameters_agree_with_the_closed_form(name, blocks, layout, rank, special):
    if layout == "middle_cycle" and blocks < 3:
        return
    kind = {"llama": "k_proj", "gpt2": "c_fc"}[name]
    tie, relax = f"blocks={blocks}, layout={layout}", f"rank={rank}, ranks={{{kind}: {special}}}"
    program, original = relaxed(name, relax, tie), captured(name)
    uses = run_passes(original, f"tie({tie})", measure=False).weights
    expected = original.parameters()
    for weight_name, weight in original.weights.items():
        shape = weight.meta.shape
        if weight.index is None or len(shape) != 2:
            continue
        index = uses[weight_name].index
        r = special if f".{kind}." in weight_name else rank
        alone = sum(index.count(block) == 1 for block in range(blocks))
        if r < min(shape) and blocks < 4:
            factors = 4 - alone + (1 if alone else 0)
            expected -= (4 - blocks) * weight.meta.elements
            expected += factors * r * sum(shape)
    assert program.parameters() == expected


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ("{q_proj: 3}", {"q_proj": 3, "o_proj": 2, "up_proj": 2}),
        ("{self_attn.q_proj: 3}", {"q_proj": 3, "o_proj": 2, "up_proj": 2}),
        ("{q_proj: 3, self_attn.q_proj: 4}", {"q_proj": 4}),
        ("{'layers.*.mlp.up_proj': 7}", {"up_proj": 7, "q_proj": 2}),
        ("{q_proj: 0}", {"q_proj": None, "k_proj": 2}),
    ],
)
def test_ranks_go_by_the_end_of_the_name(ranks, expected):
    weights = relaxed("llama", f"rank=2, ranks={ranks}").weights
    for kind, rank in expected.items():
        found = [w for n, w in weights.items() if n.endswith(f".{kind}.lora_down.weight")]
        assert [w.meta.shape[0] for w in found] == ([] if rank is None else [rank])


@pytest.mark.parametrize("kind", ["proj", "q_pro", "q_projj", "attn.q_proj"])
def test_a_kind_that_nothing_has_is_an_error(kind):
    with pytest.raises(PassError, match="no tied weight is of kind"):
        relaxed("llama", f"ranks={{{kind}: 3}}")


def test_ranks_are_not_negative():
    for options in ("rank=-1", "ranks={q_proj: -1}"):
        with pytest.raises(UsageError, match=r"ranks? must be an integer, 0 or more, not -1"):
            parse_pipeline(f"relax({options})")


def test_zero_starts_as_the_tied_model_and_can_learn():
    tied = run_passes(captured("llama"), "tie(blocks=2)", measure=False)
    program = relaxed("llama", "rank=3, init=zero")
    assert logits(program).equal(logits(tied))
    weights, svd = materialise(program), materialise(relaxed("llama", "rank=3"))
    down = weights[f"{UP}.lora_down.weight", 1]
    assert down.equal(svd[f"{UP}.lora_down.weight", 1])
    assert down.norm() > 0.1
    assert not weights[f"{UP}.lora_up.weight", 1].any()
    # each of them is stored for itself, or training would move all at once
    assert program.parameters() == relaxed("llama", "rank=3").parameters()


def test_blocks_that_one_trip_has_alone_share_one_pair_of_zero_factors():
    program = relaxed("llama", "rank=3", "blocks=3, layout=middle_cycle, init=stepwise")
    for end in ("up", "down"):
        weight = program.weights[f"{UP}.lora_{end}.weight"]
        assert weight.index == (0, 1, 2, 0)
        assert not materialise(program)[f"{UP}.lora_{end}.weight", 0].any()


def test_vectors_come_back_unless_they_are_to_stay():
    bias = "transformer.h.*.attn.c_attn.bias"
    assert relaxed("gpt2", "rank=0").weights[bias] == captured("gpt2").weights[bias]
    kept = relaxed("gpt2", "rank=3, vectors=false")
    assert kept.weights[bias].index == (0, 1, 0, 1)
    assert "left tied: c_attn.bias, c_fc.bias, c_proj.bias" in kept.origin.steps[-1].remarks
    both = run_passes(kept, "relax(rank=3)", measure=False)
    assert same(both, relaxed("gpt2", "rank=3"))


def test_norms_that_were_tied_come_back():
    program = relaxed("llama", "rank=0", "blocks=2, norms=true")
    name = "model.layers.*.input_layernorm.weight"
    assert program.weights[name] == captured("llama").weights[name]


def test_relaxing_twice_adds_nothing():
    once = relaxed("llama", "rank=3")
    twice = run_passes(once, "relax(rank=5)", measure=False) if once.reference else once
    assert same(once, twice)


def test_nothing_tied_is_a_remark_and_something_unknown_an_error():
    step = relaxed("llama", "rank=3", "blocks=4").origin.steps[-1]
    assert step.remarks == ("nothing is tied, so there is nothing to relax",)
    with pytest.raises(PassError, match="relax needs tie to have run before"):
        run_passes(captured("llama"), "relax")
    tied = run_passes(captured("llama"), "tie(blocks=2)", measure=False)
    with pytest.raises(PassError, match="before they were tied is not known"):
        run_passes(replace(tied, reference=tied.reference.without(*tied.reference)), "relax")


def test_weights_that_are_no_linear_layers_stay_tied():
    config = transformers.MixtralConfig(
        **TEXT, **SPECIAL, intermediate_size=24, num_key_value_heads=2, num_local_experts=2
    )
    torch.manual_seed(0)
    program = capture(transformers.MixtralForCausalLM(config).eval())
    result = run_passes(program, "tie(blocks=2), relax(rank=2)", measure=False)
    (left,) = [r for r in result.origin.steps[-1].remarks if r.startswith("left tied")]
    assert left == "left tied: down_proj, gate_up_proj"
    assert set(result.reference) == {n for n in program.weights if ".experts." in n}
    full = run_passes(program, "tie(blocks=2), relax(rank=full)", measure=False)
    assert same(full, program)


NUMBER = r"(\d\.\d+)"


def test_it_says_how_much_of_the_residuals_is_left():
    program = relaxed("llama", "rank=5", measure=True)
    weights, original = materialise(program), materialise(captured("llama"))
    left = []
    for trip in range(4):
        residual = original[f"{UP}.weight", trip] - weights[f"{UP}.weight", trip % 2]
        product = weights[f"{UP}.lora_up.weight", trip] @ weights[f"{UP}.lora_down.weight", trip]
        left.append(((residual - product).norm() / residual.norm()).item())
    (remark,) = [r for r in program.origin.steps[-1].remarks if r.startswith("up_proj")]
    numbers = re.search(rf"left {NUMBER} \({NUMBER} to {NUMBER}\) in 4 of 4$", remark)
    found = [float(g) for g in numbers.groups()]
    assert found == pytest.approx([sum(left) / 4, min(left), max(left)], abs=2e-3)
    assert f"rank 5, {4 * 5 * (32 + 48):,} parameters" in remark


def test_the_layers_of_a_period_are_reported_together():
    remarks = relaxed("smollm3", "rank=5").origin.steps[-1].remarks
    assert len(remarks) == 7
    # trips 0 and 2 share a block, of four layers each
    assert all(r.endswith("in 1 of 8") for r in remarks)


def test_without_measuring_one_of_each_kind_is_looked_at():
    remarks = relaxed("llama", "rank=5").origin.steps[-1].remarks
    assert len(remarks) == 7
    assert all(r.endswith("in 1 of 4") for r in remarks)


def test_what_comes_back_whole_is_named():
    remarks = relaxed("gpt2", "rank=3, ranks={c_fc: full, c_attn: 0}").origin.steps[-1].remarks
    assert remarks[-2:] == (
        "as they were: c_attn.bias, c_fc, c_fc.bias, c_proj.bias",
        "left tied: c_attn",
    )


def test_randomized_factors_come_with_their_error():
    exact, random = (relaxed("llama", f"rank=3, svd={svd}") for svd in ("exact", "randomized"))
    remarks = random.origin.steps[-1].remarks
    assert all("randomized SVD" in r for r in remarks)
    excess = [re.search(r"\((.*)% above the least possible\)", r) for r in remarks]
    # one for each shape: 32x32, 16x32, 48x32, 32x48
    assert sum(e is not None for e in excess) == 4
    assert all(float(e[1]) < 5 for e in excess if e)
    assert tolerances.relative_rms(logits(random), logits(exact)) < 0.2
    assert not any("randomized" in r for r in exact.origin.steps[-1].remarks)


def test_large_matrices_and_small_ranks_are_decomposed_by_sampling(monkeypatch):
    monkeypatch.setattr(module, "LARGE_SIDE", 16)
    remarks = relaxed("llama", "rank=8").origin.steps[-1].remarks
    assert [("randomized" in r) for r in remarks if r.startswith(("q_proj", "k_proj"))] == [
        True,
        False,
    ]
    remarks = relaxed("llama", "rank=9").origin.steps[-1].remarks
    assert not any("randomized" in r for r in remarks)


def test_residuals_of_half_precision_weights_are_computed_in_fp32():
    program = relaxed("llama", "rank=5", dtype=torch.bfloat16)
    weights = materialise(program)
    original = materialise(captured("llama", torch.bfloat16))
    residual = original[f"{UP}.weight", 0].float() - weights[f"{UP}.weight", 0].float()
    values = torch.linalg.svdvals(residual)
    kept = weights[f"{UP}.lora_up.weight", 0].float().norm()
    assert weights[f"{UP}.lora_up.weight", 0].dtype == torch.bfloat16
    assert kept == pytest.approx(values[:5].norm().item(), rel=4e-3)


# ---- a budget of parameters


def test_a_budget_is_spent_and_not_exceeded():
    original, tied = captured("llama"), run_passes(captured("llama"), "tie(blocks=2)")
    names = [n for n, w in original.weights.items() if w.index and len(w.meta.shape) == 2]
    whole = sum(original.weights[n].elements() for n in names)
    spent = []
    for budget in (0.1, 0.2, 0.4):
        program = relaxed("llama", f"budget={budget}, step=2")
        spent.append(program.parameters() - tied.parameters())
        assert spent[-1] <= budget * whole
        assert program.origin.steps[-1].remarks[0] == (
            f"the budget is {int(budget * whole):,} parameters, of which {spent[-1]:,} are spent"
        )
    assert spent == sorted(spent)
    assert spent[-1] > 0.3 * whole


def lost(program):
    """The squared relative residual that is left, over all tied matrices of `captured`."""
    weights, original = materialise(program), materialise(captured("llama"))
    total = 0.0
    for name, weight in captured("llama").weights.items():
        if weight.index is None or len(weight.meta.shape) != 2:
            continue
        stem, index = name.removesuffix(".weight"), program.weights[name].index
        for trip in range(4):
            value = weights[name, index[trip]].double()
            for ups in [n for n in program.weights if n.startswith(f"{stem}.lora_up")]:
                downs = ups.replace("lora_up", "lora_down")
                entry = program.weights[ups].index[trip]
                value = value + weights[ups, entry].double() @ weights[downs, entry].double()
            total += ((original[name, trip] - value).norm() / original[name, trip].norm()) ** 2
    return total


def test_a_budget_takes_away_more_than_one_rank_for_all():
    even = relaxed("llama", "rank=4")
    names = [n for n in even.weights if "lora" in n]
    whole = sum(w.elements() for n, w in captured("llama").weights.items() if w.index)
    part = sum(even.weights[n].elements() for n in names) / whole
    uneven = relaxed("llama", f"budget={part:.4f}, step=1")
    assert uneven.parameters() <= even.parameters() + 0.01 * whole
    assert lost(uneven) < lost(even)


def test_ranks_that_are_given_are_not_of_the_budget():
    program = relaxed("llama", "budget=0.2, step=2, ranks={q_proj: full, up_proj: 3}")
    name = "model.layers.*.self_attn.q_proj.weight"
    assert program.weights[name] == captured("llama").weights[name]
    assert program.weights[f"{UP}.lora_up.weight"].meta.shape == (48, 3)
    assert f"{UP}.lora_up_1.weight" not in program.weights


def test_a_budget_that_buys_nothing_is_an_error():
    with pytest.raises(PassError, match="a budget of 15 parameters does not pay for one rank of"):
        relaxed("llama", "budget=0.0005")
    for options in ("budget=0.0", "budget=1.5", "budget=0.5, step=0"):
        with pytest.raises(UsageError):
            parse_pipeline(f"relax({options})")


def test_the_cheapest_choices_are_made():
    # two spectra by hand: (energy of the next rank) / cost decides
    first = rank_budget.Spectrum(torch.tensor([8.0, 4.0, 1.0, 1.0]), cost=2)
    second = rank_budget.Spectrum(torch.tensor([9.0, 2.0, 1.0, 0.0]), cost=3)
    spectra, choices = {"a": first, "b": second}, {"a": [0, 1, 2, 4], "b": [0, 1, 2, 4]}
    found = [rank_budget.allocate(spectra, choices, budget) for budget in (1, 2, 5, 7, 10, 100)]
    assert [(f["a"], f["b"]) for f in found] == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (4, 4)]
