"""Codebooks: the feature map of `linearize` that is computed from what attends to what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel

import reroll
from reroll.errors import PassError, UsageError
from reroll.passes.linearization.codebook import SHARPNESS, Codebook, measure_codebooks
from reroll.passes.linearization.observed import Reach, Seen
from reroll.rewrite.capture.export import capture
from reroll.rewrite.passes.manager import run_passes
from reroll.rewrite.program import Program
from tests import tiny
from tests.captured import captured
from tests.passes.sequences import in_parts

REACH = Reach(window=8, sinks=2)
HALF, D, TOLD = 96, 32, 16


def copying(seed: int) -> Seen:
    """Two query heads on one key head that look for the token after the one they are at.

    Tokens come twice; half of a key is its token, and four times as much says nothing.
    """
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)

    def drawn(*shape: int, generator: torch.Generator = own) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ways = torch.linalg.qr(drawn(D, D, generator=fixed)).Q
    asking = drawn(2, TOLD, D, generator=fixed)
    names = drawn(HALF, TOLD).repeat(2, 1)
    before = names.roll(1, 0)
    noise = 4 * drawn(1, 1, 2 * HALF, D - TOLD)
    k = torch.cat((before[None, None], noise), -1) @ ways + 3.0
    q = torch.einsum("tn,hnd->htd", names, asking)[None] + 0.3 * drawn(1, 2, 2 * HALF, D) - 1.0
    # attention as it would be if it knew those directions
    seen_q = 6 * F.normalize(names, dim=-1).expand(1, 2, -1, -1)
    seen_k = F.normalize(before, dim=-1).expand(1, 1, -1, -1) * 6
    named = {"causal": True}
    empty = torch.empty(0)
    return Seen(0, seen_q, seen_k, empty, 1.0, named, empty, read=(q, k))


def share(book: Codebook, seen: Seen) -> float:
    """How much of a query's weights out of the window its match has, in the second half."""
    assert seen.read is not None
    q, k = seen.read
    at = torch.arange(HALF, 2 * HALF - 1)
    phi_q, phi_k = (q @ book.queries).softmax(-1), (k @ book.keys).softmax(-1)
    weights = (phi_q @ phi_k.mT).masked_fill(REACH.ages(2 * HALF, True) < 0, 0.0)[:, :, at]
    match = weights[:, :, torch.arange(len(at)), at - HALF + 1]
    return float((match / weights.sum(-1)).mean())


def test_it_finds_what_queries_look_for() -> None:
    """On tokens that it has not seen; random buckets know nothing of them."""
    book = measure_codebooks([copying(n) for n in range(1, 9)], REACH, 64)[0]
    assert book.queries.shape == (2, D, 64)
    assert book.keys.shape == (1, D, 64)
    generator = torch.Generator().manual_seed(0)
    random = F.normalize(torch.randn(1, D, 64, generator=generator), dim=1)
    blind = Codebook(random.repeat(2, 1, 1) * SHARPNESS, random * SHARPNESS)
    chance = 1 / HALF
    unseen = copying(99)
    assert share(book, unseen) > 8 * chance
    assert share(blind, unseen) < 2 * chance


def test_a_mean_says_nothing() -> None:
    """What all queries and all keys have in common moves no bucket."""
    seen = [copying(n) for n in range(1, 9)]
    book = measure_codebooks(seen, REACH, 64)[0]
    keys = torch.cat([s.read[1] for s in seen if s.read is not None])
    mean = keys.mean((0, 1, 2))
    assert mean.norm() > 10
    assert (mean @ book.keys).abs().max() < 1e-3 * (keys @ book.keys).std()


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Program:
    made = tiny.save(tiny.llama(2), tmp_path_factory.mktemp("tiny"), tiny.tokenizer())
    return capture(str(made))


TEXT = (
    "linearize(mixer=linear, window=16, gates=calibrated, feature_map=codebook, features=24, "
    "combine=joint, samples=2{})"
)


def test_in_a_model(with_text: Program, tmp_path: Path) -> None:
    """Whole or in parts, saved and loaded, a layer linearized or all."""
    for more in ("", ", layers=[1]"):
        after = run_passes(with_text, TEXT.format(more), measure=False)
        assert "bring back" in after.origin.steps[-1].remarks[0]
        model = after.to_module().eval()
        ids = torch.randint(3, 64, (1, 60))
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            parts, _ = in_parts(model, inputs, [40, 1, 19])
        torch.testing.assert_close(parts, whole)
        out = tmp_path / f"out{len(more)}"
        after.save(str(out))
        with torch.no_grad():
            again = reroll.load(out).to_module().eval()(ids, use_cache=False).logits
        torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_in_an_encoder(tmp_path: Path) -> None:
    """Padding changes nothing for a model that looks both ways."""
    config = tiny.bert().config
    config.max_position_embeddings = 512
    made = tiny.save(BertModel(config).eval(), tmp_path / "bert", tiny.tokenizer())
    after = run_passes(capture(str(made)), TEXT.format("").replace("16", "8"), measure=False)
    assert "bring back" in after.origin.steps[-1].remarks[0]
    model = after.to_module().eval()
    ids = torch.randint(5, 60, (1, 40))
    padded = F.pad(ids, (0, 5))
    with torch.no_grad():
        alone = model(ids, attention_mask=torch.ones_like(ids))[0]
        beside = model(padded, attention_mask=(torch.arange(45) < 40).long()[None])[0]
    torch.testing.assert_close(beside[:, :40], alone)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("gates=calibrated, ", ""), UsageError, "computed from text"),
        (("features=24", "features=0"), UsageError, "features is 1 or more"),
        (("features=24", "features=99999"), PassError, "cannot be sorted into 99999 buckets"),
    ],
)
def test_what_is_refused(
    with_text: Program, change: tuple[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_passes(with_text, TEXT.format("").replace(*change), measure=False)


def test_without_text_it_says_so() -> None:
    with pytest.raises(PassError, match="no text to compute a codebook from"):
        run_passes(captured("llama"), TEXT.format(""), measure=False)
