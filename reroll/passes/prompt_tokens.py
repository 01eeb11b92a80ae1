"""Prompt tokens: trained embeddings behind the last token, which predict further ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from reroll.bounds import COUNT
from reroll.errors import PassError
from reroll.rewrite.analysis.samples import token_input
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.drafting import PROMPT_TOKENS, PROMPT_WEIGHT
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Input
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.ir.weights import Expr, Weight, copy, scale, slice_
from reroll.rewrite.pipeline.base import Context, Pass, option

aten = torch.ops.aten


class PromptTokens(Pass):
    """Add embeddings of `count` prompt tokens, which are read behind a text to predict ahead.

    Parallel prompt decoding (Chen et al., arXiv 2405.18628): the logits at the i-th prompt token
    behind the last token of a text predict the token that comes i places after the next one. So one
    call of the model verifies tokens and proposes others. The embeddings are the only weights that
    are trained, by recovery's stage `prompt_tokens`; until then they are those of some tokens.

    They are part of the Program, since it carries its weights. The new input `prompt_tokens`
    [batch, time] is i at the i-th prompt token and 0 at others; left out, it is 0, and the model
    computes what it did.
    """

    name = "prompt_tokens"
    contract = "exact"

    count: int = option(3, within=COUNT, help="how many tokens are predicted beyond the next one")

    def run(self, program: Program, context: Context) -> Program:
        if any(item.name == PROMPT_TOKENS for item in program.inputs):
            raise PassError("the model has prompt tokens already")
        tokens = token_input(program)
        lookup = None if tokens is None else _lookup(program.graph, tokens)
        data = [item for item in program.inputs if item.role == "data"]
        if tokens is None or lookup is None or data != [tokens]:
            raise PassError("the model is not one of text alone, whose tokens a table embeds")
        if "logits" not in program.outputs:
            raise PassError("the model predicts no next token")
        given = Input(PROMPT_TOKENS, tokens.type, "zeros")
        embedded, rows = self._rows(program, lookup)
        build = Builder(program.graph)
        *_, last = program.graph.find_nodes(op="placeholder")
        with build.after(last):
            numbers = build.placeholder(PROMPT_TOKENS, tokens.type)
        weight = Weight((rows,))
        build.wrap(
            embedded,
            lambda node: build.trace(_replaced, node, numbers, build.weight(PROMPT_WEIGHT, weight)),
        )
        context.remark(f"{self.count} prompt tokens: {weight.elements():,} parameters")
        return replace(
            program,
            inputs=(*program.inputs, given),
            weights=program.weights.with_weight(PROMPT_WEIGHT, weight),
        )

    def _rows(self, program: Program, lookup: fx.Node) -> tuple[fx.Node, Expr]:
        """Return the node with the embedded tokens, and the first embeddings of prompt tokens."""
        table = program.weights[str(lookup.args[0].target)].entries[0]  # type: ignore[union-attr]
        size = table.meta.shape[0]
        if size < self.count:
            raise PassError(f"there are {size} tokens, and {self.count} prompt tokens are wanted")
        # the first tokens of a vocabulary are often special ones
        start = min(size // 2, size - self.count)
        rows = copy(slice_(table, 0, start, start + self.count), 0)
        if not program.origin.scales_embeddings:
            return lookup, rows
        # embeddings are those behind the factor, by which a lookup is multiplied
        (product,) = lookup.users
        factor: Any = next(a for a in product.args if a is not lookup)
        if isinstance(factor, fx.Node):
            # its value is in the checkpoint; training finds the size
            factor = float(table.meta.shape[1]) ** 0.5
        return product, scale(rows, float(factor))


def _lookup(graph: fx.Graph, tokens: Input) -> fx.Node | None:
    """Find the first lookup of an input's tokens in a table."""
    node: fx.Node
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        table: Any
        ids: Any
        table, ids = node.args[:2]
        if table.op == "get_attr" and ids.op == "placeholder" and ids.target == tokens.name:
            type_ = type_of(node)
            if type_ is not None and len(type_.shape) == 3:
                return node
    return None


def _replaced(embedded: Tensor, numbers: Tensor, rows: Tensor) -> Tensor:
    """Replace the embeddings [batch, time, width] of prompt tokens by rows of [count, width]."""
    own = torch.nn.functional.embedding((numbers - 1).clamp(min=0), rows)
    return torch.where((numbers > 0)[..., None], own, embedded)
