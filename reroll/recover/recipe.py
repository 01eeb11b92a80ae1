"""Read recovery recipes, which list the stages and their common settings, from YAML.

    recover:
      length: 512
      batch: 8
      stages:
        - align: {share: 0.25}
        - distil: {lr: 1.0e-4, train: all}

The same file may hold `passes`, which `reroll convert --recipe` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from reroll.bounds import COUNT, SEED, SHARE, WINDOW
from reroll.errors import UsageError
from reroll.recover.stage import Stage, find
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import option
from reroll.rewrite.pipeline.pipeline import read_yaml, recipe_path


class Settings(Declared):
    """Settings that all stages of a run share."""

    category: ClassVar[str] = "recipe"
    name: ClassVar[str] = "recover"

    length: int = option(512, within=WINDOW, help="tokens per row")
    batch: int = option(8, within=COUNT, help="rows per step, over all processes")
    micro: int | None = option(
        None, within=COUNT, help="rows computed at once in a process; all if none"
    )
    pack: Literal["join", "separate"] = option(
        "join", help="join: rows run on over the end of a document; separate: they are padded"
    )
    repeats: float = option(
        0.0,
        within=SHARE,
        help="share of the rows that end with a copy of an earlier passage, to train recall",
    )
    held_rows: int = option(16, within=COUNT, help="rows that are measured on and never trained on")
    precision: Literal["fp32", "bf16"] = option("fp32", help="bf16 is autocast over fp32 weights")
    checkpointing: bool = option(False, help="compute each trip again for its gradient")
    save_every: int = option(200, within=COUNT, help="steps between checkpoints")
    log_every: int = option(1, within=COUNT, help="steps between lines of the log")
    seed: int = option(0, within=SEED, help="orders the rows")


class Recipe:
    """Settings and stages of a run."""

    def __init__(self, settings: Settings, stages: tuple[Stage, ...]) -> None:
        if not stages:
            raise UsageError("a recipe needs at least one stage", where="recipe")
        self.settings = settings
        self.stages = stages

    def to_data(self) -> dict[str, Any]:
        """Return the recipe as plain data; `parse` reads it back."""
        stages = [{s.name: s.changed_options()} for s in self.stages]
        return {"recover": {**self.settings.changed_options(), "stages": stages}}


def load_recipe(path: str | Path) -> Recipe:
    """Load the recipe in a file; raises UsageError if there is none."""
    path = recipe_path(path)
    return parse(read_yaml(path), str(path))


def parse(data: object, where: str = "recipe") -> Recipe:
    """Build a recipe from the data of a YAML file; raises UsageError if it has no stages."""
    section = data.get("recover") if isinstance(data, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(section.get("stages"), list):
        raise UsageError(
            "there are no stages",
            where=where,
            hint="a recipe of a recovery is a mapping `recover` with a list `stages`",
        )
    settings = Settings.make({k: v for k, v in section.items() if k != "stages"})
    return Recipe(settings, tuple(_stage(item, where) for item in section["stages"]))


def _stage(item: object, where: str) -> Stage:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise UsageError(f"{item!r:.80} is not a stage: a name and its options", where=where)
    ((name, options),) = item.items()
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(f"the options of {name} are a mapping, not {options!r:.80}", where=where)
    return find(str(name)).make(options or {})
