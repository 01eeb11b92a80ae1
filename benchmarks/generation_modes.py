"""Every mode of `generate`: what a lowered model gives beside its original with the same weights.

`same` means the same tokens and, where a mode returns more, the same values of these. The file of
results says for each mode what differs, or how the lowered model refuses. A kind of
`tests/peer/kinds.py` that computes what its original computes stands beside that. Any other stands
beside itself, generating without a cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from benchmarks.harness import Table, parse_options
from reroll.errors import RerollError
from tests import tiny

COLUMNS = {"kind": "{}", "beside": "{}", "same": "{:d}", "refused": "{:d}", "other": "{:d}"}
NEW = 12
# relative difference of scores and hidden states that are called the same
CLOSE = 1e-4
# kinds that compute something else than their original
CHANGED = ("relaxed", "window", "delta", "slots", "exits open")


@dataclass
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
        return self.model.generate(**{**inputs, **wishes, **self.always, **options})

    @property
    def prompt(self) -> str:
        """The name of the tokens that new ones are put behind."""
        return "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"


class _Even(LogitsProcessor):
    """Allows tokens of even numbers alone."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


class _Pieces:
    """Collects what a streamer is given."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.pieces.append([])


Run = Callable[[Side], Any]
SAMPLE = {"do_sample": True, "temperature": 0.8, "top_k": 20}


def _calls(**options: Any) -> Run:
    return lambda side: side(**options)


def _returns(**options: Any) -> Run:
    return lambda side: side(return_dict_in_generate=True, **options)


def _weights(**options: Any) -> Run:
    def run(side: Side) -> Any:
        # the original returns weights of its own attention alone
        before = side.model.config._attn_implementation
        side.model.set_attn_implementation("eager")
        try:
            return side(return_dict_in_generate=True, output_attentions=True, **options)
        finally:
            side.model.set_attn_implementation(before)

    return run


def _padded(**options: Any) -> Run:
    def run(side: Side) -> Any:
        mask = torch.ones_like(side.inputs[side.prompt])
        mask[0, :4] = 0
        name = side.prompt.replace("input_ids", "attention_mask")
        given: dict[str, Any] = {name: mask}
        return side(**given, **options)

    return run


def _embeddings(side: Side) -> Any:
    rows = dict(side.inputs)
    ids = rows.pop("input_ids")
    rows["inputs_embeds"] = side.model.get_input_embeddings()(ids)
    return Side(side.model, rows, None, side.always)()


def _cache(side: Side) -> Any:
    cache: Any = DynamicCache(config=side.model.config)
    if side.model.config.is_encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache(config=side.model.config))
    return side(past_key_values=cache)


def _continued(side: Side) -> Any:
    first = side(return_dict_in_generate=True, max_new_tokens=4, eos_token_id=None)
    more = {side.prompt: first.sequences, "past_key_values": first.past_key_values}
    if "attention_mask" in side.inputs and side.prompt == "input_ids":
        more["attention_mask"] = torch.ones_like(first.sequences)
    return side(**more)


def _encoded(side: Side) -> Any:
    decoder = {k: v for k, v in side.inputs.items() if k.startswith("decoder_")}
    encoder = {k: v for k, v in side.inputs.items() if k not in decoder}
    outputs = side.model.get_encoder()(**encoder)
    rest = {k: v for k, v in encoder.items() if k == "attention_mask"}
    return Side(side.model, {**decoder, **rest}, None, side.always)(encoder_outputs=outputs)


def _transitions(side: Side) -> Any:
    made = side(return_dict_in_generate=True, output_scores=True, num_beams=3)
    return side.model.compute_transition_scores(
        made.sequences, made.scores, made.beam_indices, normalize_logits=True
    )


def _streamed(side: Side) -> Any:
    streamer = _Pieces()
    tokens = side(rows=1, streamer=streamer)
    return tokens, streamer.pieces


def _assisted(**options: Any) -> Run:
    return lambda side: side(rows=1, assistant_model=side.assistant, **options)


GREEDY = _calls()
ONE_ROW = _calls(rows=1)


@dataclass(frozen=True)
class Mode:
    """A way to call `generate`, and one that is to give the same on the other side."""

    run: Run
    # what a kind that changes its original is compared with: the same call without a cache, or this
    plain: Run | None = None
    pairs: bool | None = None


MODES: dict[str, Mode] = {
    "greedy": Mode(GREEDY),
    "no cache": Mode(_calls(use_cache=False), GREEDY),
    "sampling": Mode(_calls(**SAMPLE)),
    "sampling, top p, min p, typical p": Mode(
        _calls(do_sample=True, top_p=0.9, min_p=0.001, typical_p=0.9, epsilon_cutoff=1e-4)
    ),
    "sampling, 3 sequences": Mode(_calls(num_return_sequences=3, **SAMPLE)),
    "beams": Mode(_calls(num_beams=3)),
    "beams, 3 sequences": Mode(
        _calls(num_beams=4, num_return_sequences=3, length_penalty=0.5, early_stopping=True)
    ),
    "beam sampling": Mode(_calls(num_beams=3, **SAMPLE)),
    "left padding": Mode(_padded()),
    "left padding, sampling": Mode(_padded(**SAMPLE)),
    "left padding, beams": Mode(_padded(num_beams=3)),
    "a dynamic cache that is given": Mode(_cache, GREEDY),
    "dynamic cache": Mode(_calls(cache_implementation="dynamic"), GREEDY),
    "static cache": Mode(_calls(cache_implementation="static"), GREEDY),
    "static cache, left padding": Mode(_padded(cache_implementation="static"), _padded()),
    "static cache, beams": Mode(
        _calls(cache_implementation="static", num_beams=3), _calls(num_beams=3)
    ),
    "offloaded cache": Mode(_calls(cache_implementation="offloaded"), GREEDY),
    "quantised cache": Mode(
        _calls(cache_implementation="quantized", cache_config={"backend": "fp8"})
    ),
    "continued from its cache": Mode(_continued),
    "chunked prefill": Mode(_calls(prefill_chunk_size=4), GREEDY),
    "chunked prefill, left padding": Mode(_padded(prefill_chunk_size=4), _padded()),
    "prompt lookup": Mode(_calls(rows=1, prompt_lookup_num_tokens=3), ONE_ROW),
    "prompt lookup, sampling": Mode(_calls(rows=1, prompt_lookup_num_tokens=3, **SAMPLE)),
    "assisted by the original": Mode(_assisted(), ONE_ROW),
    "assisted by the original, sampling": Mode(_assisted(**SAMPLE)),
    "assistant of the original": Mode(_assisted(), ONE_ROW),
    "assisted by its own first layer": Mode(_calls(rows=1, assistant_early_exit=1), ONE_ROW),
    "return_dict_in_generate": Mode(_returns()),
    "scores": Mode(_returns(output_scores=True)),
    "scores of beams": Mode(_returns(output_scores=True, num_beams=3)),
    "transition scores": Mode(_transitions),
    "logits": Mode(_returns(output_logits=True)),
    "hidden states": Mode(_returns(output_hidden_states=True)),
    "hidden states of beams": Mode(_returns(output_hidden_states=True, num_beams=3)),
    "hidden states, assisted": Mode(
        lambda side: side(
            rows=1, assistant_model=side.assistant, output_hidden_states=True,
            return_dict_in_generate=True,
        )
    ),
    "attentions": Mode(_weights()),
    "attentions of beams": Mode(_weights(num_beams=3)),
    "attentions, assisted": Mode(
        lambda side: _weights(rows=1, assistant_model=side.assistant)(side)
    ),
    "penalties": Mode(_calls(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=6)),
    "tokens that are kept out": Mode(
        _calls(bad_words_ids=[[5], [7, 9]], suppress_tokens=[11, 12], begin_suppress_tokens=[13])
    ),
    "tokens that are favoured": Mode(
        _calls(
            sequence_bias=[[[20], 2.0]],
            forced_eos_token_id=1,
            exponential_decay_length_penalty=(4, 1.1),
        )
    ),
    "classifier-free guidance": Mode(_calls(guidance_scale=1.5)),
    "a watermark": Mode(
        _calls(watermarking_config=transformers.WatermarkingConfig(bias=2.0))
    ),
    "a logits processor": Mode(_calls(logits_processor=LogitsProcessorList([_Even()]))),
    "allowed tokens": Mode(
        _calls(prefix_allowed_tokens_fn=lambda row, ids: list(range(10, 40)))
    ),
    "a stopping criterion": Mode(
        _calls(stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(14)]))
    ),
    "stop strings": Mode(
        lambda side: side(stop_strings=["e", "an"], tokenizer=tiny.tokenizer())
    ),
    "a time limit": Mode(_calls(max_time=60.0)),
    "a streamer": Mode(_streamed),
    "input embeddings": Mode(_embeddings, pairs=False),
    "input embeddings of an encoder": Mode(_embeddings, pairs=True),
    "encoder outputs": Mode(_encoded, pairs=True),
}  # fmt: skip


def main() -> None:
    """Add a row for each kind."""
    from tests.peer.kinds import KINDS

    options = parse_options(__doc__, "kinds*")
    transformers.logging.set_verbosity_error()
    table = Table(options, COLUMNS)
    for case in table.missing({"kind": kind} for kind in options.kinds or KINDS):
        ours, theirs = sides_of(case["kind"], KINDS[case["kind"]])
        pair = ours.model.config.is_encoder_decoder
        results = {
            name: result(name, mode, ours, theirs)
            for name, mode in MODES.items()
            if mode.pairs in (None, pair)
        }
        kinds = Counter(text.partition(":")[0].partition(",")[0] for text in results.values())
        counted = {name: kinds[name] for name in ("same", "refused")}
        beside = "itself without a cache" if theirs.always else "its original"
        counted["other"] = len(results) - sum(counted.values())
        table.add(case | {"beside": beside} | counted | {"results": results})


def sides_of(name: str, kind: Any) -> tuple[Side, Side]:
    """The lowered model of a kind, and what it stands beside."""
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
    if name in CHANGED:
        return ours, Side(lowered, inputs, assistant, {"use_cache": False})
    return ours, Side(original, inputs, assistant)


def _random(kind: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind.original.model_class(kind.original.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def result(name: str, mode: Mode, ours: Side, theirs: Side) -> str:
    """How what a lowered model gives compares with the other side."""
    changed = bool(theirs.always)
    run = mode.run
    if name == "assistant of the original":
        # the original generates, with a lowered model that drafts
        ours = Side(ours.assistant, ours.inputs, ours.model)
        theirs = Side(ours.model, ours.inputs, theirs.model if not changed else ours.model)
    try:
        expected = _of((mode.plain or run) if changed else run, theirs)
    except Exception as error:
        try:
            _of(run, ours)
        except RerollError:
            return f"refused, where the other side fails: {_line(error)}"
        except Exception:
            return f"fails as the other side: {_line(error)}"
        return f"works, where the other side fails: {_line(error)}"
    try:
        actual = _of(run, ours)
    except RerollError as error:
        return f"refused: {_line(error)}"
    except Exception as error:
        return f"fails: {_line(error)}"
    return difference(actual, expected, newest=changed) or "same"


def _of(run: Run, side: Side) -> Any:
    """What a mode gives; the configuration stays as it is, also where transformers fails in it."""
    from tests.peer.suites import quiet

    settings = vars(side.model.config)
    before = dict(settings)
    try:
        with quiet():
            return run(side)
    finally:
        settings.clear()
        settings.update(before)


def difference(actual: Any, expected: Any, where: str = "", newest: bool = False) -> str:
    """Where two results of `generate` differ; nothing where they do not.

    With `newest`, `expected` may have entries of all tokens where `actual` has those of new ones:
    without a cache, each step returns the hidden states of the whole text.
    """
    if isinstance(expected, dict):
        names = [n for n in expected if n not in ("past_key_values", "encoder_outputs")]
        missing = [n for n in names if n not in actual]
        if missing:
            return f"without {', '.join(missing)}"
        found = (difference(actual[n], expected[n], n, newest) for n in names)
        return next((text for text in found if text), "")
    if isinstance(expected, list | tuple):
        if not isinstance(actual, list | tuple) or len(actual) != len(expected):
            count = len(actual) if isinstance(actual, list | tuple) else type(actual).__name__
            return f"{where or 'list'}: {count} for {len(expected)}"
        pairs = zip(actual, expected, strict=True)
        found = (difference(a, e, where, newest) for a, e in pairs)
        return next((text for text in found if text), "")
    if not isinstance(expected, Tensor):
        return "" if actual == expected else f"{where}: {actual!r:.40} for {expected!r:.40}"
    if newest and isinstance(actual, Tensor) and actual.dim() == expected.dim() > 2:
        expected = expected[..., -actual.shape[-2] :, :]
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        shape = list(actual.shape) if isinstance(actual, Tensor) else type(actual).__name__
        return f"{where or 'tokens'}: {shape} for {list(expected.shape)}"
    if not expected.is_floating_point():
        return "" if torch.equal(actual, expected) else f"other {where or 'tokens'}"
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return f"{where}: other infinities"
    apart = (actual - expected)[finite].abs().max() if finite.any() else torch.zeros(())
    scale = expected[finite].abs().max() if finite.any() else torch.ones(())
    return "" if apart <= CLOSE * scale else f"{where} differ by {float(apart / scale):.2g}"


def _line(error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    text = first[0] if isinstance(error, RerollError) else f"{type(error).__name__}: {first[0]}"
    return text[:200]


if __name__ == "__main__":
    main()
