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
selective.py                        the selective scan, each number of a state by itself
selective_backward.py               its gradients
short_convolution.py                short convolutions over time, prompts and one token
step.py                             one token of a recurrence, with a pool of states
linear_rows.py                      linear layers of few rows, with norm, low-rank residual, gate
depth_lora.py                       a linear layer whose rows are at different depths
confidence.py                       confidence of a head, without its logits in memory
window.py                           attention over a window and sinks, with a linear branch
pointwise.py                        norms, rotary embeddings, gates
interpreter.py                      corrections of Triton's interpreter, for tests without a GPU
audit/                              compilation without a GPU, and measures of the binaries

The references of the kernels are the forms of `reroll.mixers`.
"""

from reroll.kernels import interpreter

interpreter.install()
