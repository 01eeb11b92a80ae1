"""Measure how far a converted model is from the original, both on the same text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.bounds import COUNT, SEED, WINDOW, check_number
from reroll.errors import UsageError
from reroll.evaluate.subjects import Attention, Opening, Subject, open_subject
from reroll.evaluate.tokenizing import make_windows, read_text
from reroll.rewrite.analysis.distance import Distance
from reroll.rewrite.analysis.program_distance import measured_output
from reroll.rewrite.analysis.reach import check_length, longest
from reroll.rewrite.analysis.samples import random_inputs, vocabulary
from reroll.rewrite.ir.records import Input

LENGTH = 512
MAX_TOKENS = 8192
CONTEXTS = (1024, 4096)

# memory for the logits of one model, in bytes
_BUDGET = 2**29
# batches of random inputs for a model that takes no text
_RANDOM_BATCHES = 4

Progress = Callable[[int, int, str], None]


def compare(
    a: Any,
    b: Any,
    text: str | Path | None = None,
    *,
    length: int | None = None,
    max_tokens: int | None = MAX_TOKENS,
    batch: int = 4,
    dtype: torch.dtype | str | None = None,
    attention: Attention = "eager",
    tokenizer: Any | None = None,
    contexts: tuple[int, ...] = CONTEXTS,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure how far `b` is from `a` on the same inputs, as JSON data.

    Args:
        a: the original: a path, a hub id, a Program or a module. Runs through transformers itself.
        b: the converted model: as `a`; a model that reroll converted runs through its lowered
            module.
        text: text, or a file with text (`Path`), to run on; a sample is included.
        length: tokens in each window of the text; by default 512, or as many as the models have
            positions for.
        max_tokens: no more tokens of the text than this; None for all of it.
        batch: windows that run at once, fewer where the logits would take too much memory.
        dtype: compute both in this dtype; in their own by default.
        attention: transformers' attention implementation for the original.
        tokenizer: transformers tokenizer; by default that of `a`, or else of `b`.
        contexts: lengths for which the size of the state is reported.
        revision: branch, tag or commit, for models on the hub.
        trust_remote_code: run Python code that comes with a model.
        seed: for inputs that are random because the model takes no text.
        on_progress: called with (done, total, what).

    Keys that do not apply are None: perplexity for a model that predicts no next token, everything
    about logits for one that has none. The KL divergence is KL(a || b) in nats.

    Raises UsageError if the two cannot be compared, and CheckpointError if one cannot be loaded.
    """
    if length is not None:
        check_number("length", length, WINDOW, "compare")
    if max_tokens is not None:
        check_number("max_tokens", max_tokens, COUNT, "compare")
    check_number("batch", batch, COUNT, "compare")
    check_number("seed", seed, SEED, "compare")
    for context in contexts:
        check_number("contexts", context, COUNT, "compare")
    report = on_progress or (lambda done, total, message: None)
    content = read_text(text)
    opening = Opening(dtype, attention, revision, trust_remote_code)
    subjects = []
    for number, item in enumerate((a, b)):
        report(number, 2, "opening models")
        subjects.append(open_subject(item, opening))
    pair = _Pair(*subjects)
    length = _fitting(pair) if length is None else length
    for program in pair.programs:
        check_length(program, length, "--length", "give at most {limit}")
    sample = _sample(pair, content, length, max_tokens, batch, tokenizer, seed)
    distance = Distance(pair.logits)
    seconds = [0.0, 0.0]
    for number, inputs in enumerate(sample.batches):
        report(number, len(sample.batches), "comparing")
        for keep, targets in _pieces(pair, inputs, sample):
            outputs = []
            for side, subject in enumerate(subjects):
                start = time.perf_counter()
                outputs.append(subject.run(inputs, pair.output, keep))
                seconds[side] += time.perf_counter() - start
            x, y = outputs
            if x.shape != y.shape:
                raise UsageError(
                    f"the outputs have different shapes: {pair.output} is {list(x.shape)} in a and "
                    f"{list(y.shape)} in b",
                    where=f"{pair.a.name} and {pair.b.name}",
                    hint="compare a model with what it was converted to",
                )
            width = x.shape[-1] if x.dim() > 1 else 1
            distance.add(x.reshape(-1, width), y.reshape(-1, width), targets)
    report(len(sample.batches), len(sample.batches), "comparing")
    return _result(pair, distance, sample, contexts, seconds, text)


def _fitting(pair: _Pair) -> int:
    """Return the default length of a window, or what the models' position tables allow."""
    limits = [limit for p in pair.programs if (limit := longest(p)) is not None]
    return min([LENGTH, *limits])


class _Pair:
    """Both models, and the output that they have in common."""

    def __init__(self, a: Subject, b: Subject) -> None:
        self.a = a
        self.b = b
        outputs = [s.program.outputs for s in (a, b) if s.program is not None] or [("logits",)]
        programs = self.programs = [s.program for s in (b, a) if s.program is not None]
        wanted = measured_output(programs[0]) if programs else "logits"
        common = [name for name in outputs[0] if all(name in other for other in outputs)]
        if not common:
            raise UsageError(
                f"the models have no output in common: {list(outputs[0])} and {list(outputs[-1])}",
                where=f"{a.name} and {b.name}",
            )
        data = [sorted(i.name for i in p.inputs if i.role == "data") for p in programs]
        if any(names != data[0] for names in data):
            raise UsageError(
                f"the models read different inputs: {', '.join(data[-1])} and {', '.join(data[0])}",
                where=f"{a.name} and {b.name}",
                hint="compare a model with what it was converted to",
            )
        self.output = wanted if wanted in common else common[0]
        self.logits = "logits" in self.output
        self.inputs: tuple[Input, ...] = programs[0].inputs if programs else ()
        self.program = programs[0] if programs else None


