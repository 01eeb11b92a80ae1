"""Gates of `linearize` that sort keys into slots by clusters of a text's keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import reroll
from reroll.errors import PassError, UsageError
from reroll.passes.linearize.clusters import clusters_of
from reroll.rewrite.capture.export import capture
from reroll.rewrite.ir.interpret import run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.manager import run_passes
from tests import tiny
from tests.captured import captured
from tests.passes.sequences import in_parts

pytestmark = pytest.mark.usefixtures("captured_once")

TEXT = "linearize(mixer=gsa, mixer_options={{slots: 24}}, gates=clustered, samples=2, {})"
JOINT = TEXT.format("window=16, combine=joint")


def test_clusters_are_where_keys_are() -> None:
    """In each head its own; all keys of all inputs count."""
    torch.manual_seed(0)
    # six places, far apart; as many keys at each in one input as in the other
    middles = 10 * torch.randn(2, 6, 8)
    keys = middles.repeat(1, 40, 1) + 0.1 * torch.randn(2, 240, 8)
    found = clusters_of([keys[None, :, :120], keys[None, :, 120:]], 24)
    assert found.weight.shape == (2, 24, 8)
    assert found.bias.shape == (2, 24)
    near = keys @ found.weight.mT + found.bias[:, None]
    slot = near.argmax(-1)
    for head in range(2):
        # what has a slot in common comes from one place
        place = torch.arange(240) % 6
        for each in slot[head].unique():
            assert len(place[slot[head] == each].unique()) == 1
    # keys are in a slot, and not between two; in other units as well
    assert (near.softmax(-1).max(-1).values > 0.9).float().mean() > 0.8
    other = clusters_of([128 * keys[None]], 24)
    torch.testing.assert_close(128 * keys @ other.weight.mT + other.bias[:, None], near)


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Program:
    made = tiny.save(tiny.llama(2), tmp_path_factory.mktemp("tiny"), tiny.tokenizer())
    return capture(str(made))


@pytest.mark.parametrize(
    "more",
    [
        "window=16",
        "window=16, combine=joint",
        "window=16, combine=joint, layers=[1]",
        "window=0, combine=joint",
    ],
)
def test_in_a_model(with_text: Program, tmp_path: Path, more: str) -> None:
    """Whole or in parts, saved and loaded, a layer linearized or all."""
    after = run_passes(with_text, TEXT.format(more), measure=False)
    remarks = after.origin.steps[-1].remarks
    assert ("mixers bring back" in remarks[0]) == ("window=16" in more)
    model = after.to_module().eval()
    ids = torch.randint(3, 64, (1, 60))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        parts, _ = in_parts(model, inputs, [40, 1, 19])
    torch.testing.assert_close(parts, whole)
    after.save(str(tmp_path / "out"))
    with torch.no_grad():
        again = reroll.load(tmp_path / "out").to_module().eval()(ids, use_cache=False).logits
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_padding_takes_no_slot(with_text: Program) -> None:
    after = run_passes(with_text, JOINT, measure=False)
    ids = torch.randint(3, 64, (1, 50))
    alone = run(after, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
    padded = torch.nn.functional.pad(ids, (7, 0))
    mask = (torch.arange(57) >= 7).long()[None]
    beside = run(after, {"input_ids": padded, "attention_mask": mask})["logits"]
    torch.testing.assert_close(beside[:, 7:], alone)


def test_nearer_than_the_window(with_text: Program) -> None:
    """What slots hold brings the model nearer to the original than the window alone does."""
    ids = torch.randint(3, 64, (1, 120))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def away(pipeline: str) -> float:
        after = run_passes(with_text, pipeline, measure=False)
        logits = [run(p, inputs)["logits"].log_softmax(-1) for p in (with_text, after)]
        return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())

    assert away(JOINT) < 0.8 * away("window(size=16, sinks=4)")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("slots: 24", "slots: 9999"), PassError, "cannot be sorted into 9999 slots"),
        (("slots: 24", "slots: 99999"), UsageError, "slots must be an integer, from 1 to 65536"),
        (("mixer=gsa, mixer_options={slots: 24}", "mixer=gla"), UsageError, "gla has no slots"),
        (("combine=joint", "combine=join"), UsageError, "combine must be one of"),
    ],
)
def test_what_is_refused(
    with_text: Program, change: tuple[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_passes(with_text, JOINT.replace(*change), measure=False)


def test_without_text_it_says_so() -> None:
    with pytest.raises(PassError, match="no text whose keys could be clustered"):
        run_passes(captured("llama"), JOINT, measure=False)
