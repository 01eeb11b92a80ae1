from __future__ import annotations

import pytest
import torch

from reroll.errors import UsageError
from reroll.rewrite.pipeline.manager import run_passes
from reroll.runtime.depthwise import DepthScheduler
from tests.captured import captured

PROMPTS = [[5, 9, 3], [17, 4, 4, 30, 8], [40], [22, 23, 24, 25], [11, 50], [33, 7, 12, 60, 2, 2]]
TIED = "tie(blocks=2), relax(rank=4), "


def lowered(exits: str = "", passes: str = TIED, name: str = "llama"):
    pipeline = f"{passes}insert_exits({exits})" if exits else passes.rstrip(", ")
    program = captured(name)
    return (run_passes(program, pipeline, measure=False) if pipeline else program).to_module()


def alone(model, prompt, count):
    """What `generate` gives, one request at a time and without a cache."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "eos_token_id": None, "use_cache": False}
    return model.generate(ids, max_new_tokens=count, **settings)[0, len(prompt) :].tolist()


EXITS = {
    "cycle": "at=[2], threshold=0.006",
    "every": "at=[1, 2, 3], threshold=[0.02, 0.006, 0.01]",
    "saturation": "at=[1, 2, 3], criterion=saturation, threshold=0.7",
    "patience": "at=[1, 2, 3], criterion=patience, threshold=0",
    "linear": "at=[1, 3], criterion=linear, threshold=[0.6, 0.4]",
    "defer": "at=[2], threshold=0.006, state=defer",
    "skip": "at=[1, 2, 3], criterion=saturation, threshold=0.7, state=skip",
    "own": "at=[1, 2, 3], threshold=[0.02, 0.006, 0.01], head=own",
    "none": "",
}


@pytest.mark.parametrize("exits", EXITS)
@pytest.mark.parametrize("mode", ["depth", "compact", "lockstep"])
def test_every_stream_gets_what_it_gets_alone(exits, mode):
    model = lowered(EXITS[exits])
    lengths = [9, 4, 12, 1, 7, 10]
    expected = [alone(model, p, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    with DepthScheduler(model, slots=3, length=32, mode=mode) as scheduler:
        numbers = [
            scheduler.submit(p, max_new_tokens=n) for p, n in zip(PROMPTS, lengths, strict=True)
        ]
        assert [list(scheduler.stream(n)) for n in numbers] == expected
        report = scheduler.depth_report()
    assert report.tokens == sum(lengths) - len(lengths)
    if exits in ("cycle", "every", "saturation", "defer", "skip", "own"):
        assert 1 < report.mean < 4


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
@pytest.mark.parametrize("passes", ["", "tie(blocks=2, layout=sequence), "])
def test_other_models_and_untied_loops(name, passes):
    model = lowered("at=[1, 2], criterion=saturation, threshold=0.6", passes, name)
    with DepthScheduler(model, slots=4, length=32) as scheduler:
        numbers = [scheduler.submit(p, max_new_tokens=14) for p in PROMPTS]
        scheduler.run()
        for number, prompt in zip(numbers, PROMPTS, strict=True):
            assert list(scheduler.stream(number)) == alone(model, prompt, 14)


def test_requests_join_while_others_run():
    model = lowered(EXITS["cycle"])
    scheduler = DepthScheduler(model, slots=4, length=32)
    first = scheduler.stream(scheduler.submit(PROMPTS[0], max_new_tokens=10))
    begun = [next(first) for _ in range(3)]
    second = scheduler.submit(PROMPTS[1], max_new_tokens=6)
    assert list(scheduler.stream(second)) == alone(model, PROMPTS[1], 6)
    assert begun + list(first) == alone(model, PROMPTS[0], 10)
    scheduler.close()
    with pytest.raises(UsageError, match="closed"):
        scheduler.submit(PROMPTS[2])


def test_rows_of_different_depths_share_a_batch():
    model = lowered("at=[2], threshold=0.012")
    counts = {}
    for mode in ("depth", "compact", "lockstep"):
        with DepthScheduler(model, slots=6, length=40, mode=mode) as scheduler:
            for prompt in PROMPTS:
                scheduler.submit(prompt, max_new_tokens=20)
            scheduler.run()
            counts[mode] = scheduler.counts
            depths = scheduler.depth_report()
    tokens = sum(depth * count for depth, count in depths.histogram.items())
    assert 2 < depths.mean < 4
    assert counts["depth"].trips == counts["compact"].trips == tokens
    assert counts["lockstep"].trips > tokens
    # rows that left and those that did not are in one batch, so that batches are fewer and fuller
    assert counts["depth"].batches < counts["compact"].batches
    assert counts["depth"].heads == counts["lockstep"].heads == 6 * 19


def test_a_stop_token_ends_a_request():
    model = lowered(EXITS["cycle"])
    tokens = alone(model, PROMPTS[0], 8)
    stop = tokens[4]
    scheduler = DepthScheduler(model, slots=1, length=32)
    number = scheduler.submit(PROMPTS[0], max_new_tokens=8, stop=[stop])
    assert list(scheduler.stream(number)) == tokens[: tokens.index(stop) + 1]


def test_what_it_refuses():
    with pytest.raises(UsageError, match="3 loops"):
        DepthScheduler(lowered(passes="loop_window(start=1, stop=3), "))
    with pytest.raises(UsageError, match="cannot be decoded depth by depth"):
        DepthScheduler(lowered(passes="", name="bloom"))
    with pytest.raises(UsageError, match="layers or exits have state"):
        DepthScheduler(lowered("at=[2], criterion=gated"))
    # the pool has no place for the first tokens beside a window
    with pytest.raises(UsageError, match="its attention has prefix"):
        DepthScheduler(lowered(passes="window(size=4, sinks=1), "))
    scheduler = DepthScheduler(lowered(), slots=1, length=8)
    with pytest.raises(UsageError, match="do not fit the length of 8"):
        scheduler.submit([1, 2, 3], max_new_tokens=6)
    with pytest.raises(UsageError, match="a request has a prompt"):
        scheduler.submit([], max_new_tokens=6)
    with pytest.raises(UsageError, match="no request 7"):
        next(scheduler.stream(7))


def test_it_can_stop_when_a_slot_stays_free():
    scheduler = DepthScheduler(lowered(EXITS["cycle"]), slots=2, length=32)
    numbers = [
        scheduler.submit(p, max_new_tokens=n) for p, n in zip(PROMPTS, [9, 3, 4], strict=False)
    ]
    scheduler.run(while_full=True)
    lengths = [len(scheduler.tokens(number)) for number in numbers]
    assert lengths[1] == 3
    assert 9 in lengths or lengths[2] == 4
    assert lengths != [9, 3, 4]
    scheduler.run()
    assert [len(scheduler.tokens(number)) for number in numbers] == [9, 3, 4]
    with pytest.raises(UsageError, match="no request 9"):
        scheduler.tokens(9)


def test_batches_are_full_while_requests_wait():
    model = lowered("at=[2], threshold=0.012, state=skip")
    ticks = {}
    for mode in ("depth", "lockstep"):
        with DepthScheduler(model, slots=3, length=32, mode=mode) as scheduler:
            for prompt in PROMPTS * 2:
                scheduler.submit(prompt, max_new_tokens=6)
            scheduler.run(while_full=True)
            counts, tokens = scheduler.counts, scheduler.depth_report().tokens
            assert counts.trips == 3 * counts.batches
            ticks[mode] = counts.batches / tokens
    # rows that left early do not wait for those that did not
    assert ticks["depth"] < ticks["lockstep"]
