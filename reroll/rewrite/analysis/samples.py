"""Inputs to run programs on: text, token ids, and random values for all other inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, fx

from reroll.rewrite.ir.program import Program, ancestors
from reroll.rewrite.ir.records import Input
from reroll.rewrite.ir.shapes import concrete

log = logging.getLogger(__name__)

Tokenizer: TypeAlias = Callable[[str], Sequence[int]]

SEED = 0


@cache
def sample_text() -> str:
    """Return a few kilobytes of English in the public domain, the default calibration text."""
    return Path(__file__).with_name("sample.txt").read_text(encoding="utf-8")


def default_tokenizer(program: Program) -> Tokenizer | None:
    """Load the tokenizer among the side files of the original model; None if it cannot be read."""
    path = program.origin.files.get("tokenizer.json")
    if path is None or not Path(path).is_file():
        return None
    try:
        from tokenizers import Tokenizer as FastTokenizer

        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:
        log.warning("the tokenizer %s cannot be read: %s", path, error)
        return None
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def token_input(program: Program) -> Input | None:
    """Return the input for token ids of the text: the last one with role data and integer dtype."""
    inputs = [i for i in program.inputs if i.role == "data" and not i.type.dtype.is_floating_point]
    return inputs[-1] if inputs else None


def vocabulary(program: Program, name: str | None = None) -> int | None:
    """Return the size of the vocabulary: the rows of the table that an input looks up."""
    item = token_input(program)
    name = name or (item.name if item is not None else None)
    sizes = [
        program.weights[str(table.target)].meta.shape[0]
        for node in program.graph.nodes
        if node.target is torch.ops.aten.embedding.default
        for table, ids in [node.args[:2]]
        if table.op == "get_attr" and _comes_from(ids, name)
    ]
    return min(sizes, default=None)


def _comes_from(node: fx.Node, name: str | None) -> bool:
    # ids may be sliced, clamped or offset before they are looked up
    return any(n.op == "placeholder" and n.target == name for n in ancestors([node]))


def random_inputs(
    program: Program, *, rows: int = 2, length: int = 16, seed: int = SEED, padded: bool = False
) -> dict[str, Tensor]:
    """Draw random values for the inputs that have no default.

    `padded` gives a left-padded mask as well: every row but the first begins with padding.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {"b": rows, "s": length, "t": length, "e": length + 3, "l": 16 * length, "p": 1}
    inputs = {}
    for item in program.inputs:
        shape = [concrete(d, sizes) for d in item.type.shape]
        if item.role == "data" and item.type.dtype.is_floating_point:
            inputs[item.name] = torch.randn(shape, generator=generator).to(item.type.dtype)
        elif item.role == "data":
            top = vocabulary(program, item.name) or 2
            inputs[item.name] = torch.randint(0, top, shape, generator=generator)
        elif item.role == "padding" and padded and len(shape) == 2:
            lead = torch.arange(rows)[:, None] % (shape[1] // 2)
            inputs[item.name] = (torch.arange(shape[1]) >= lead).to(item.type.dtype)
    return inputs


def token_inputs(program: Program, tokens: Tensor) -> Mapping[str, Tensor]:
    """Build inputs whose token ids are `tokens` [rows, time]; other data is random."""
    item = token_input(program)
    assert item is not None
    inputs = random_inputs(program, rows=tokens.shape[0], length=tokens.shape[1])
    return {**inputs, item.name: tokens.to(item.type.dtype)}


def rows_of(
    program: Program, tokens: Tensor, length: int, least: int = 2
) -> list[Mapping[str, Tensor]]:
    """Cut tokens [time] into rows of at most `length`, each as inputs of the Program.

    A row of fewer than `least` tokens is left out.
    """
    rows = torch.split(tokens, length)
    return [token_inputs(program, row[None]) for row in rows if row.numel() >= least]
