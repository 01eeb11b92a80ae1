"""Options: the typed fields of a pass, checked alike from Python, text and recipes.

A field's annotation says which values are allowed: `int`, `float`, `bool`, `str`, `None`,
`Literal[...]`, an `Enum`, `list[...]`, `tuple[..., ...]`, `dict[str, ...]`, and unions of these.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from reroll.bounds import Range, check_number
from reroll.errors import UsageError

REQUIRED = dataclasses.MISSING


def option(default: Any = REQUIRED, *, within: Range | None = None, help: str = "") -> Any:
    """Declare a field of a pass with its documentation; without a default it is required.

    All its numbers, also those in a list or a mapping, must be `within` a range; a list of such
    numbers must not be empty.
    """
    metadata = {"help": help, "within": within}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=partial(copy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """Declaration of one option of a pass."""

    name: str
    type: Any
    default: Any
    help: str
    within: Range | None = None

    @property
    def kind(self) -> str:
        """Allowed values, in words."""
        return describe(self.type) + (f" ({self.within})" if self.within else "")

    def convert(self, value: Any, owner: str) -> Any:
        """Convert a value to the declared type; UsageError naming `owner`, such as "pass tie"."""
        converted = _convert(value, self.type)
        if converted is REFUSED:
            raise UsageError(
                f"{self.name} must be {self.kind}, not {_shown(value)}",
                where=f"{owner}, option {self.name}",
                hint=_suggest(value, self.type),
            )
        if self.within is not None:
            self._check_range(converted, f"{owner}, option {self.name}")
        return converted

    def _check_range(self, value: Any, where: str) -> None:
        if isinstance(value, Mapping):
            value = tuple(value.values())
        elif value in ([], ()):
            raise UsageError(f"{self.name} must be {self.kind}, not an empty list", where)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                assert self.within is not None
                check_number(self.name, number, self.within, where, integer=isinstance(number, int))


REFUSED: Any = object()


def options_of(cls: type) -> dict[str, Option]:
    """Return the options that a pass declares, in order."""
    hints = get_type_hints(cls)
    options = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not REQUIRED:
            default = field.default_factory()
        help = str(field.metadata.get("help", ""))
        within = field.metadata.get("within")
        options[field.name] = Option(field.name, hints[field.name], default, help, within)
    return options


def check_options(cls: type) -> None:
    """Raise UsageError if a pass declares an option of a type that text cannot express."""
    try:
        options = options_of(cls)
    except (NameError, AttributeError) as error:
        raise UsageError(f"an annotation is wrong: {error}", where=cls.__qualname__) from error
    for each in options.values():
        if not _supported(each.type):
            raise UsageError(
                f"option {each.name} has the type {each.type}, which text cannot hold",
                where=cls.__qualname__,
                hint="see reroll.rewrite.pipeline.options for the types that it can",
            )


def _supported(type_: Any) -> bool:
    origin, args = get_origin(type_), get_args(type_)
    if origin is Literal:
        return all(type(a) in (int, str, bool, type(None)) for a in args)
    if origin is tuple:
        return len(args) == 2 and args[1] is Ellipsis and _supported(args[0])
    if origin is dict:
        return args[0] in (str, int) and _supported(args[1])
    if origin in (list, Union, types.UnionType):
        return all(map(_supported, args))
    is_enum = isinstance(type_, type) and issubclass(type_, enum.Enum)
    return is_enum or type_ in (int, float, bool, str, type(None), None, Any)


def plain(value: Any) -> Any:
    """Convert a value to plain data that text and YAML can express."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return value


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the nearest known name, else with all names; None if there are none."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"known: {', '.join(known)}" if known else None


def _convert(value: Any, type_: Any) -> Any:
    """Convert `value` to the annotation `type_`, or return REFUSED."""
    origin, args = get_origin(type_), get_args(type_)
    if origin in (Union, types.UnionType):
        # an exact type match first, so that an integer is not converted to a float
        exact = [a for a in args if isinstance(a, type) and type(value) is a]
        tries = (_convert(value, arm) for arm in [*exact, *args])
        return next((v for v in tries if v is not REFUSED), REFUSED)
    if origin is Literal:
        # pipeline text parses the word none as None
        value = "none" if value is None and None not in args else value
        return next((a for a in args if type(a) is type(value) and a == value), REFUSED)
    if origin is list or origin is tuple:
        return _convert_sequence(value, origin, args)
    if origin is dict:
        return _convert_dict(value, args)
    if type_ is Any:
        return value
    if type_ in (None, type(None)):
        return None if value is None else REFUSED
    if type_ is float and type(value) is int:
        return float(value)
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return next((m for m in type_ if value is m or value in (m.value, m.name)), REFUSED)
    if type_ is float and isinstance(value, float) and math.isnan(value):
        return REFUSED
    return value if isinstance(type_, type) and type(value) is type_ else REFUSED


def _convert_sequence(value: Any, origin: type, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple):
        return REFUSED
    items = [_convert(v, args[0]) for v in value]
    return REFUSED if any(v is REFUSED for v in items) else origin(items)


def _convert_dict(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        return REFUSED
    items = {_convert(k, args[0]): _convert(v, args[1]) for k, v in value.items()}
    return REFUSED if REFUSED in items or any(v is REFUSED for v in items.values()) else items


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    type(None): "none",
    Any: "anything",
}


def describe(type_: Any) -> str:
    """Describe an annotation in words: "an integer or a mapping of string to integer"."""
    origin, args = get_origin(type_), get_args(type_)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(arm) for arm in args))
    if origin is Literal:
        return "one of " + ", ".join(_shown(a) for a in args)
    if origin in (list, tuple):
        return f"a list of {_plural(args[0])}"
    if origin is dict:
        return f"a mapping of {_plural(args[0])} to {_plural(args[1])}"
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return "one of " + ", ".join(_shown(m.value) for m in type_)
    return _WORDS.get(type_, getattr(type_, "__name__", str(type_)))


def _plural(type_: Any) -> str:
    words = {int: "integers", float: "numbers", str: "strings", bool: "booleans"}
    return words.get(type_, f"({describe(type_)})")


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    # a word that was typed without quotes is shown without them
    return value if isinstance(value, str) and value.isidentifier() else repr(value)


def _suggest(value: Any, type_: Any) -> str | None:
    if not isinstance(value, str):
        return None
    words = [a for a in _leaves(type_) if isinstance(a, str)]
    near = difflib.get_close_matches(value, words, n=1)
    return f"did you mean {near[0]}?" if near else None


def _leaves(type_: Any) -> list[Any]:
    """Return the literal values that an annotation names."""
    if get_origin(type_) is Literal:
        return list(get_args(type_))
    if isinstance(type_, type) and issubclass(type_, enum.Enum):
        return [m.value for m in type_]
    return [leaf for arm in get_args(type_) for leaf in _leaves(arm)]
