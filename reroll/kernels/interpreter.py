"""Triton's interpreter with corrections, to test kernels on CPU tensors.

The interpreter is chosen when Triton is first imported, by TRITON_INTERPRET=1. It stores bf16 as
16-bit integers, multiplies their bits in `tl.dot` and truncates where a GPU rounds
(triton-lang/triton#11584). `install` corrects this. Kernels must still widen loaded values before
they compute with them. Two more patches are for other packages' kernels: an autotuner that needs no
GPU, and loop numbers with tensor methods.
"""

from __future__ import annotations

import builtins
import os
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np


def active() -> bool:
    """Whether kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


@cache
def install() -> None:
    """Correct the interpreter, once, if it is active."""
    if not active() or find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.autotuner import Autotuner

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    convert, dot = interpreter._convert_float, builder.create_dot
    patch_language = interpreter._patch_lang

    def convert_float(data: Any, source: Any, goal: Any, rounding: Any) -> Any:
        if source == tl.float32 and goal == tl.bfloat16:
            return _rounded(data)
        if source == tl.bfloat16 and goal == tl.float32:
            return _widened(data)
        return convert(data, source, goal, rounding)

    def widened(operand: Any) -> Any:
        narrow = operand.dtype.scalar == tl.bfloat16
        return handle(_widened(operand.data), tl.float32) if narrow else operand

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def first_configuration(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        pruned = self.prune_configs(kwargs) if self.early_config_prune else self.configs
        self.best_config = pruned[0]
        return self.fn.run(*args, **kwargs, **pruned[0].all_kwargs())

    def patch_once(function: Any) -> Any:
        # a launch patches the language; without this, each call of a function patches it again,
        # which takes most of the time
        modules = [m for m in function.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(m.load) for m in modules):
            return patch_language(function)
        return interpreter._LangPatchScope()

    interpreter._convert_float = convert_float
    interpreter._patch_lang = patch_once
    builder.create_dot = create_dot
    Autotuner.run = first_configuration


def _rounded(data: Any) -> Any:
    """Convert fp32 to the bits of bf16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    up = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    narrow = ((bits + up) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), narrow)


def _widened(data: Any) -> Any:
    return (data.astype(np.uint32) << 16).view(np.float32)


class _Number(int):
    def to(self, *_: Any, **__: Any) -> _Number:
        return self


def give_ranges(package: str) -> None:
    """Add a method `to` to the numbers of `range` in another package's kernels."""

    def numbers(*bounds: Any) -> Any:
        plain = (int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)
        return map(_Number, builtins.range(*plain))

    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}."):
            module.__dict__.setdefault("range", numbers)
