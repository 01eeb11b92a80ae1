"""Pipelines of passes, as one line of text, a YAML recipe or a Python list.

The same two passes three times. Text:

    tie(blocks=10, init=average), relax(rank=64, ranks={q_proj: 32})

A recipe:

    passes:
      - tie: {blocks: 10, init: average}
      - relax: {rank: 64, ranks: {q_proj: 32}}

Python:

    [Tie(blocks=10), "relax(rank=64, ranks={q_proj: 32})"]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from reroll.errors import UsageError
from reroll.rewrite.pipeline.base import PASSES, Pass
from reroll.rewrite.pipeline.options import nearest_name
from reroll.rewrite.pipeline.pipeline_parser import Call, parse_calls, pointed

Item: TypeAlias = "Pass | str | Mapping[str, Any]"
Pipeline: TypeAlias = "Item | Path | Sequence[Item]"

_RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


def resolve(pipeline: Pipeline) -> tuple[Pass, ...]:
    """Construct the passes of a pipeline in any of its forms.

    Text that ends in .yaml, .yml or .json is the path of a recipe. Raises UsageError, with line and
    column for text.
    """
    if isinstance(pipeline, Pass):
        return (pipeline,)
    if isinstance(pipeline, Path):
        return load_recipe(pipeline)
    if isinstance(pipeline, str):
        if pipeline.strip().endswith(_RECIPE_SUFFIXES):
            return load_recipe(pipeline.strip())
        return parse_pipeline(pipeline)
    if isinstance(pipeline, Mapping):
        return (_from_mapping(pipeline, "pipeline"),)
    return tuple(p for item in pipeline for p in resolve(item))


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """Parse the passes of pipeline text; UsageError with the position of the error."""
    return tuple(_from_call(call, text) for call in parse_calls(text))


def _from_call(call: Call, text: str) -> Pass:
    try:
        cls = PASSES.find(call.name)
    except UsageError as error:
        raise pointed(text, call.position, error.message, error.hint) from None
    try:
        return cls.make(call.options)
    except UsageError as error:
        option = (error.where or "").partition("option ")[2]
        position = call.positions.get(option, call.position)
        raise pointed(text, position, f"{cls.name}: {error.message}", error.hint) from None


# ---- recipes


def load_recipe(path: str | Path) -> tuple[Pass, ...]:
    """Load the passes of a recipe file; UsageError if it is not one."""
    path = recipe_path(path)
    return parse_recipe(read_yaml(path), str(path))


def recipe_path(recipe: str | Path) -> Path:
    """Return the path of a recipe: a file, or a recipe that reroll ships, by its name.

    Raises UsageError if there is neither.
    """
    path = Path(recipe)
    if path.exists() or path.suffix in _RECIPE_SUFFIXES:
        return path
    shipped = {f.stem: f for f in (Path(__file__).parents[2] / "recipes").glob("*.yaml")}
    if str(recipe) not in shipped:
        raise UsageError(
            f"there is no recipe {str(recipe)!r}",
            hint=nearest_name(str(recipe), sorted(shipped)) or f"use {', '.join(sorted(shipped))}",
        )
    return shipped[str(recipe)]


def read_yaml(path: str | Path) -> object:
    """Read the data in a recipe file; UsageError if it cannot be read or is not YAML."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe cannot be read: {error}", where=str(path)) from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the recipe is not YAML: {reason}", where=str(path)) from error


def parse_recipe(data: object, where: str = "recipe") -> tuple[Pass, ...]:
    """Construct the passes of a recipe from its data."""
    hint = "a recipe is a mapping with a list under `passes`"
    if not isinstance(data, Mapping) or not isinstance(data.get("passes"), list):
        raise UsageError("there is no list of passes", where=where, hint=hint)
    passes: list[Pass] = []
    for number, item in enumerate(data["passes"], 1):
        location = f"{where}, pass {number}"
        if isinstance(item, str):
            passes += parse_pipeline(item)
        elif isinstance(item, Mapping):
            passes.append(_from_mapping(item, location))
        else:
            raise UsageError(f"{item!r:.80} is not a pass", where=location)
    return tuple(passes)


def _from_mapping(item: Mapping[Any, Any], where: str) -> Pass:
    if len(item) != 1:
        raise UsageError(
            f"one pass is a mapping from its name to its options, not {dict(item)!r:.80}",
            where=where,
        )
    ((name, options),) = item.items()
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise UsageError(f"the options of {name} are a mapping, not {options!r:.80}", where=where)
    try:
        return PASSES.find(str(name)).make(options)
    except UsageError as error:
        location = where if error.where is None else f"{where}, {error.where}"
        raise UsageError(error.message, location, error.hint) from None


def to_recipe(passes: Iterable[Pass]) -> str:
    """Format passes as a YAML recipe; `load_recipe` reads it back."""
    import yaml

    data = {"passes": [{p.name: p.changed_options()} for p in passes]}
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None)


# ---- text


def to_text(passes: Iterable[Pass]) -> str:
    """Format passes as one canonical line of text; `parse_pipeline` reads it back."""
    return ", ".join(map(str, passes))
