"""Features of rewritten encoders: how near they are to the original's, and what can be read there.

Paragraphs are read in one padded batch, pictures as the model's processor makes them.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row
from reroll.evaluate.tokenizing import tokenizer_of
from reroll.recover.images import ENDINGS, ImageInput, image_input
from reroll.rewrite.ir.program import Program

IMAGES = Path("data/images")


def near(program: Program, original: Program, options: Namespace) -> Row:
    """Mean cosines of tokens' features, and of what is used of them.

    That is the mean over the tokens of a text, and the class token of the pictures.
    """
    if seen := image_input(program):
        import sklearn.datasets

        paths = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
        ours, theirs = (hidden(p.to_module(), seen, paths) for p in (program, original))
        tokens, used = (ours[:, 1:], theirs[:, 1:]), (ours[:, 0], theirs[:, 0])
    else:
        tokenizer: Any = tokenizer_of(program)
        paragraphs = Path(options.text).read_text(encoding="utf-8").split("\n")
        chosen = [p for p in paragraphs if len(p) > 400][: options.count]
        made = tokenizer(chosen, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = made["attention_mask"]
        inputs = {"input_ids": made["input_ids"], "attention_mask": mask}
        with torch.inference_mode():
            ours, theirs = (p.to_module()(**inputs)[0] for p in (program, original))
        tokens = ours[mask.bool()], theirs[mask.bool()]
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
        used = (ours * weights).sum(1), (theirs * weights).sum(1)
    return {"cosine, tokens": cosine(*tokens), "cosine, used": cosine(*used)}


def cosine(ours: Tensor, theirs: Tensor) -> float:
    """The mean cosine of features [..., width]."""
    return F.cosine_similarity(ours, theirs, -1).mean().item()


def hidden(model: Any, seen: ImageInput, paths: list[Path]) -> Tensor:
    """The last hidden states of images: [images, positions, width]."""
    with torch.inference_mode():
        return torch.cat([
            model.eval()(pixel_values=torch.stack([seen.read(p) for p in paths[i : i + 8]]))[0]
            for i in range(0, len(paths), 8)
        ])  # fmt: skip


# ---- images that are trained on, and others


def split(name: str) -> tuple[list[Path], list[Path]]:
    """The images of a set to train on, and every eighth, to measure on."""
    found = sorted(p for p in (IMAGES / name).rglob("*") if p.suffix in ENDINGS)
    return [p for n, p in enumerate(found) if n % 8], found[::8]


def gathered(options: Namespace) -> list[Path]:
    """A directory with links to images to train on, as many of each set as there are."""
    folder, parts = Path(options.work, "images"), [split(name)[0] for name in options.sets]
    folder.mkdir(exist_ok=True)
    chosen = [p for s in parts for p in s[:: max(len(s) * len(parts) // options.images, 1)]]
    for number, path in enumerate(chosen):
        link = folder / f"{number:05}{path.suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    return [folder]


def probed(program: Program, original: Program, options: Namespace) -> Row:
    """Cosines with the original's features, and the accuracy of a probe, on held-out images."""
    seen, found = image_input(program), Row()
    assert seen is not None
    model, teacher = program.to_module(), original.to_module()
    for name in options.probed:
        train, test = split(name)
        train = train[:: max(len(train) // options.shown, 1)]
        classes = sorted({p.parent.name for p in train})
        labels, wanted = (
            torch.tensor([classes.index(p.parent.name) for p in part]) for part in (train, test)
        )
        ours, theirs = hidden(model, seen, test), hidden(teacher, seen, test)
        given = hidden(model, seen, train)[:, 0]
        found[f"{name}: cosine, class"] = cosine(ours[:, 0], theirs[:, 0])
        found[f"{name}: cosine, patches"] = cosine(ours[:, 1:], theirs[:, 1:])
        found[f"{name}: linear probe"] = probe(given, labels, ours[:, 0], wanted)
    return found


def probe(train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
    """The accuracy of a logistic regression on features [images, width]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=500 / len(train), max_iter=1000)
    return float(make_pipeline(StandardScaler(), regression).fit(train, labels).score(test, wanted))
