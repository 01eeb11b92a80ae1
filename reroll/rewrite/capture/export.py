"""Capture a transformers model as one flat graph with the same logits, bit for bit.

`torch.export` in non-strict mode runs the model's own Python once, on tensors without data.
Attention, masks and caches become single nodes (see `tracing`). A model that generates is captured
with a past of unknown length, so the same graph prefills, continues and decodes.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reroll.errors import CaptureError, RerollError
from reroll.rewrite.capture import clean
from reroll.rewrite.capture.branches import BranchError, check_branches
from reroll.rewrite.capture.entries import (
    asks,
    computes_with_weights,
    entries_of,
    take_marks,
)
from reroll.rewrite.capture.functional import functionalise, mutates
from reroll.rewrite.capture.half_precision import (
    keeps_parameters,
    trace,
    with_dtypes_of,
    without_data,
)
from reroll.rewrite.capture.left_out import TracedGraph, with_defaults
from reroll.rewrite.capture.losses import loss_of
from reroll.rewrite.capture.models import describe, open_model
from reroll.rewrite.capture.omissions import omissions, percepts
from reroll.rewrite.capture.pictures import same_text, text_part
from reroll.rewrite.capture.rotary import frequencies_by_position
from reroll.rewrite.capture.signature import (
    Example,
    cache_argument,
    can_generate,
    default_examples,
    examples_from,
    frames_mask,
    has_state,
    picture_examples,
)
from reroll.rewrite.capture.tracing import (
    IMPLEMENTATION,
    Halt,
    Halted,
    Traced,
    custom_layers,
    make_cache,
    tracing,
)
from reroll.rewrite.checkpoint import ChainSource, MemorySource, TensorSource
from reroll.rewrite.ir.dtypes import DTYPES, HALVES, dtype_of, retype, retype_graphs, without_casts
from reroll.rewrite.ir.hidden import STATES, WEIGHTS, count, drop_marks
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Program, copy
from reroll.rewrite.ir.records import NO_CACHE, Input, Origin, TensorType
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.ir.weights import Meta, Source, Weight, WeightTable

log = logging.getLogger(__name__)

# asked of a model in a trace, and given up from the last on where the trace with them fails
WISHES = ("output_hidden_states", "output_attentions")


def capture(
    model: Any,
    *,
    dtype: torch.dtype | str | None = None,
    roll: bool = True,
    inputs: Mapping[str, Tensor] | None = None,
    pictures: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a model exactly, and roll its layers into loops.

    `model` is a transformers model, a hub id, a local directory or a `.gguf` file. For the last
    three no weight is loaded: the graph comes from the configuration, and the Program's weights
    refer to the checkpoint's tensors. `dtype` is the dtype to compute in: the checkpoint's own if
    None. It cannot be chosen for a model object; a Program that reroll saved is converted to it.
    A model that was lowered from a Program gives that Program, with the model's present weights.
    `inputs` are example tensors for a model whose inputs are unusual. `pictures` captures the
    pictures of a vision-language model as well, as an input that may be left out. `roll=False`
    stops at the flat graph.

    Raises CaptureError when the model does something that the graph cannot express. A given model
    object is restored in any case.
    """
    if isinstance(model, nn.Module):
        if dtype is not None:
            raise CaptureError(
                "dtype cannot be chosen for a model object", hint="convert it: model.to(dtype)"
            )
        if (to_program := getattr(model, "to_program", None)) is not None:
            # lowered from a Program
            return cast(Program, to_program())
        captured = _captured(model, inputs, pictures, halves=roll)
    else:
        dtype = dtype_of(dtype)
        opened = open_model(
            str(model), dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        if isinstance(opened, Program):
            return retype(opened, dtype)
        captured = _captured(
            opened.model, inputs, pictures, opened.source, opened.origin, halves=roll
        )
    for remark in captured.program.origin.remarks:
        log.warning("%s: %s", captured.program.origin.architecture, remark)
    return _with_halves(captured) if roll else captured.program


def rolled(program: Program) -> Program:
    """Raise the idioms of a flat Program and roll its layers into loops."""
    from reroll.rewrite.capture.raising.driver import raise_idioms
    from reroll.rewrite.capture.rolling.roll import roll_loops

    return roll_loops(raise_idioms(program))


def _captured(
    model: Any,
    inputs: Mapping[str, Tensor] | None,
    pictures: bool,
    source: TensorSource | None = None,
    origin: Origin | None = None,
    halves: bool = False,
) -> _Captured:
    captured = _capture(model, inputs, source, origin, halves=halves and not pictures)
    if not pictures:
        return captured
    return _Captured(_with_pictures(model, captured.program, source, origin), None, ())


def capture_module(
    model: Any,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    source: TensorSource | None = None,
    origin: Origin | None = None,
) -> Program:
    """Capture a model object, whose weights may be on the meta device, as a flat Program.

    `source` holds the tensors of the model's parameters (the model itself if None).
    """
    return _capture(model, inputs, source, origin).program


@dataclass(frozen=True)
class _Captured:
    """Flat Program, its form in half precision, and the half-precision dtypes it is valid for."""

    program: Program
    in_half: Program | None
    halves: tuple[torch.dtype, ...]


def _with_halves(captured: _Captured) -> Program:
    """Roll a captured Program, and add the conversions that it needs in half precision.

    The conversions are left out where raising and rolling in half precision gives other ops or
    loses hidden states.
    """
    program = rolled(captured.program)
    if captured.in_half is None:
        return replace(program, halves=captured.halves)
    try:
        wide = retype_graphs(rolled(captured.in_half), program.dtype)
        wide = replace(wide, inputs=program.inputs)
    except RerollError as error:
        log.info("not known in half precision: %s", error)
        return program
    if not same(without_casts(program), without_casts(wide)):
        log.info("not known in half precision: other idioms are raised there")
        return program
    if _counts(program, STATES) != _counts(wide, STATES):
        # hidden states are preferred to conversions
        log.info("not known in half precision: rolling it loses hidden states")
        return program
    if _counts(program, WEIGHTS) != _counts(wide, WEIGHTS):
        # and conversions to attention weights
        log.info("rolling it in half precision loses attention weights")
        drop_marks(wide, WEIGHTS)
    return replace(wide, origin=program.origin, halves=captured.halves)


def _counts(program: Program, among: tuple[str, ...]) -> list[int]:
    return [count(graph, among) for _, graph in program.graphs()]


def _capture(
    model: Any,
    inputs: Mapping[str, Tensor] | None = None,
    source: TensorSource | None = None,
    origin: Origin | None = None,
    halves: bool = False,
) -> _Captured:
    stateful = inputs is None and has_state(model)
    first: RerollError | None = None
    uncached: RerollError | None = None
    own_attention = False
    # in order of preference: one attention op before the model's own, with a cache before without,
    # and an encoder with its positions and token types before one without
    caches = (True, False) if stateful else (False,)
    if stateful and _is_recurrent(model):
        # without a cache, a recurrence is a loop over time steps, which takes minutes to trace
        caches = (True,)
    optional = (True, False) if inputs is None and not stateful else (True,)
    for implementation, with_state, whole in product((IMPLEMENTATION, "eager"), caches, optional):
        if implementation == IMPLEMENTATION and own_attention:
            continue
        try:
            examples = (
                default_examples(model, with_state) if inputs is None else examples_from(inputs)
            )
            kept = [e for e in examples if whole or e.role in ("data", "padding")]
            if not whole and len(kept) == len(examples):
                continue
            wishes = tuple(wish for wish in WISHES if asks(model, wish))
            exported, traced = _export(model, kept, with_state, implementation, wishes=wishes)
            kept = _with_roles(kept, traced)
            check_branches(exported, kept, getattr(model, "config", None))
            with_casts = _to_program(model, exported, kept, source, origin)
            program = _without_casts(with_casts)
        except RerollError as error:
            log.info("not captured with %s, cache=%s: %s", implementation, with_state, error)
            first = first or error
            uncached = uncached or (error if with_state else None)
            continue
        if implementation == IMPLEMENTATION and not _has(program.graph, "attention"):
            log.info("%s calls no attention function of transformers", type(model).__name__)
            own_attention = True
            continue
        program = _with_defaults(model, program, kept, with_state, implementation, source)
        program = _with_loss(model, program, kept)
        if with_state:
            program = _with_cache_span(model, program, traced)
        if stateful and not with_state:
            assert uncached is not None
            program = _without_cache(program, uncached)
        tracer = _Tracer(model, kept, with_state, implementation, traced.wishes)
        program = replace(program, origin=replace(program.origin, unread=tracer.unread()))
        if not halves:
            return _Captured(program, None, ())
        return _Captured(program, *tracer.halves_of(with_casts))
    name = type(model).__name__
    if first is not None and _is_recurrent(model):
        raise CaptureError(
            f"the model is recurrent already, and its recurrence is not captured: {first.message}",
            where=name,
            hint="captured are recurrences that it computes by the functions of transformers that "
            "docs/hybrids.md lists; a loop over tokens in the model's own code is none of them",
        ) from first
    raise first or CaptureError("no attention was found", where=name)


def _is_recurrent(model: Any) -> bool:
    return bool(getattr(model, "_is_stateful", False))


def _with_pictures(
    model: Any, text: Program, source: TensorSource | None, origin: Origin | None
) -> Program:
    """Capture the flat Program that also reads pictures, any number or one.

    Raises CaptureError unless its part for text alone equals `text`, the Program without pictures.
    """
    first: RerollError | None = None
    try:
        for pictures in picture_examples(model):
            try:
                program = _seeing(model, pictures, source, origin)
            except RerollError as error:
                first = first or error
                continue
            part = text_part(program.graph, [pictures.name], program.outputs)
            if not same_text(part, text.graph):
                raise CaptureError("its graph for text alone differs when it also takes pictures")
            loss, span = text.origin.loss, text.origin.cache_span
            origin = replace(program.origin, loss=loss, cache_span=span)
            return replace(program, inputs=(*text.inputs, program.inputs[-1]), origin=origin)
        assert first is not None
        raise first
    except RerollError as error:
        others = [name for name in percepts(model) if name != "pixel_values"]
        beside = f" (beside pixel_values it takes {', '.join(others)})" if others else ""
        raise CaptureError(
            f"its pictures cannot be captured{beside}: {error.message}",
            where=error.where or type(model).__name__,
            hint="its language part can: leave the pictures out",
        ) from error


def _seeing(
    model: Any, pictures: Example, source: TensorSource | None, origin: Origin | None
) -> Program:
    examples = [*default_examples(model, True), pictures]
    # the number of image tokens is checked when they are filled, not in the trace
    with mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"):
        exported, traced = _export(model, examples, True, IMPLEMENTATION)
    examples = _with_roles(examples, traced)
    check_branches(exported, examples, model.config)
    program = _without_casts(_to_program(model, exported, examples, source, origin))
    origin = replace(program.origin, auto_class="AutoModelForImageTextToText")
    return replace(program, origin=origin)


def _without_casts(program: Program) -> Program:
    """Copy a flat Program without conversions of tensors to the dtype that they already have."""
    graph = copy(program.graph)
    clean.drop_casts(graph)
    return replace(program, graph=graph)


def _without_cache(program: Program, reason: RerollError) -> Program:
    """Add a remark that the model was captured without a cache, and the reason."""
    remarks = [
        f"{NO_CACHE}: all tokens are read again for each new one, because the capture with a "
        f"cache failed: {reason.message}"
    ]
    span = program.origin.cache_span
    if isinstance(reason, BranchError):
        remarks.append(
            "with a cache, the model computes something else: generate takes use_cache=False only"
        )
        span = 0
    remarks = [*program.origin.remarks, *remarks]
    origin = replace(program.origin, remarks=tuple(remarks), cache_span=span)
    return replace(program, origin=origin)


class _Wrapper(nn.Module):
    """Module that calls the model by keyword, with a tracing cache if it is stateful.

    Its outputs are the model's outputs that are tensors, and the entries of those that the wishes
    name, such as `output_hidden_states`.
    """

    def __init__(
        self,
        model: Any,
        stateful: bool,
        halt: Halt | None,
        at_cache: bool,
        wishes: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.model = model
        self.stateful = stateful
        self.halt, self.at_cache = halt, at_cache
        self.wishes = wishes
        self.custom_layers = custom_layers(model.config) if stateful else []

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        keywords: dict[str, Any] = dict(inputs, return_dict=True)
        if self.stateful:
            cross = bool(getattr(self.model.config, "is_encoder_decoder", False))
            main = inputs.get("decoder_input_ids", inputs.get("input_ids"))
            assert main is not None
            tokens = main.shape[1]
            # without a mask, there is no past
            mask = inputs.get("decoder_attention_mask" if cross else "attention_mask", main)
            total = mask.shape[1]
            layers = 2 + max(
                int(getattr(self.model.config.get_text_config(), name, None) or 0)
                for name in ("num_hidden_layers", "decoder_layers", "num_layers")
            )
            halt = self.halt if self.at_cache else None
            cache = make_cache(total - tokens, total, layers, cross, self.custom_layers, halt)
            name = cache_argument(self.model)
            assert name is not None
            keywords.update({name: cache, "use_cache": True})
        elif "use_cache" in _parameters(self.model):
            keywords["use_cache"] = False
        keywords.update(dict.fromkeys(self.wishes, True))
        depth = len(_module_stack())
        try:
            out = self.model(**keywords)
        except Halted as halted:
            # the tracer does not pop its module stack on exceptions
            while len(_module_stack()) > depth:
                _module_stack().popitem()
            return halted.tensors
        outputs = {name: value for name, value in out.items() if isinstance(value, Tensor)}
        return {**outputs, **entries_of(out)} if self.wishes else outputs


def _module_stack() -> dict[str, Any]:
    """Return the tracer's stack of modules whose forward is running."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return getattr(getattr(get_proxy_mode(), "tracer", None), "module_stack", {})


@dataclass(frozen=True)
class _Tracer:
    """Settings of a capture, for a second trace in half precision."""

    model: Any
    examples: list[Example]
    stateful: bool
    implementation: str
    wishes: tuple[str, ...]

    def halves_of(self, program: Program) -> tuple[Program | None, tuple[torch.dtype, ...]]:
        """Return an fp32 Program as it is in half precision, and the half dtypes it is valid for.

        fp16 is tried first, because a trace in fp16 is valid for bf16 too. The Program is None if
        the given one is not in fp32, or if no trace succeeds.
        """
        if program.dtype not in DTYPES.values():
            return None, ()
        if program.dtype == torch.float16:
            return None, HALVES
        in_bf16 = program.dtype == torch.bfloat16
        for half in (torch.float16,) if in_bf16 else (torch.float16, torch.bfloat16):
            in_half = self.in_half(program, half)
            if isinstance(in_half, Program):
                halves = HALVES if half == torch.float16 else (half,)
                return (None if in_bf16 else in_half), halves
            log.info("not known in %s: %s", half, in_half.reason)
        return None, ((torch.bfloat16,) if in_bf16 else ())

    def in_half(self, program: Program, half: torch.dtype) -> Program | Miss:
        """Return a flat Program with its half-precision conversions, or a Miss with the reason."""
        if keeps_parameters(self.model, half):
            return Miss("parameters are kept in fp32")
        try:
            traced = self.trace(half, self.examples)
        # the model's code may fail in half precision with any exception
        except Exception as error:
            return Miss(f"{type(error).__name__}: {error}")
        functionalise(traced)
        if mutates(traced):
            return Miss("it changes tensors in place, so the trace in half precision has other ops")
        return with_dtypes_of(program, traced, half)

    def unread(self) -> tuple[str, ...]:
        """Return the mask of a recording's frames, if the model takes one and does not read it."""
        names = [e.name for e in self.examples]
        mask = frames_mask(self.model, self.examples)
        if mask is None:
            return ()
        try:
            traced = self.trace(self.model.dtype, [*self.examples, mask])
        # it may be of another size than the one tried
        except Exception as error:
            log.info("not known whether %s is read: %s", mask.name, error)
            return ()
        placeholder = list(traced.find_nodes(op="placeholder"))[len(names)]
        return () if placeholder.users else (mask.name,)

    def trace(self, dtype: torch.dtype, examples: list[Example]) -> fx.Graph:
        """Trace the model on these inputs in a dtype, without data."""
        wrapper = _Wrapper(self.model, self.stateful, None, False, self.wishes)
        with (
            without_data(self.model, dtype),
            torch.no_grad(),
            _quiet(),
            frequencies_by_position(self.model),
            tracing(self.model, self.implementation),
        ):
            return trace(wrapper, _example_tensors(self.model, examples))


def _parameters(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


def _export(
    model: Any,
    examples: list[Example],
    stateful: bool,
    implementation: str,
    halt: Halt | None = None,
    wishes: tuple[str, ...] = (),
) -> tuple[torch.export.ExportedProgram, Traced]:
    """Export a model; with `halt`, the trace ends at an attention op.

    Where the model has an attention implementation of its own, `halt` counts updates of the cache
    instead. The outputs include the entries that `wishes` name; the last wishes are given up where
    the export with them fails. Raises CaptureError if the export fails.
    """
    tensors = _example_tensors(model, examples)
    auto = torch.export.Dim.AUTO
    shapes = {
        e.name: {i: auto for i, dim in enumerate(e.dims) if isinstance(dim, str)} for e in examples
    }
    modified = implementation != IMPLEMENTATION

    def export(wishes: tuple[str, ...]) -> tuple[torch.export.ExportedProgram, Traced]:
        with (
            torch.no_grad(),
            _quiet(),
            _on_cpu(model),
            frequencies_by_position(model),
            tracing(model, implementation, None if modified else halt) as traced,
        ):
            exported = torch.export.export(
                _Wrapper(model, stateful, halt, modified, wishes),
                (tensors,),
                dynamic_shapes=(shapes,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        if computes_with_weights(exported.graph):
            raise ValueError("it computes with attention weights")
        traced.wishes = wishes
        return exported, traced

    try:
        while True:
            try:
                return export(wishes)
            except RerollError:
                raise
            except Exception as error:
                if not wishes:
                    raise
                log.info("%s: not exported with %s: %s", type(model).__name__, wishes[-1], error)
                wishes = wishes[:-1]
    except RerollError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise CaptureError(
            f"torch.export failed: {type(error).__name__}: {reason}", where=type(model).__name__
        ) from error


def _with_roles(examples: list[Example], traced: Traced) -> list[Example]:
    """Give positions the role "offsets" where the model's masks do not use them.

    Such positions cannot separate the documents of a packed row.
    """
    return [
        replace(e, role="offsets") if e.role == "positions" and not traced.packs else e
        for e in examples
    ]


def _example_tensors(model: Any, examples: list[Example]) -> dict[str, Tensor]:
    """Return the example tensors on the CPU, floating ones in the model's dtype."""
    dtype = getattr(model, "dtype", torch.float32)
    return {
        e.name: e.tensor.to("cpu", dtype if e.tensor.is_floating_point() else None)
        for e in examples
    }


@contextmanager
def _on_cpu(model: nn.Module) -> Iterator[None]:
    """Replace parameters and buffers by CPU tensors during the export, whatever their device.

    A model creates constants on the device of its tensors and chooses kernels by it, so the graph
    would depend on the device. Parameters may be on the meta device, or larger than the memory.
    They become fake tensors, because the export needs only their shapes.
    """
    stand_ins: dict[int, Tensor] = {}
    tables: list[tuple[Any, dict[str, Any]]] = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            if table:
                tables.append((table, dict(table)))
    try:
        for table, before in tables:
            for name, tensor in before.items():
                if tensor is not None:
                    # one replacement for each tensor, so that tied ones stay tied
                    table[name] = stand_ins.setdefault(id(tensor), _stand_in(tensor))
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)


def _stand_in(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter) and tensor.device.type != "meta":
        return tensor.to("cpu")
    with FakeTensorMode():
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings that models and the exporter print during a trace."""
    import warnings

    loggers = [logging.getLogger(name) for name in ("transformers", "torch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # a failed trace prints its whole graph
        silent = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(silent), redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _to_program(
    model: Any,
    exported: torch.export.ExportedProgram,
    examples: list[Example],
    source: TensorSource | None,
    origin: Origin | None,
) -> Program:
    weights, literals = _weight_table(model, exported, source)
    aliases = _aliases(model, literals)
    flat = clean.flatten(exported, {e.name: e.dims for e in examples}, aliases)
    inputs = tuple(
        Input(e.name, TensorType(flat.dtypes[e.name], flat.shapes[e.name]), e.role)
        for e in examples
    )
    for example, item in zip(examples, inputs, strict=True):
        fixed = [d for d, n in zip(example.dims, item.type.shape, strict=True) if d != n]
        if any(isinstance(d, str) for d in fixed):
            raise CaptureError(
                f"the model fixes the {'batch' if 'b' in fixed else 'length'} of {example.name} "
                f"to {list(item.type.shape)}",
                where=type(model).__name__,
            )
    outputs = take_marks(flat.graph, flat.outputs)
    sources = [MemorySource(literals)] + ([source] if source is not None else [])
    used = {str(n.target) for n in flat.graph.nodes if n.op == "get_attr"}
    if unknown := sorted(used - weights.keys()):
        raise CaptureError(f"the constant {unknown[0]} is of complex numbers")
    read = used | {name for name, target in aliases.items() if target in used}
    origin = origin or describe(model)
    if origin.auto_class == "AutoModel":
        origin = replace(origin, auto_class=_generative_class(model, inputs, flat.outputs))
    remarks = (*origin.remarks, *omissions(model, [i.name for i in inputs], read))
    return Program(
        graph=flat.graph,
        bodies={},
        weights=WeightTable({name: w for name, w in weights.items() if name in used}),
        source=ChainSource(sources),
        inputs=inputs,
        outputs=outputs,
        dtype=getattr(model, "dtype", torch.float32),
        origin=replace(origin, remarks=remarks),
    )


def _generative_class(model: Any, inputs: tuple[Input, ...], outputs: tuple[str, ...]) -> str:
    """Return the auto class of a model that no table lists, judged by its inputs and outputs."""
    if "logits" not in outputs or not can_generate(model):
        return "AutoModel"
    match [i.name for i in inputs if i.role == "data"]:
        case ["input_ids"]:
            return "AutoModelForCausalLM"
        case ["input_ids", "decoder_input_ids"]:
            return "AutoModelForSeq2SeqLM"
        case ["input_features" | "input_values", "decoder_input_ids"]:
            return "AutoModelForSpeechSeq2Seq"
    return "AutoModel"


def _with_cache_span(model: Any, program: Program, traced: Traced) -> Program:
    """Record the length up to which the original's cache holds all keys that its masks admit.

    The configuration alone sets the window of a transformers cache, even if the model's masks have
    no such window.
    """
    layers = custom_layers(model.config)
    windows = {int(w) for layer in layers if (w := getattr(layer, "sliding_window", None))}
    if not traced.spans or not (shorter := windows - traced.spans):
        return program
    span = min(shorter)
    remark = f"the original's cache keeps {span} tokens, though its attention sees all of them"
    remarks = (*program.origin.remarks, remark)
    return replace(program, origin=replace(program.origin, cache_span=span, remarks=remarks))


def _with_loss(model: Any, program: Program, examples: list[Example]) -> Program:
    """Record which loss the model computes from labels."""
    if "logits" not in program.outputs:
        return program
    with _quiet():
        # the padding mask of an example includes a past, which this call does not have
        required = [each for each in examples if each.role == "data"]
        loss = loss_of(model, _example_tensors(model, required))
    return replace(program, origin=replace(program.origin, loss=loss))


def _with_defaults(
    model: Any,
    program: Program,
    examples: list[Example],
    stateful: bool,
    implementation: str,
    source: TensorSource | None,
) -> Program:
    """Add the defaults that the model computes for inputs that are left out."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def trace(kept: Sequence[Example], halt: Halt | None) -> TracedGraph:
        exported, _ = _export(model, list(kept), stateful, implementation, halt)
        _, literals = _weight_table(model, exported, source)
        dims = {e.name: e.dims for e in kept}
        flat = clean.flatten(exported, dims, _aliases(model, literals))
        clean.drop_casts(flat.graph)
        constants = {n: t for n, t in literals.items() if n not in parameters}
        return TracedGraph(flat.graph, flat.outputs, constants)

    buffers = dict(model.named_buffers(remove_duplicate=False))
    return with_defaults(program, examples, stateful, buffers, trace)


def _weight_table(
    model: nn.Module, exported: torch.export.ExportedProgram, source: TensorSource | None
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Return the weights by their names in the graph, and the tensors that no checkpoint holds."""
    weights: dict[str, Weight] = {}
    literals: dict[str, Tensor] = {}
    known = set(source.names()) if source is not None else set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        weights[name] = Weight((Source(name, Meta(tuple(parameter.shape), parameter.dtype)),))
        if source is None:
            literals[name] = parameter.detach()
    others: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    for name, constant in exported.constants.items():
        if isinstance(constant, Tensor):
            others.setdefault(name.removeprefix("model."), constant)
    for name, tensor in others.items():
        if name not in known:
            if source is not None and tensor.device.type == "meta":
                raise CaptureError(
                    f"the constant {name} has no value outside the checkpoint",
                    hint="the model computes it from its weights when it is made: load the model "
                    "with from_pretrained, and capture that object",
                )
            literals[name] = tensor.detach()
        # an unread part of the model may have complex constants
        if tensor.dtype.is_complex:
            continue
        meta = Meta(tuple(tensor.shape), tensor.dtype)
        weights.setdefault(name, Weight((Source(name, meta),), trainable=False))
    return weights, literals


def _aliases(model: nn.Module, literals: dict[str, Tensor]) -> dict[str, str]:
    """Map further names of a tensor to its first: for tied parameters and equal constants."""
    first: dict[Any, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        storage = id(parameter) if parameter.device.type == "meta" else parameter.data_ptr()
        key = (storage, parameter.shape, parameter.stride())
        aliases[name] = first.setdefault(key if parameter.numel() else name, name)
    constants = [(n, t) for n, t in literals.items() if n not in aliases and t.numel() < 2**20]
    for name, tensor in constants:
        if tensor.device.type == "meta":
            continue
        content = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        aliases[name] = first.setdefault((tensor.dtype, tensor.shape, content), name)
    return {name: target for name, target in aliases.items() if name != target}


def _has(graph: fx.Graph, op: str) -> bool:
    return any(n.op == "call_function" and f"reroll.{op}" in str(n.target) for n in graph.nodes)
