"""Names of the functions that a graph may call; no other function has a name.

A program's text may be untrusted. So a name is looked up in two places only: the dispatcher's
operators of the namespaces registered here, and the table of Python functions below. An operator
that changes its arguments, or that accesses more than tensors, has no name.
"""

from __future__ import annotations

import difflib
import importlib
import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload

from reroll.errors import ProgramError
from reroll.rewrite.ir import ops

LOOP = "loop"

_OPERATORS = "abs add and_ eq floordiv ge gt le lt mod mul ne neg not_ or_ pos pow sub truediv"
# functions on sizes that torch.export uses in addition to the operators
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "round": round,
    "sym_float": torch.sym_float,
    "sym_int": torch.sym_int,
    "sym_ite": torch.sym_ite,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_not": torch.sym_not,
    "sym_sqrt": torch.sym_sqrt,
    "sym_sum": torch.sym_sum,
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

_namespaces = {"aten", ops.NAMESPACE, "transformers"}
# the module whose import registers the operators of a namespace outside of reroll
_PROVIDERS = {"transformers": "transformers.integrations.moe"}

# ATen's private operators hardly check their arguments: only these, which occur in captured
# models, have names
_PRIVATE = frozenset(
    """
    __and__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d
    _assert_async _assert_scalar _assert_tensor_metadata _conj _convolution _euclidean_dist
    _fft_c2c _fft_c2r _fft_r2c _fused_rms_norm _grouped_mm _int_mm _is_all_true _is_any_true
    _local_scalar_dense _log_softmax _native_batch_norm_legit_no_training _neg_view _pad_circular
    _pad_enum _prelu_kernel _safe_softmax _shape_as_tensor _softmax _stack _to_copy _trilinear
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm _weight_norm_interface
    """.split()
)
# `from_file` maps a file into memory; the prefixes are libraries that trust packed weights
_DENIED = frozenset({"from_file"})
_DENIED_PREFIXES = ("fbgemm_", "mkldnn_rnn", "miopen_")


def register_namespace(name: str) -> None:
    """Allow programs to call the `torch.library` operators of one more namespace.

    Raises ProgramError if the name is not that of a namespace of operators.
    """
    if not name.isidentifier() or name.startswith("_"):
        raise ProgramError(f"{name!r} is not the name of a namespace of operators")
    _namespaces.add(name)


def op_name(target: object) -> str | None:
    """Return the name of a function, or None if graphs may not call it."""
    if isinstance(target, OpOverload):
        namespace, op = str(target._schema.name).split("::", 1)
        if _refusal(namespace, op) or target._schema.is_mutable:
            return None
        overload = target._overloadname
        return f"{namespace}.{op}" if overload == "default" else f"{namespace}.{op}.{overload}"
    if target is ops.loop:
        return LOOP
    return _FUNCTION_NAMES.get(target) if callable(target) else None


# errors are not cached, so names of a namespace that is registered later are found
@lru_cache(maxsize=4096)
def resolve(name: str) -> Callable[..., Any]:
    """Return the function of this name; ProgramError with the nearest name if there is none."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    op, _, overload = rest.partition(".")
    overload = "" if overload == "default" else overload
    qualified = f"{namespace}::{op}.{overload}" if overload else f"{namespace}::{op}"
    reason = _refusal(namespace, op)
    if namespace in _PROVIDERS:
        importlib.import_module(_PROVIDERS[namespace])
    # operators of TorchScript only, such as aten::save, are not in the dispatcher
    if reason is None and qualified in _dispatcher_names():
        op_overload = getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")
        if isinstance(op_overload, OpOverload) and not op_overload._schema.is_mutable:
            return op_overload
        reason = "changes a tensor in place: a graph has values only"
    if reason is not None and namespace in _namespaces:
        raise ProgramError(f"the op {name!r:.80} {reason}")
    raise ProgramError(f"unknown op {name!r:.80}", hint=_suggestion(name))


def _refusal(namespace: str, op: str) -> str | None:
    if namespace not in _namespaces:
        return f"is in no registered namespace ({', '.join(sorted(_namespaces))})"
    if namespace != "aten":
        return None
    if op in _DENIED or op.startswith(_DENIED_PREFIXES):
        return "reaches beyond tensors"
    if op.startswith("_") and op not in _PRIVATE:
        return "is private to PyTorch"
    return None


def _dispatcher_names() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def _suggestion(name: str) -> str:
    known = [LOOP, *FUNCTIONS]
    for qualified in _dispatcher_names():
        namespace, _, op = qualified.partition("::")
        if namespace not in _namespaces or _refusal(namespace, op.partition(".")[0]):
            continue
        # in-place and out= forms are recognised by name, which suffices for a suggestion
        if not op.endswith("out") and not op.partition(".")[0].endswith("_"):
            known.append(f"{namespace}.{op}")
    overloads = sorted(n for n in known if n.startswith(f"{name}."))
    if overloads:
        return f"write the overload: {', '.join(overloads[:6])}"
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"the nearest name is {near[0]!r}"
    namespaces = ", ".join(f"{n}.*" for n in sorted(_namespaces))
    return f"known are {namespaces} and {', '.join(sorted([LOOP, *FUNCTIONS]))}"
