"""A vision transformer as one block per phase (Raptor, arXiv 2512.19941), fitted to images.

DINOv2-small's 12 layers become three blocks, each applied as often as its phase has layers, scaled
by the step; they start at least squares and are aligned with the original's layers. Measured on
images that were not trained on: the cosine of the class token's and the patches' features with the
original's, and a linear probe on both models' class tokens.

    python -m benchmarks.raptor [--images 2000] [--json FILE]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reroll
from benchmarks.harness import Row, Table, parse_options, progress
from reroll.recover import recover
from reroll.recover.images import ENDINGS, ImageInput, image_input
from reroll.recover.recipe import parse

IMAGES = Path("data/images")
SETS, PROBED = ("stamps", "textile", "mnist"), ("stamps", "textile")
MEASURES = {"cosine, class": "{:.3f}", "cosine, patches": "{:.3f}", "linear probe": "{:.1%}"}
COLUMNS = {f"{name}: {title}": form for name in PROBED for title, form in MEASURES.items()}
STAGE = {"lr": 1e-3, "train": "all", "free": 1.0, "start_tokens": 20_000}
RECIPE = {"recover": {"batch": 8, "held_rows": 16, "stages": [{"align": STAGE}]}}
SIDES = ("original", "tied, untrained", "recovered")


def split(name: str) -> tuple[list[Path], list[Path]]:
    """The images of a set to train on, and every eighth, to measure on."""
    found = sorted(p for p in (IMAGES / name).rglob("*") if p.suffix in ENDINGS)
    return [p for n, p in enumerate(found) if n % 8], found[::8]


def gathered(count: int, folder: Path) -> Path:
    """A directory with links to `count` images, as many of each set as there are."""
    folder.mkdir()
    train = [split(name)[0] for name in SETS]
    chosen = [p for s in train for p in s[:: max(len(s) * len(train) // count, 1)]]
    for number, path in enumerate(chosen):
        (folder / f"{number:05}{path.suffix}").symlink_to(path.resolve())
    return folder


def features(model: Any, seen: ImageInput, paths: list[Path]) -> Tensor:
    """The last hidden states of images: [images, positions, width]."""
    with torch.no_grad():
        parts = [
            model(pixel_values=torch.stack([seen.read(p) for p in paths[i : i + 8]]))[0]
            for i in range(0, len(paths), 8)
        ]
    return torch.cat(parts)


def probe(train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
    """The accuracy of a logistic regression on features [images, width]."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    weight = torch.zeros(train.shape[1] + 1, int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = train @ weight[1:] + weight[0]
        value = F.cross_entropy(logits, labels) + 1e-3 * weight[1:].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = (test @ weight[1:] + weight[0]).argmax(-1)
    return (found == wanted).float().mean().item()


def measured(model: Any, teacher: Any, seen: ImageInput) -> Row:
    """How near a model's features are to the original's, and what they are good for."""
    found: Row = {"M parameters": sum(p.numel() for p in model.parameters()) / 1e6}
    for name in PROBED:
        train, test = split(name)
        train = train[:: max(len(train) // 400, 1)]
        classes = sorted({p.parent.name for p in train})
        labels, wanted = (
            torch.tensor([classes.index(p.parent.name) for p in part]) for part in (train, test)
        )
        ours = features(model, seen, test)
        cosines = F.cosine_similarity(ours, features(teacher, seen, test), -1)
        given = features(model, seen, train)[:, 0]
        found[f"{name}: cosine, class"] = cosines[:, 0].mean().item()
        found[f"{name}: cosine, patches"] = cosines[:, 1:].mean().item()
        found[f"{name}: linear probe"] = probe(given, labels, ours[:, 0], wanted)
    return found


def main() -> None:
    """Convert, measure, recover, measure again."""
    options = parse_options(__doc__, model="models/dinov2-small", images=2000, threads=2)
    table = Table(options, {"": "{}", "M parameters": "{:.2f}"} | COLUMNS)
    original = reroll.capture(options.model, inputs={"pixel_values": torch.zeros(2, 3, 224, 224)})
    seen, teacher = image_input(original), original.to_module().eval()
    assert seen is not None
    tied = reroll.run_passes(original, "tie(phases=auto, blocks=3, scaling=true)", measure=False)
    for case in table.missing({"": name} for name in SIDES):
        if case[""] != "recovered":
            model = teacher if case[""] == "original" else tied.to_module().eval()
            table.add(case | measured(model, teacher, seen))
            continue
        with tempfile.TemporaryDirectory() as work:
            report = recover(
                tied,
                Path(work, "out"),
                teacher=original,
                data=[gathered(options.images, Path(work, "images"))],
                recipe=parse(RECIPE),
                tokens=options.images * seen.positions,
                on_step=progress("raptor"),
            )
            model = reroll.load(Path(work, "out")).to_module().eval()
            table.add(case | measured(model, teacher, seen) | {"run": vars(report)})


if __name__ == "__main__":
    main()
