"""Every mode of `generate`, beside the original: see the file of cases."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from benchmarks.__main__ import main
from benchmarks.harness import Table, told
from reroll.errors import RerollError
from tests import tiny

NEW = 12
# relative difference of scores and hidden states that are called the same
CLOSE = 1e-4


@dataclass(frozen=True)
class Side:
    """A model that generates, with the inputs of its prompt and an assistant."""

    model: Any
    inputs: dict[str, Tensor]
    assistant: Any
    # added to each call, such as `use_cache=False`
    always: dict[str, Any] = field(default_factory=dict)

    def __call__(self, rows: int = 2, **options: Any) -> Any:
        """Generate after the first rows of the prompt."""
        torch.manual_seed(0)
        inputs = {name: value[:rows] for name, value in self.inputs.items()}
        wishes = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
        attending = _eager(self.model) if "output_attentions" in options else nullcontext()
        with attending:
            return self.model.generate(**{**inputs, **wishes, **self.always, **options})

    @property
    def prompt(self) -> str:
        """The name of the tokens that new ones are put behind."""
        return "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    # the original returns weights of its own attention alone
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# ---- functions that call `generate`, with the options of a mode


def padded(side: Side, **options: Any) -> Any:
    """With four tokens of padding before the first row."""
    mask = torch.ones_like(side.inputs[side.prompt])
    mask[0, :4] = 0
    options[side.prompt.replace("input_ids", "attention_mask")] = mask
    return side(**options)


def assisted(side: Side, **options: Any) -> Any:
    """With an assistant that drafts."""
    return side(assistant_model=side.assistant, **options)


def embedded(side: Side) -> Any:
    """From embeddings in the place of tokens."""
    rows = dict(side.inputs)
    embeddings = side.model.get_input_embeddings()(rows.pop("input_ids"))
    return replace(side, inputs=rows | {"inputs_embeds": embeddings})()


def given_cache(side: Side) -> Any:
    """With a cache of the caller's."""
    cache: Any = DynamicCache(config=side.model.config)
    if side.model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache(config=side.model.config))
    return side(past_key_values=cache)


def continued(side: Side) -> Any:
    """A second time, from the cache and the tokens of the first."""
    first = side(return_dict_in_generate=True, max_new_tokens=4, eos_token_id=None)
    more = {side.prompt: first.sequences, "past_key_values": first.past_key_values}
    if "attention_mask" in side.inputs and side.prompt == "input_ids":
        more["attention_mask"] = torch.ones_like(first.sequences)
    return side(**more)


def encoded(side: Side) -> Any:
    """From what the encoder has given before."""
    decoder = {k: v for k, v in side.inputs.items() if k.startswith("decoder_")}
    encoder = {k: v for k, v in side.inputs.items() if k not in decoder}
    outputs = side.model.get_encoder()(**encoder)
    rest = {k: v for k, v in encoder.items() if k == "attention_mask"}
    return replace(side, inputs={**decoder, **rest})(encoder_outputs=outputs)


def transitions(side: Side, **options: Any) -> Any:
    """The scores of the tokens of each beam."""
    made = side(**options)
    return side.model.compute_transition_scores(
        made.sequences, made.scores, made.beam_indices, normalize_logits=True
    )


def streamed(side: Side, **options: Any) -> Any:
    """The tokens, and what a streamer was given."""
    pieces: list[list[int]] = []
    streamer = SimpleNamespace(
        put=lambda value: pieces.append(value.flatten().tolist()), end=lambda: pieces.append([])
    )
    return side(streamer=streamer, **options), pieces


