from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis.phases import (
    bisections,
    choose,
    cosine_distances,
    linear_cka,
    segment,
)
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured
from tests.conformance.pass_suite import PassSuite


class TestConformance(PassSuite):
    pipeline = "find_phases(most=3)"
    models = ("llama", "vit")


def random_distances(layers, seed):
    generator = torch.Generator().manual_seed(seed)
    half = torch.rand(layers, layers, generator=generator).triu(1)
    return half + half.T


def inside(distances, index):
    return sum(
        distances[a, b].item()
        for a, b in combinations(range(len(index)), 2)
        if index[a] == index[b]
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 99))
def test_the_segmentation_is_the_best_of_all(layers, phases, seed):
    phases = min(phases, layers)
    distances = random_distances(layers, seed)
    found = segment(distances, phases)
    assert len(found.starts) == phases
    least = min(
        inside(distances, [sum(layer >= cut for cut in cuts) for layer in range(layers)])
        for cuts in combinations(range(1, layers), phases - 1)
    )
    assert inside(distances, found.index()) == pytest.approx(least, abs=1e-5)
    total = inside(distances, [0] * layers)
    assert found.between == pytest.approx(1 - least / total, abs=1e-5)


def blocks(sizes, noise=0.02):
    """Distances of layers that fall into phases of these sizes."""
    index = [p for p, size in enumerate(sizes) for _ in range(size)]
    far = torch.tensor([[float(a != b) for b in index] for a in index])
    return far + noise * random_distances(len(index), 0)


@pytest.mark.parametrize("sizes", [(4, 6, 2), (3, 9, 8, 4), (2, 3, 3, 4)])
def test_phases_that_are_there_are_found_with_and_without_the_constraint(sizes):
    distances = blocks(sizes)
    chosen, tried = choose(distances, most=8)
    starts = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    assert chosen.starts == starts
    assert [len(each.starts) for each in tried] == list(range(1, 9))
    clusters = [list(range(s, s + n)) for s, n in zip(starts, sizes, strict=True)]
    assert bisections(distances, len(sizes)) == clusters


def test_free_cuts_need_not_be_contiguous():
    distances = blocks((3, 4, 2))
    order = [0, 3, 1, 4, 2, 5, 6, 7, 8]
    mixed = distances[order][:, order]
    assert bisections(mixed, 3) == [[0, 2, 4], [1, 3, 5, 6], [7, 8]]


def test_a_cut_of_many_layers_is_no_worse_than_the_best_contiguous_one():
    distances = random_distances(20, 3)
    left, right = bisections(distances, 2)
    found = distances[left][:, right].sum()
    contiguous = segment(distances, 2)
    index = torch.tensor(contiguous.index())
    assert found >= distances[index == 0][:, index == 1].sum() - 1e-5


def test_similarities():
    torch.manual_seed(0)
    a = torch.randn(50, 8)
    turned = a @ torch.linalg.qr(torch.randn(8, 8)).Q * 3
    states = torch.stack([a, turned, torch.randn(50, 8), 2 * a])
    cka = linear_cka(states)
    assert cka[0, 1].item() == pytest.approx(1, abs=1e-4)
    assert cka[0, 2] < 0.5
    distances = cosine_distances(states)
    assert distances[0, 3].item() == pytest.approx(0, abs=1e-5)
    expected = 1 - torch.cosine_similarity(a, states[2], dim=-1).mean()
    assert distances[0, 2].item() == pytest.approx(expected.item(), abs=1e-5)


def test_it_says_what_it_found():
    program = run_passes(captured("llama"), "find_phases(most=3)", measure=False)
    remarks = program.origin.steps[-1].remarks
    assert remarks[0].startswith("2 phases: ")
    assert "model.layers: " in remarks[2]
    assert [r.split(" adds")[0] for r in remarks if " adds" in r] == [
        "self_attn.o_proj",
        "mlp.down_proj",
    ]
    (skips,) = [r for r in remarks if r.startswith("KL divergence without each layer: ")]
    assert len(skips.split(": ")[1].split(" ")) == 4
    remarks = run_passes(captured("dinov2"), "find_phases(most=2)", measure=False)
    assert "relative RMS error of the output without" in remarks.origin.steps[-1].remarks[-1]


def test_tie_within_phases():
    program = run_passes(captured("llama"), "tie(phases=[1, 3])", measure=False)
    weight = program.weights["model.layers.*.mlp.up_proj.weight"]
    assert weight.index == (0, 1, 1, 2)
    found = run_passes(captured("llama"), "find_phases(most=2)", measure=False)
    starts = found.origin.steps[-1].remarks[0]
    tied = run_passes(captured("llama"), "tie(phases=auto, blocks=2)", measure=False)
    index = tied.weights["model.layers.*.mlp.up_proj.weight"].index
    cut = index.index(1)
    assert f"{'0' if cut == 1 else f'0-{cut - 1}'} | " in starts
    assert any("2 phases" in r for r in tied.origin.steps[-1].remarks)
    for phases in ("[3, 1]", "[4]"):
        with pytest.raises(PassError, match="phases start"):
            run_passes(captured("llama"), f"tie(phases={phases})", measure=False)
    with pytest.raises(UsageError, match="phases must be an integer, 1 or more"):
        run_passes(captured("llama"), "tie(phases=[0])", measure=False)
