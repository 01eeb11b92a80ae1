"""Registry of weight functions: a function's signature is the schema of its arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, get_type_hints

from torch import Tensor

from reroll.errors import ProgramError
from reroll.rewrite.ir.weights.expressions import INFERENCES, Argument, Expr, Meta

MetaRule: TypeAlias = Callable[..., Meta]
Compute: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class WeightFunction:
    """Registered weight function: its computation, and the rule for shape and dtype."""

    name: str
    compute: Compute
    rule: MetaRule
    # whether inputs are cast to fp32 or fp64; otherwise they keep their dtype
    arithmetic: bool
    # set if the function can be computed from a running sum: (sum, count) -> result
    finish_sum: Callable[[Tensor, int], Tensor] | None


FUNCTIONS: dict[str, WeightFunction] = {}


def weight_function(
    rule: MetaRule,
    *,
    name: str | None = None,
    arithmetic: bool = True,
    finish_sum: Callable[[Tensor, int], Tensor] | None = None,
) -> Callable[[Compute], Compute]:
    """Register a function of tensors; ``rule`` maps the arguments' Metas to the result's Meta."""

    def register(compute: Compute) -> Compute:
        key = name or compute.__name__
        function = WeightFunction(key, compute, rule, arithmetic, finish_sum)
        FUNCTIONS[key] = function
        INFERENCES[key] = partial(_infer, function, _schema(compute))
        return compute

    return register


def _schema(compute: Compute) -> list[tuple[str, object, bool]]:
    """Return (parameter name, annotated type, variadic) of each parameter."""
    types = get_type_hints(compute)
    bare = [n for n in inspect.signature(compute).parameters if n not in types]
    if bare:
        raise ProgramError(
            f"{', '.join(bare)} of the weight function {compute.__name__}: no annotation",
            hint="annotate each parameter: Tensor for weights, else int, float, str, ...",
        )
    return [
        (p.name, types[p.name], p.kind is p.VAR_POSITIONAL)
        for p in inspect.signature(compute).parameters.values()
    ]


def _infer(
    function: WeightFunction, schema: list[tuple[str, object, bool]], args: tuple[Argument, ...]
) -> tuple[tuple[Argument, ...], Meta]:
    variadic = bool(schema) and schema[-1][2]
    slots = schema[:-1] + [schema[-1]] * (len(args) - len(schema) + 1) if variadic else schema
    if len(args) != len(slots) or (variadic and len(args) < len(schema)):
        wanted = ", ".join(f"*{n}" if many else n for n, _, many in schema)
        raise ProgramError(f"{function.name}({wanted}) was given {len(args)} arguments")
    checked = tuple(
        _checked(function, parameter, type_, value)
        for (parameter, type_, _), value in zip(slots, args, strict=True)
    )
    metas = [a.meta if isinstance(a, Expr) else a for a in checked]
    try:
        return checked, function.rule(*metas)
    except ProgramError as error:
        raise ProgramError(error.message, error.where or function.name, error.hint) from None


def _checked(function: WeightFunction, name: str, type_: object, value: Argument) -> Argument:
    if type_ is Tensor and isinstance(value, Expr):
        floating = value.meta.dtype.is_floating_point
        if function.arithmetic and not floating:
            raise ProgramError(
                f"{function.name} computes on floating-point tensors, {name} is {value.meta}",
                hint="cast it first",
            )
        return value
    if type_ is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    if type_ is float and type(value) is float and math.isfinite(value):
        return value
    if type_ in (int, str, bool) and type(value) is type_:
        return value
    integers = isinstance(value, tuple) and all(type(v) is int for v in value)
    if type_ == tuple[int, ...] and integers:
        return value
    wanted = "an expression" if type_ is Tensor else f"of type {getattr(type_, '__name__', type_)}"
    raise ProgramError(f"{function.name}: {name} must be {wanted}, not {value!r}")
