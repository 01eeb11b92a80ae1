"""An op of one's own, the pass that brings it, and what it is in ONNX.

reroll convert MODEL OUT --load FILE --passes 'cap_logits(cap=30)'
reroll export OUT DIR --load FILE --target onnx --check
"""

from typing import Any

import torch
from torch import Tensor, fx

from reroll.bounds import POSITIVE
from reroll.errors import PassError
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.lowerings import lowering
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.op_names import register_namespace
from reroll.rewrite.pipeline import Context, Pass, option

# programs may call the ops of this namespace now
register_namespace("my")


@torch.library.custom_op("my::softcap", mutates_args=())
def softcap(x: Tensor, cap: float) -> Tensor:
    """The definition: cap * tanh(x / cap), which stays between -cap and cap."""
    return cap * torch.tanh(x / cap)


@softcap.register_fake
def _(x: Tensor, cap: float) -> Tensor:
    """What it makes of tensors without data: the shape and the dtype of the result."""
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.cap = inputs[1]
    ctx.save_for_backward(output)


def _gradient(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
    (out,) = ctx.saved_tensors
    return outer * (1 - (out / ctx.cap).square()), None


softcap.register_autograd(_gradient, setup_context=_remember)
# the handle: what a node of a graph has for its target
SOFTCAP = torch.ops.my.softcap.default


@lowering("onnx", "my::softcap.default")
def _softcap(g: Any, node: fx.Node, x: Any, cap: float) -> Any:
    """The same, in operators of ONNX."""
    x = g.tensor(x, g.dtype(node))
    limit = g.number(cap, x.dtype)
    return g.op("Mul", g.op("Tanh", g.op("Div", x, limit)), limit)


class CapLogits(Pass):
    """Keep the logits between two bounds, smoothly, as Gemma 2 does."""

    name = "cap_logits"
    contract = "approximate"

    cap: float = option(30.0, within=POSITIVE, help="the largest logit, and minus the least")

    def run(self, program: Program, context: Context) -> Program:
        if "logits" not in program.outputs:
            raise PassError("the model has no logits", hint="cap_logits is for models that do")
        returned: Any = program.graph.output_node().args[0]
        logits = returned[program.outputs.index("logits")]
        edit = Builder(program.graph)
        edit.wrap(logits, lambda node: edit.call(SOFTCAP, node, self.cap))
        context.remark(f"logits stay between -{self.cap:g} and {self.cap:g}")
        return program
