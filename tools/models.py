"""Makes models and texts: `python -m tools.models [--list] [--root FOLDER] [NAME ...]`.

Models go to `<root>/models`, texts to `<root>/data/text`, images to `<root>/data/images`. What is
there already is left alone.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import images, text
from tools.errors import PrepareError
from tools.pretrained import BF16_FORMS, MODELS


@dataclass(frozen=True)
class Target:
    """Something to make: `build(folder, work)` writes the outputs in `<root>/<folder>`."""

    name: str
    folder: str
    outputs: tuple[str, ...]
    licence: str
    build: Callable[[Path, Path], None]

    def present(self, root: Path) -> bool:
        """Whether all outputs exist; they are whole if they do."""
        return all((root / self.folder / output).exists() for output in self.outputs)


def catalogue() -> dict[str, Target]:
    """All targets by name."""
    targets = [
        Target(name, "models", model.outputs, model.licence, model.build)
        for name, model in {**MODELS, **BF16_FORMS}.items()
    ]
    for name, text_set in text.SETS.items():
        outputs = tuple(f"{name}.{part}.txt" for part in text.SPLITS)
        build = functools.partial(text.build, name)
        targets.append(Target(f"text:{name}", "data/text", outputs, text_set.licence, build))
    for name, image_set in images.SETS.items():
        build = functools.partial(images.build, name)
        targets.append(Target(f"images:{name}", "data/images", (name,), image_set.licence, build))
    return {target.name: target for target in targets}


def select(names: Sequence[str]) -> list[Target]:
    """The targets with the given names, or all for none."""
    known = catalogue()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PrepareError(f"no such target: {', '.join(unknown)}", f"use {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or list(known.values())


def prepare(target: Target, root: Path) -> None:
    """Make a target unless it is present."""
    if target.present(root):
        print(f"{target.name}: present", flush=True)
        return
    print(f"{target.name}: being made (licence: {target.licence})", flush=True)
    start = time.monotonic()
    folder = root / target.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
        target.build(folder, Path(work))
    print(f"{target.name}: done in {time.monotonic() - start:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a target (default: all)")
    parser.add_argument("--root", type=Path, default=Path(), help="where models/ and data/ go")
    parser.add_argument("--list", action="store_true", help="list the targets and stop")
    options = parser.parse_args(arguments)
    try:
        targets = select(options.names)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        for target in targets:
            print(f"{target.name:28}{target.licence}")
        return 0
    # a line per target says enough
    os.environ.setdefault("TQDM_DISABLE", "1")
    failed = 0
    for target in targets:
        try:
            prepare(target, options.root.resolve())
        except PrepareError as error:
            failed += 1
            print(f"error: {target.name}: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