@dataclass(frozen=True)
class _Sample:
    """Inputs to run on: batches, their kind, and the length of a window."""

    batches: list[dict[str, Tensor]]
    source: str
    length: int | None = None
    windows: int | None = None
    prefix: int = 0
    cut: bool = False
    # the input whose tokens are predicted
    predicts: str | None = None


def _sample(
    pair: _Pair,
    text: str,
    length: int,
    max_tokens: int | None,
    batch: int,
    tokenizer: Any | None,
    seed: int,
) -> _Sample:
    texts = [i.name for i in pair.inputs if _is_tokens(i)] if pair.program else ["input_ids"]
    if not texts:
        batches = [_others(pair, 2, 16, seed + n) for n in range(_RANDOM_BATCHES)]
        return _Sample(batches, "random")
    predicts = texts[0] if pair.a.generates and pair.b.generates else None
    tokenizer = tokenizer or pair.a.tokenizer or pair.b.tokenizer
    if tokenizer is None:
        top = (pair.program and vocabulary(pair.program)) or 2
        count = max((max_tokens or MAX_TOKENS) // length, 1)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, top, (count, length), generator=generator)
        source, prefix, cut, predicts = "random tokens", 0, False, None
    else:
        closing = predicts is None and len(texts) == 1
        windows = make_windows(text, tokenizer, length, max_tokens, closing=closing)
        ids, source, prefix, cut = windows.ids, "text", windows.prefix, windows.cut
    rows = max(min(batch, _BUDGET // (4 * ids.shape[1] * _width(pair))), 1)
    batches = [
        {**_others(pair, len(part), ids.shape[1], seed), **dict.fromkeys(texts, part)}
        for part in ids.split(rows)
    ]
    return _Sample(batches, source, ids.shape[1], ids.shape[0], prefix, cut, predicts)


def _is_tokens(item: Input) -> bool:
    whole = item.type.dtype in (torch.int64, torch.int32)
    return item.role == "data" and whole and len(item.type.shape) == 2


def _others(pair: _Pair, rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return random values for the inputs that are not text."""
    if pair.program is None:
        return {}
    inputs = random_inputs(pair.program, rows=rows, length=length, seed=seed)
    wanted = {i.name for i in pair.inputs if i.role == "data"}
    return {name: tensor for name, tensor in inputs.items() if name in wanted}


def _width(pair: _Pair) -> int:
    """Return the elements of the output at each position: the vocabulary, for logits."""
    if not pair.logits or pair.program is None:
        return 1
    return vocabulary(pair.program) or 1


def _pieces(
    pair: _Pair, inputs: Mapping[str, Tensor], sample: _Sample
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Yield positions to run for, all at once if their logits fit into memory, with targets."""
    following = None
    if sample.predicts is not None:
        ids = inputs[sample.predicts]
        following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    whole = 4 * (sample.length or 1) * _width(pair)
    parts = math.ceil(whole / _BUDGET)
    able = all("logits_to_keep" in subject.accepts for subject in (pair.a, pair.b))
    if parts == 1 or not able or sample.length is None:
        yield None, None if following is None else following.flatten()
        return
    for positions in torch.arange(sample.length).chunk(parts):
        yield positions, None if following is None else following[:, positions].flatten()


def _result(
    pair: _Pair,
    distance: Distance,
    sample: _Sample,
    contexts: tuple[int, ...],
    seconds: list[float],
    text: str | Path | None,
) -> dict[str, Any]:
    def both(of: Callable[[Subject], Any]) -> dict[str, Any]:
        return {"a": of(pair.a), "b": of(pair.b)}

    perplexity = {"a": distance.perplexity(0), "b": distance.perplexity(1)}
    states = {str(c): {"a": pair.a.state_bytes(c), "b": pair.b.state_bytes(c)} for c in contexts}
    stateless = all(value is None for sides in states.values() for value in sides.values())
    source = "sample" if text is None else str(text) if isinstance(text, Path) else "given"
    return {
        "a": pair.a.name,
        "b": pair.b.name,
        "output": pair.output,
        "max_abs_logit_error": distance.largest if pair.logits else None,
        "max_abs_error": distance.largest,
        "relative_rms_error": distance.relative_rms_error,
        "kl": distance.kl if pair.logits else None,
        "top1_agreement": distance.top1_agreement if pair.logits else None,
        "perplexity": None if perplexity["a"] is None else perplexity,
        "parameters": both(Subject.parameters),
        "bytes": both(Subject.bytes),
        "flops_per_token": both(Subject.flops_per_token),
        "state_bytes": None if stateless else states,
        "tokens": distance.positions,
        "inputs": {
            "kind": sample.source,
            "text": source if sample.source == "text" else None,
            "length": sample.length,
            "windows": sample.windows,
            "prefix_tokens": sample.prefix,
            "cut": sample.cut,
        },
        "dtype": both(lambda s: str(s.dtype).removeprefix("torch.")),
        "attention": None if pair.a.converted else pair.a.opening.attention,
        "seconds": {"a": seconds[0], "b": seconds[1]},
    }
