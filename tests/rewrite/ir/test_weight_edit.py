"""Weights made of several, trip by trip."""

from __future__ import annotations

import torch

from reroll.rewrite.ir import weights as w
from reroll.rewrite.ir.weight_edit import _combined

ZERO = w.zeros((2,), torch.float32)


def test_trips_share_a_combined_weight_as_they_shared_its_parts() -> None:
    scale = w.Weight((w.Source("scale", ZERO.meta),), (0, 0, 0))
    # equal numbers, and yet each trip's own
    apart = _combined([w.Weight((ZERO,) * 3, (0, 1, 2)), scale], w.add)
    assert (len(apart.entries), apart.index) == (3, (0, 1, 2))
    tied = _combined([w.Weight((ZERO,) * 2, (1, 0, 1)), scale], w.add)
    assert (len(tied.entries), tied.index) == (2, (0, 1, 0))
    outside = _combined([w.Weight((ZERO,)), w.Weight((ZERO,))], w.add)
    assert outside.index is None
