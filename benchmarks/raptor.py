"""A vision transformer as one block per phase (Raptor, arXiv 2512.19941), fitted to images.

DINOv2-small's 12 layers become three blocks, each applied as often as its phase has layers, scaled
by the step; they start at least squares and are aligned with the original's layers. Measured on
images that were not trained on: the cosine of the class token's and the patches' features with the
original's, and a linear probe on both models' class tokens.

    python -m benchmarks.raptor [--images 2000] [--blocks 3] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reroll
from reroll.recover import recover
from reroll.recover.images import ENDINGS, ImageInput, image_input
from reroll.recover.recipe import parse

# one image in so many is measured on
APART = 8


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a set to train on, and those to measure on."""
    found = sorted(p for p in folder.rglob("*") if p.suffix in ENDINGS)
    return [p for n, p in enumerate(found) if n % APART], found[::APART]


def gathered(sets: list[list[Path]], count: int, folder: Path) -> Path:
    """A directory with links to `count` images, as many of each set as there are."""
    chosen = [p for s in sets for p in s[:: max(len(s) * len(sets) // count, 1)]]
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


def probe(train: Tensor, labels: list[int], test: Tensor, wanted: list[int]) -> float:
    """The accuracy of a logistic regression on features [images, width]."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / deviation, (test - mean) / deviation
    weight = torch.zeros(train.shape[1] + 1, max(labels) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = train @ weight[1:] + weight[0]
        value = F.cross_entropy(logits, torch.tensor(labels)) + 1e-3 * weight[1:].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    found = (test @ weight[1:] + weight[0]).argmax(-1)
    return (found == torch.tensor(wanted)).float().mean().item()


def main() -> None:
    """Convert, measure, recover, measure again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/dinov2-small")
    parser.add_argument("--sets", nargs="+", default=["stamps", "textile", "mnist"])
    parser.add_argument("--probe", nargs="+", default=["stamps", "textile"])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="images to train on")
    parser.add_argument("--passes", help="instead of tying the phases")
    parser.add_argument("--start", type=int, default=20_000, help="positions for least squares")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pixels = torch.zeros(2, 3, options.size, options.size)
    original = reroll.capture(options.model, inputs={"pixel_values": pixels})
    passes = options.passes or f"tie(phases=auto, blocks={options.blocks}, scaling=true)"
    tied = reroll.run_passes(original, passes, measure=False)
    print("\n".join(f"{s.text}: {r}" for s in tied.origin.steps for r in s.remarks))
    seen = image_input(original)
    assert seen is not None
    sets = {name: split(Path("data/images", name)) for name in options.sets}
    tests = {name: sets[name] for name in options.probe}
    teacher = original.to_module().eval()
    table: dict[str, dict[str, float]] = {}

    def measure(name: str, model: Any) -> None:
        row: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
        for label, (train, test) in tests.items():
            train = train[:: max(len(train) // 400, 1)]
            sides = {id(m): features(m, seen, test) for m in (model, teacher)}
            ours, theirs = sides[id(model)], sides[id(teacher)]
            row[f"{label}: cosine, class"] = (
                F.cosine_similarity(ours, theirs, -1)[:, 0].mean().item()
            )
            row[f"{label}: cosine, patches"] = (
                F.cosine_similarity(ours, theirs, -1)[:, 1:].mean().item()
            )
            classes = sorted({p.parent.name for p in train})
            labels, wanted = (
                [classes.index(p.parent.name) for p in part] for part in (train, test)
            )
            given = features(model, seen, train)[:, 0]
            row[f"{label}: linear probe"] = probe(given, labels, ours[:, 0], wanted)
        table[name] = row
        print(name, json.dumps(row), flush=True)

    measure("original", teacher)
    measure("tied, untrained", tied.to_module().eval())
    stage = {"align": {"lr": 1e-3, "train": "all", "free": 1.0, "start_tokens": options.start}}
    recipe = parse({"recover": {"batch": 8, "held_rows": 16, "stages": [stage]}})
    with tempfile.TemporaryDirectory() as work:
        data = Path(work, "images")
        data.mkdir()
        gathered([train for train, _ in sets.values()], options.images, data)
        report = recover(
            tied,
            Path(work, "out"),
            teacher=original,
            data=[data],
            recipe=recipe,
            tokens=options.images * seen.positions,
            on_step=lambda s: (
                print(
                    f"  step {s['steps']}: {s['smooth']:.4f}, {s['seconds_left'] / 60:.0f} minutes"
                )
                if s["steps"] % 10 == 0
                else None
            ),
        )
        for line in report.measures:
            print(json.dumps(line))
        measure("recovered", reroll.load(Path(work, "out")).to_module().eval())
    print("| | " + " | ".join(table) + " |\n| --- |" + " ---: |" * len(table))
    for label in table["original"]:
        cells = (f"{row[label]:,.4g}" for row in table.values())
        print(f"| {label} | " + " | ".join(cells) + " |")
    if options.json:
        whole = {"table": table, "run": vars(report), "options": {**vars(options), "json": None}}
        options.json.write_text(json.dumps(whole, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
