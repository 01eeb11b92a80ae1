"""Prompt tokens: train embeddings whose logits predict the model's tokens further ahead."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from reroll.bounds import COUNT, SHARE
from reroll.errors import UsageError
from reroll.recover.stage import Batch, Loss, Models, Stage
from reroll.recover.stages.distil import Distil
from reroll.rewrite.analysis.mixing import other_mixing
from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.drafting import PROMPT_TOKENS, PROMPT_WEIGHT
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import ATTENTION
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.options import option

# for each prompt token, its logits and those of the model where it has read the tokens before
Pairs: TypeAlias = list[tuple[Tensor, Tensor]]

# the first tokens of a row say too little to predict from
_FIRST = 8


class PromptTokens(Stage):
    """Train the embeddings of prompt tokens, and nothing else.

    The pass `prompt_tokens` adds them. At `places` random places of a row, prompt tokens follow;
    the i-th has to predict what the model predicts i tokens later, where it has read them:

        loss = sum_i decay^i KL(p_i || q_i) / sum_i decay^i

    (parallel prompt decoding, Chen et al., arXiv 2405.18628, section 3). The rows are to be the
    model's own text, as `reroll sample` writes it. A model of full attention reads all places in
    one pass, by a mask; any other reads the row up to one place.
    """

    name = "prompt_tokens"
    teaches = False

    train: str | list[str] = option(
        PROMPT_TOKENS, help="what is trained: the embeddings have this in their name"
    )
    places: int = option(32, within=COUNT, help="how many places of a row are trained at once")
    decay: float = option(0.8, within=SHARE, help="weight of a prompt token, over the one before")

    def check_models(self, models: Models) -> None:
        if PROMPT_WEIGHT not in models.module.program.weights:
            raise UsageError(
                "the model has no prompt tokens",
                where="stage prompt_tokens",
                hint="the pass prompt_tokens(count=3) adds them",
            )

    def loss(self, batch: Batch, models: Models) -> Loss:
        count = models.module.program.weights[PROMPT_WEIGHT].meta.shape[0]
        # every row has tokens there
        length = int(batch.mask.sum(1).min())
        room = length - count - 1
        if room < 1:
            raise UsageError(
                f"a row of {length} tokens has no place for {count} prompt tokens",
                where="stage prompt_tokens",
                hint="train on longer rows",
            )
        generator = torch.Generator().manual_seed(batch.seed)
        first = min(_FIRST, room - 1)
        chosen = torch.randperm(room - first, generator=generator)[: self.places] + first
        tokens = batch.data[:, :length]
        if read_by_mask(models.module.program):
            pairs = _together(models, tokens, chosen.sort().values, count)
        else:
            pairs = _behind(models, tokens, int(chosen[0]), count)
        divergence, parts = Distil.make({}).divergence, dict[str, float]()
        value, total = pairs[0][0].new_zeros((), dtype=torch.float32), 0.0
        for number, (ahead, expected) in enumerate(pairs, 1):
            weight = self.decay ** (number - 1)
            kl = divergence(ahead.flatten(0, 1), expected.flatten(0, 1))
            value, total = value + weight * kl, total + weight
            same = (ahead.argmax(-1) == expected.argmax(-1)).float().mean()
            parts |= {f"kl_{number}": kl.item(), f"same_{number}": same.item()}
        return Loss(value / total, parts)


def read_by_mask(program: Program) -> bool:
    """Whether a mask and positions alone say what each token of a model reads."""
    states = plan_states(program).layers
    attentions = [n for _, g in program.graphs() for n in g.nodes if n.target is ATTENTION]
    roles = {item.role for item in program.inputs}
    return (
        {"padding", "positions"} <= roles
        and all(state.layer_type == "full_attention" for state in states)
        and all(argument(node, "bias") is None for node in attentions)
        and other_mixing(program) is None
    )


def _together(models: Models, tokens: Tensor, places: Tensor, count: int) -> Pairs:
    """Put prompt tokens behind all `places`, none of which sees those of another.

    Returns, for each prompt token, its logits and the model's [rows, places, vocabulary].
    """
    rows, length = tokens.shape
    device, places = tokens.device, places.to(tokens.device)
    numbers = torch.arange(1, count + 1, device=device)
    ahead = places[:, None] + numbers
    positions = torch.cat([torch.arange(length, device=device), ahead.flatten()])
    numbered = torch.cat([tokens.new_zeros(length), numbers.repeat(len(places)).to(tokens)])
    # the place that a column belongs to; the text belongs to all
    own_group = torch.arange(len(places), device=device).repeat_interleave(count)
    group = torch.cat([own_group.new_full((length,), -1), own_group])
    before = positions[None] <= positions[:, None]
    start = torch.cat([positions[:length], places.repeat_interleave(count)])
    text = (group[None] < 0) & (positions[None] <= start[:, None])
    mask = text | ((group[None] == group[:, None]) & (group[None] >= 0) & before)
    own = length + torch.arange(count * len(places), device=device)
    logits = models.student(
        input_ids=torch.cat([tokens, tokens.new_zeros(rows, len(own))], 1),
        position_ids=positions[None].expand(rows, -1),
        attention_mask=mask[None, None].expand(rows, 1, -1, -1),
        logits_to_keep=torch.cat([ahead.flatten(), own]),
        use_cache=False,
        **{PROMPT_TOKENS: numbered[None].expand(rows, -1)},
    ).logits
    text_logits, own_logits = logits.unflatten(1, (2, len(places), count)).unbind(1)
    return [(own_logits[:, :, n], text_logits[:, :, n].detach()) for n in range(count)]


def _behind(models: Models, tokens: Tensor, place: int, count: int) -> Pairs:
    """Put prompt tokens behind one place of every row; the result is as of `_together`."""
    rows = len(tokens)
    numbers = torch.arange(1, count + 1, device=tokens.device).to(tokens).expand(rows, -1)
    with torch.no_grad():
        text = tokens[:, : place + count + 1]
        expected = models.student(
            input_ids=text, use_cache=False, logits_to_keep=count
        ).logits  # fmt: skip
    read = tokens[:, : place + 1]
    ahead = models.student(
        input_ids=torch.cat([read, torch.zeros_like(numbers)], 1),
        logits_to_keep=count,
        use_cache=False,
        **{PROMPT_TOKENS: torch.cat([torch.zeros_like(read), numbers], 1)},
    ).logits
    return [(ahead[:, n : n + 1], expected[:, n : n + 1]) for n in range(count)]
