"""The op set of the intermediate representation: the few idioms that passes reason about.

Everything else in a Program stays plain ATen. An op is one file: a `torch.library` custom op, so
that `torch.export` and `torch.compile` keep it whole. The file has the body that defines the op, in
the arithmetic of transformers' eager attention. It also has the function for meta tensors, the
cost, the bytes of state, and the handle that nodes have as target. `reroll.runtime` and the
exporters register faster forms by handle.

Only one op is not a tensor function: `loop`, the depth loop, whose body is a graph of its own.
"""

from reroll.rewrite.ir.ops.attention import (
    ATTENTION,
    ATTENTION_MASS,
    attention,
    attention_mass,
    mass_of,
)
from reroll.rewrite.ir.ops.base import is_pure, is_stateful
from reroll.rewrite.ir.ops.cache import CACHE, cache
from reroll.rewrite.ir.ops.exit import EXIT, exit
from reroll.rewrite.ir.ops.exit_linear import EXIT_LINEAR, exit_linear
from reroll.rewrite.ir.ops.glu import GLU, activate, glu
from reroll.rewrite.ir.ops.hold import HOLD, hold
from reroll.rewrite.ir.ops.loop import loop
from reroll.rewrite.ir.ops.mark_keys import ABSENT, MARK_KEYS, mark_keys
from reroll.rewrite.ir.ops.mask import MASK, mask
from reroll.rewrite.ir.ops.recent import RECENT, recent
from reroll.rewrite.ir.ops.recurrence import BIDIRECTIONAL, RECURRENCE, bidirectional, recurrence
from reroll.rewrite.ir.ops.rms_norm import RMS_NORM, rms_norm
from reroll.rewrite.ir.ops.rope import ROPE, rope
from reroll.rewrite.ir.ops.short_convolution import SHORT_CONVOLUTION, short_convolution
from reroll.rewrite.ir.ops.streak import STREAK, streak
from reroll.rewrite.ir.ops.widen import WIDEN, widen

NAMESPACE = "reroll"

__all__ = [
    "ABSENT",
    "ATTENTION",
    "ATTENTION_MASS",
    "BIDIRECTIONAL",
    "CACHE",
    "EXIT",
    "EXIT_LINEAR",
    "GLU",
    "HOLD",
    "MARK_KEYS",
    "MASK",
    "NAMESPACE",
    "RECENT",
    "RECURRENCE",
    "RMS_NORM",
    "ROPE",
    "SHORT_CONVOLUTION",
    "STREAK",
    "WIDEN",
    "activate",
    "attention",
    "attention_mass",
    "bidirectional",
    "cache",
    "exit",
    "exit_linear",
    "glu",
    "hold",
    "is_pure",
    "is_stateful",
    "loop",
    "mark_keys",
    "mask",
    "mass_of",
    "recent",
    "recurrence",
    "rms_norm",
    "rope",
    "short_convolution",
    "streak",
    "widen",
]
