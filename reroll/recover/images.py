"""Prepare images as rows to train on: read on demand, some held out, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.recover.data import Corpus, Rows
from reroll.rewrite.ir.program import Program

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageInput:
    """Image input of a model: its processor, the image size, and the number of positions."""

    processor: Any
    height: int
    width: int
    positions: int

    def read(self, path: Path) -> Tensor:
        """Read an image file: [channels, height, width]; raises UsageError if it cannot be read."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                pixels = self.processor(
                    images=image.convert("RGB"),
                    size={"height": self.height, "width": self.width},
                    do_center_crop=False,
                    return_tensors="pt",
                )["pixel_values"]
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"the image cannot be read: {error}", where=str(path)) from error
        first: Tensor = pixels[0]
        return first


class Images:
    """Images in files, read when they are picked."""

    def __init__(self, paths: Sequence[Path], input: ImageInput) -> None:
        self.paths, self.input = list(paths), input

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, numbers: Sequence[int]) -> Rows:
        data = torch.stack([self.input.read(self.paths[n]) for n in numbers])
        return Rows(data, torch.ones(len(data), self.input.positions, dtype=torch.long))


def image_input(program: Program) -> ImageInput | None:
    """Return the image input of a Program; None if it takes no images.

    Raises UsageError if it has no image processor, or if its sizes are not fixed.
    """
    pixels = next((i for i in program.inputs if i.name == "pixel_values"), None)
    if pixels is None or any(i.name == "input_ids" for i in program.inputs):
        return None
    file = program.origin.files.get(PROCESSOR)
    if file is None:
        raise UsageError(
            f"the model has no {PROCESSOR}, so images cannot be prepared for it",
            where=program.origin.model,
        )
    if not program.loops:
        raise UsageError("the model has no loop over its layers", where=program.origin.model)
    sizes = (*pixels.type.shape[-2:], program.loops[0].carry[0].meta["type"].shape[1])
    if not all(isinstance(size, int) for size in sizes):
        raise UsageError(
            f"the model takes images of any size ({sizes})",
            where=program.origin.model,
            hint="capture it with an example of the size to train on",
        )
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(str(Path(file).parent), local_files_only=True)
    return ImageInput(processor, *(int(size) for size in sizes))


def image_corpus(
    sources: Sequence[str | Path], input: ImageInput, *, held_rows: int, seed: int = 0
) -> Corpus:
    """Collect the images below some directories, in an order that depends on `seed` only.

    In each directory, images evenly spaced by name are held out, `held_rows` in all. Raises
    UsageError if a directory has too few.
    """
    each = -(-held_rows // len(sources))
    train: list[Path] = []
    held: list[Path] = []
    for source in sources:
        folder = Path(source)
        if not folder.is_dir():
            raise UsageError("there is no such directory of images", where=str(source))
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
        if len(images) <= each:
            raise UsageError(
                f"{len(images)} images, of which {each} would be held out",
                where=str(source),
                hint="give more images, or a smaller held_rows",
            )
        # spread over the names, which may be sorted by class
        chosen = {round(i * (len(images) - 1) / max(each - 1, 1)) for i in range(each)}
        held += [images[n] for n in sorted(chosen)]
        train += [path for n, path in enumerate(images) if n not in chosen]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return Corpus(Images([train[i] for i in order], input), Images(held, input))
