"""Triton kernels for recurrent programs, and the choice of what runs a token mixer.

diagonal.py                         chunked recurrences with a diagonal decay
diagonal_backward.py                their gradients, in four launches
diagonal_fused.py                   and in one, where registers allow
recurrence.py                       these as ops of PyTorch, with gradients
forms.py                            which mixer's chunks and steps a kernel can do
layers.py                           kernels of single layers as ops of PyTorch
dispatch.py                         own kernel, flash-linear-attention, compiled or eager form
configurations.py                   block sizes, from the manifest that the sweep writes
delta.py                            the delta rule forward
step.py                             one token onto a pool of states
linear_rows.py                      linear layers of few rows, with norm, low-rank term and gate
depth_lora.py                       a linear layer whose rows are at different depths
confidence.py                       how sure a head is, without its logits
window.py                           attention over a window and sinks, with a linear branch
pointwise.py                        norms, rotary embeddings, gates
interpreter.py                      Triton's interpreter, mended, for tests without a GPU
audit/                              compiling for GPUs that are not there, and what came out

The references of the kernels are the forms of `reroll.mixers`.
"""

from reroll.kernels import interpreter

interpreter.install()