def even(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Process logits: tokens of even numbers alone are allowed."""
    return scores.index_fill(1, torch.arange(1, scores.shape[1], 2), -torch.inf)


FUNCTIONS = (padded, assisted, embedded, given_cache, continued, encoded, transitions, streamed)
BY: dict[str, Callable[..., Any]] = {function.__name__: function for function in FUNCTIONS}
# options that are no data, by the mode
OBJECTS: dict[str, dict[str, Any]] = {
    "a watermark": {"watermarking_config": transformers.WatermarkingConfig(bias=2.0)},
    "a logits processor": {"logits_processor": LogitsProcessorList([even])},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10, 40))},
    "a stopping criterion": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(14)])},
    "stop strings": {"tokenizer": tiny.tokenizer()},
}


# ---- the sides, and how they compare


def measure(table: Table, options: Namespace) -> None:
    """Add a row for each kind."""
    from tests.peer.kinds import KINDS

    transformers.logging.set_verbosity_error()
    for case in table.missing({"kind": kind} for kind in options.name[1:] or KINDS):
        changed = case["kind"] in options.changed
        ours, theirs = sides_of(KINDS[case["kind"]], changed)
        pair = ours.model.config.is_encoder_decoder
        results = {
            name: result(name, mode | OBJECTS.get(name, {}), ours, theirs)
            for name, mode in options.modes.items()
            if mode.get("pairs") in (None, pair)
        }
        kinds = Counter(text.partition(":")[0].partition(",")[0] for text in results.values())
        counted = {name: kinds[name] for name in ("same", "refused")}
        beside = "itself without a cache" if changed else "its original"
        counted["other"] = len(results) - sum(counted.values())
        table.add(case | {"beside": beside} | counted | {"results": results})


def sides_of(kind: Any, changed: bool) -> tuple[Side, Side]:
    """The lowered model of a kind, and its original, or itself without a cache if it is changed."""
    from tests.peer.suites import program_of, quiet

    original, assistant = (_random(kind, seed) for seed in (0, 1))
    with quiet():
        lowered = program_of(kind, original).to_module()
    torch.manual_seed(1)
    inputs = {k: v[:2] for k, v in kind.original.inputs().items() if "mask" not in k}
    # a prompt in which something comes again
    tokens = "input_ids" if "input_ids" in inputs else "decoder_input_ids"
    inputs[tokens] = torch.cat([inputs[tokens][:, :5], inputs[tokens][:, :4]], 1)
    if kind.original.config().is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :6].clone()
    ours = Side(lowered, inputs, assistant)
    if changed:
        return ours, replace(ours, always={"use_cache": False})
    return ours, replace(ours, model=original)


def _random(kind: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind.original.model_class(kind.original.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def result(name: str, mode: Mapping[str, Any], ours: Side, theirs: Side) -> str:
    """How what a lowered model gives compares with the other side."""
    changed = bool(theirs.always)
    if name == "assistant of the original":
        # the original generates, with a lowered model that drafts
        theirs = Side(ours.assistant, ours.inputs, theirs.model)
        ours = Side(ours.assistant, ours.inputs, ours.model)
    expected, failed = attempt(mode.get("plain", mode) if changed else mode, theirs)
    actual, error = attempt(mode, ours)
    refused = isinstance(error, RerollError)
    if failed:
        how = "refused, where the other side fails" if refused else "fails as the other side"
        return f"{how if error else 'works, where the other side fails'}: {_said(failed)}"
    if error:
        return f"{'refused' if refused else 'fails'}: {_said(error)}"
    return difference(actual, expected, newest=changed) or "same"


def attempt(mode: Mapping[str, Any], side: Side) -> tuple[Any, Exception | None]:
    """What a mode gives, or the error that it raises.

    The configuration stays as it is, also where transformers fails in it.
    """
    from tests.peer.suites import quiet

    run: Callable[..., Any] = BY[mode["by"]] if "by" in mode else Side.__call__
    options = {key: value for key, value in mode.items() if key not in ("by", "plain", "pairs")}
    settings = vars(side.model.config)
    before = dict(settings)
    try:
        with quiet():
            return run(side, **options), None
    except Exception as error:
        return None, error
    finally:
        settings.clear()
        settings.update(before)


def difference(actual: Any, expected: Any, where: str = "", newest: bool = False) -> str:
    """Where two results of `generate` differ; nothing where they do not.

    With `newest`, `expected` may have entries of all tokens where `actual` has those of new ones:
    without a cache, each step returns the hidden states of the whole text.
    """
    if isinstance(expected, Tensor):
        return _tensors_differ(actual, expected, where, newest)
    if isinstance(expected, dict):
        names = [n for n in expected if n not in ("past_key_values", "encoder_outputs")]
        if missing := [n for n in names if n not in actual]:
            return f"without {', '.join(missing)}"
        parts = [(actual[n], expected[n], n) for n in names]
    elif isinstance(expected, list | tuple):
        if not isinstance(actual, list | tuple) or len(actual) != len(expected):
            count = len(actual) if isinstance(actual, list | tuple) else type(actual).__name__
            return f"{where or 'list'}: {count} for {len(expected)}"
        parts = [(a, e, where) for a, e in zip(actual, expected, strict=True)]
    else:
        return "" if actual == expected else f"{where}: {actual!r:.40} for {expected!r:.40}"
    return next((text for part in parts if (text := difference(*part, newest))), "")


def _tensors_differ(actual: Any, expected: Tensor, where: str, newest: bool) -> str:
    if newest and isinstance(actual, Tensor) and actual.dim() == expected.dim() > 2:
        expected = expected[..., -actual.shape[-2] :, :]
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        shape = list(actual.shape) if isinstance(actual, Tensor) else type(actual).__name__
        return f"{where or 'tokens'}: {shape} for {list(expected.shape)}"
    if torch.equal(actual, expected):
        return ""
    if not expected.is_floating_point():
        return f"other {where or 'tokens'}"
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return f"{where}: other infinities"
    apart, scale = (x.where(finite, 0.0).abs().max() for x in (actual - expected, expected))
    return "" if apart <= CLOSE * scale else f"{where} differ by {float(apart / scale):.2g}"


def _said(error: Exception) -> str:
    text = told(error)
    return (text.partition(": ")[2] if isinstance(error, RerollError) else text)[:200]


if __name__ == "__main__":
    main(["generation_modes", *sys.argv[1:]])
