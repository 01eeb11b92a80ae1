"""Source text of kernels, with a program's constants written into them.

A constant parameter is removed, its name is replaced by its value, and branches that it decides are
resolved. This drops comments but keeps docstrings.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any


def specialised(kernel: Any, name: str, constants: Mapping[str, object]) -> str:
    """Return the source of a kernel under a new name.

    `constants` are values by parameter, or expressions as text.
    """
    function = _parsed(kernel)
    function.name = name
    values = {key: ast.parse(str(value), mode="eval").body for key, value in constants.items()}
    known = {a.arg for a in function.args.args}
    missing = set(values) - known
    assert not missing, f"{name} has no parameters {missing}"
    function.args.args = [a for a in function.args.args if a.arg not in values]
    tree = _Fold(values).visit(function)
    return ast.unparse(ast.fix_missing_locations(tree))


def plain(function: Any) -> str:
    """Return the unchanged source of a function that kernels call, with its comments."""
    return textwrap.dedent(inspect.getsource(function.fn)).rstrip()


def _parsed(kernel: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


class _Fold(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.values:
            return self.values[node.id]
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        decided = _decided(node.test)
        if decided is None:
            return node
        return node.body if decided else node.orelse


def _decided(test: ast.expr) -> bool | None:
    """Return the truth value of a condition, or None if it depends on names or calls."""
    if any(isinstance(n, ast.Name | ast.Call) for n in ast.walk(test)):
        return None
    return bool(eval(compile(ast.Expression(test), "<condition>", "eval"), {"__builtins__": {}}))
