"""Resize the vocabulary of a lowered model: its weights, Program, code and configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from reroll.bounds import COUNT, check_number
from reroll.errors import UsageError
from reroll.rewrite.ir.defaults import ordinary_token
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights.sources import ChainSource, MemorySource
from reroll.runtime.lowering.assembly import reassemble
from reroll.runtime.lowering.placement import placements
from reroll.runtime.lowering.recapture import holder_of, stored_tensors, with_own_heads
from reroll.runtime.lowering.vocabulary import Vocabulary, new_rows, resized
from reroll.runtime.models.config import resized_config

WHERE = "resize_token_embeddings"


def resize(model: Any, tokens: int | None, multiple: int | None, mean: bool) -> nn.Embedding:
    """Resize the vocabulary of a lowered model as `resize_token_embeddings` of transformers does.

    Raises UsageError, before anything has changed, where the Program cannot have another size.
    """
    table = model.get_input_embeddings()
    if tokens is None and multiple is None:
        return table  # type: ignore[no-any-return]
    old = table.weight.shape[0]
    rows = old if tokens is None else tokens
    check_number("new_num_tokens", rows, COUNT, WHERE)
    if multiple is not None:
        if not isinstance(multiple, int):
            # transformers' own error
            model._get_resized_embeddings(table, rows, multiple)
        check_number("pad_to_multiple_of", multiple, COUNT, WHERE)
        rows = -(-rows // multiple) * multiple
    if rows != old:
        base = _present(model)
        program, found = resized(base, rows)
        _check_modules(model, base, found)
        _resize_modules(model, base, found, rows, mean)
        _replace_program(model, program, found, old)
    model.config.vocab_size = model.vocab_size = rows
    return table  # type: ignore[no-any-return]


def _present(model: Any) -> Program:
    """Return the model's Program; with its present weights if a head was untied since."""
    before: Program = model.program
    program = with_own_heads(model)
    if program is before:
        return before
    table, tensors = stored_tensors(model)
    kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return replace(program, weights=table, source=MemorySource(kept))


def _held(model: Any, program: Program, name: str) -> Iterator[tuple[nn.Module, str, bool]]:
    """Yield the modules of a weight, its attribute there, and whether an adapter wraps it."""
    placement, weight = placements(program)[name], program.weights[name]
    for trip in range(len(weight.index or (0,))):
        for path in placement.at(trip).paths:
            module, adapted = holder_of(model, path)
            yield module, placement.leaf, adapted


def _check_modules(model: Any, program: Program, found: Vocabulary) -> None:
    for name in found.dims:
        for module, leaf, adapted in _held(model, program, name):
            if adapted:
                raise UsageError(
                    f"{name} has an adapter",
                    where=WHERE,
                    hint="resize before adapters are added, or merge them first",
                )
            if getattr(module, leaf).device.type == "meta":
                raise UsageError("the model's weights have no data", where=name)


def _resize_modules(model: Any, program: Program, found: Vocabulary, rows: int, mean: bool) -> None:
    """Resize the tensors in place, with the first values that transformers gives to new rows.

    Tensors that several modules share stay shared.
    """
    for name in found.tables:
        (module, leaf, _), *_ = _held(model, program, name)
        table = nn.Embedding(1, 1, device="meta")
        table.weight = _parameter(getattr(module, leaf))
        if table.weight.shape[0] != rows:
            model._get_resized_embeddings(table, rows, None, mean)
            _set(model, program, name, table.weight.detach())
    for weight, bias in found.heads:
        (module, leaf, _), *_ = _held(model, program, weight)
        head = nn.Linear(1, 1, bias=bias is not None, device="meta")
        head.weight = _parameter(getattr(module, leaf))
        if bias is not None:
            (module_of_bias, bias_leaf, _), *_ = _held(model, program, bias)
            head.bias = _parameter(getattr(module_of_bias, bias_leaf))
        if head.weight.shape[0] != rows:
            new = model._get_resized_lm_head(head, rows, mean_resizing=mean)
            _set(model, program, weight, new.weight.detach())
            if bias is not None:
                _set(model, program, bias, new.bias.detach())
    for name, dim in found.dims.items():
        module, leaf, _ = next(_held(model, program, name))
        tensor = getattr(module, leaf)
        missing = rows - tensor.shape[dim]
        if missing:
            # what is added to logits, and the bias of a head that is tied to the embeddings
            behind = [0, 0] * (tensor.dim() - 1 - dim)
            value = nn.functional.pad(tensor.detach(), [*behind, 0, missing])
            _set(model, program, name, value)
        for module, _, _ in _held(model, program, name):
            _tell(module, rows)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)


def _set(model: Any, program: Program, name: str, value: Tensor) -> None:
    for module, leaf, _ in _held(model, program, name):
        tensor = getattr(module, leaf)
        tensor.data, tensor.grad = value, None


def _tell(module: nn.Module, rows: int) -> None:
    """Update the sizes that a module's own attributes repeat."""
    if isinstance(module, nn.Linear):
        module.out_features = rows
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.weight.grad = rows, None
        if module.padding_idx is not None and module.padding_idx >= rows:
            module.padding_idx = None


def _replace_program(model: Any, program: Program, found: Vocabulary, old: int) -> None:
    """Give the model its resized Program, and the code of this Program."""
    missing, rows = new_rows(program), {}
    for name, dim in found.dims.items():
        for entry in program.weights[name].entries:
            source = next((a for a in getattr(entry, "args", ()) if _name(a) in missing), None)
            if source is not None and source.name not in rows:
                module, leaf, _ = next(_held(model, program, name))
                tensor = getattr(module, leaf).detach()
                rows[source.name] = tensor.narrow(dim, old, tensor.shape[dim] - old).cpu().clone()
    size = model.get_input_embeddings().weight.shape[0]
    origin = replace(
        program.origin,
        config=resized_config(program.origin.config, size),
        remarks=(*program.origin.remarks, f"the vocabulary was resized from {old} to {size}"),
    )
    sources = ChainSource([MemorySource(rows), program.source]) if rows else program.source
    # a draft would have the former vocabulary
    program = replace(program, origin=origin, source=sources, draft=None)
    model._assembly = reassemble(program, model._assembly.loops, model._assembly.tree, model)
    model._ordinary = ordinary_token(program)


def _name(value: Any) -> str | None:
    return getattr(value, "name", None)
