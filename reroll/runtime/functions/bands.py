"""Attention over a window and the first tokens of a whole sequence, without the full score matrix.

The mask of such an attention is a band along the diagonal and a few columns, which `Band` stores as
numbers. Each block of queries attends only to the keys within its reach. This costs time * window,
where a mask of all pairs costs time^2.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.mixers.gates import wide
from reroll.rewrite.ir.ops import mass_of
from reroll.rewrite.ir.visibility import Visibility

# blocks with fewer queries make matrix products too small to be efficient
_SMALLEST_BLOCK = 32


@dataclass(frozen=True)
class Band:
    """Mask in which queries see the last `window` tokens and the first `prefix`.

    `length` is the number of tokens, both of queries and of keys, which begin at position 0.
    """

    length: int
    window: int
    prefix: int
    # the results of `masks` by device: all layers of a forward share a band
    cached_masks: dict[torch.device, Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def block(self) -> int:
        """Number of queries in a block: half a window, but at least `_SMALLEST_BLOCK`.

        A block of half a window reaches into the two blocks before it.
        """
        return max(self.window // 2, _SMALLEST_BLOCK)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.block)

    @property
    def behind(self) -> int:
        """Number of blocks before its own whose keys a block can see."""
        return -(-(self.window - 1) // self.block)

    @property
    def pays(self) -> bool:
        """Whether the band leaves out so many pairs that computing in blocks is faster."""
        return self.length >= 4 * max(self.window, self.block)

    def masks(self, device: torch.device) -> Tensor:
        """Return which of the keys within its reach each query sees: [blocks, 1, block, keys]."""
        if device not in self.cached_masks:
            start = torch.arange(self.count, device=device)[:, None, None] * self.block
            q = start + torch.arange(self.block, device=device)[:, None]
            reach = torch.arange((self.behind + 1) * self.block, device=device)
            key = start - self.behind * self.block + reach
            in_blocks = (key >= 0) & Visibility(causal=True, window=self.window).near(q, key, key)
            # a first token inside the window already has a column in `in_blocks`
            first = torch.arange(self.prefix, device=device) <= q - self.window
            self.cached_masks[device] = torch.cat((first, in_blocks), -1)[:, None]
        return self.cached_masks[device]

    def written_out(self, device: torch.device) -> Tensor:
        """Return the mask [1, 1, length, length], True where a query may see a key."""
        at = torch.arange(self.length, device=device)
        visibility = Visibility(causal=True, window=self.window, prefix=self.prefix)
        return visibility.visible(at, self.length)


def attend_band(q: Tensor, k: Tensor, v: Tensor, scale: float, band: Band) -> Tensor:
    """Compute `attend` where `band` is the mask: [batch, heads, time, v_head_dim].

    On a CPU it computes in fp32 for every input dtype. For blocks of this size, the forward takes
    as long as in bf16, and the backward a third of the time.
    """
    dtype, batch = q.dtype, q.shape[0]
    precision: AbstractContextManager[None] = nullcontext()
    if q.device.type == "cpu":
        q, k, v = wide(q), wide(k), wide(v)
        precision = torch.autocast("cpu", enabled=False)
    with precision:
        out = F.scaled_dot_product_attention(
            _queries(q, band),
            _reached(k, band),
            _reached(v, band),
            attn_mask=band.masks(q.device).repeat(batch, 1, 1, 1),
            scale=scale,
            enable_gqa=q.shape[1] > k.shape[1],
        )
    return _joined(out.to(dtype), band, batch)


def mass_band(q: Tensor, k: Tensor, scale: float, band: Band, log: bool) -> Tensor:
    """Compute `mass` where `band` is the mask: [batch, heads, time] in fp32."""
    batch, groups = q.shape[0], q.shape[1] // k.shape[1]
    # the query heads of one KV head are rows of one matrix, so that keys are not repeated
    rows = _queries(q, band).unflatten(1, (-1, groups))
    scores = (rows @ _reached(k, band).mT[:, :, None]) * scale
    mask = band.masks(q.device).repeat(batch, 1, 1, 1)
    scores = scores.float().masked_fill(~mask[:, :, None], -torch.inf)
    return _joined(mass_of(scores, log).flatten(1, 2), band, batch)


def _blocks(x: Tensor, band: Band) -> Tensor:
    """Split the time of [batch, heads, time, size] into [blocks, block], padded with zeros."""
    missing = band.count * band.block - x.shape[2]
    blocks: Tensor = F.pad(x, (0, 0, 0, missing)).unflatten(2, (band.count, band.block))
    return blocks


def _queries(q: Tensor, band: Band) -> Tensor:
    """Return the queries by block: [batch * blocks, heads, block, size]."""
    return _blocks(q, band).transpose(1, 2).flatten(0, 1)


def _reached(x: Tensor, band: Band) -> Tensor:
    """Return the keys or values that each block can see: [batch * blocks, kv_heads, keys, size].

    These are the first tokens, then all tokens from `behind` blocks before up to the block's last.
    """
    first = x[:, :, None, : band.prefix].expand(-1, -1, band.count, -1, -1)
    x = F.pad(_blocks(x, band), (0, 0, 0, 0, band.behind, 0))
    near = [x[:, :, start : start + band.count] for start in range(band.behind + 1)]
    return torch.cat((first, *near), 3).transpose(1, 2).flatten(0, 1)


def _joined(out: Tensor, band: Band, batch: int) -> Tensor:
    """Reshape [batch * blocks, heads, block, ...] to [batch, heads, time, ...]."""
    out = out.unflatten(0, (batch, band.count)).transpose(1, 2).flatten(2, 3)
    return out[:, :, : band.length]
