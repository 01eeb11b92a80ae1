"""Features of encoders whose attention is replaced, before any training: how near they stay.

Text: paragraphs in one padded batch. Pictures: crops of the two photographs that scikit-learn has.
Each line is the cosine between the features of the original and of the rewritten model, mean over
all tokens that are not padding, and of what is used of them: the mean over tokens for text, the
class token for pictures.

    python -m benchmarks.linearize_encoders [--models minilm-l6-v2,dinov2-small] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

import reroll
from benchmarks.harness import TEXT, WIKI, Table, parse_options

LINEAR = "linearize(mixer=linear, window=0, combine=joint"
RETENTION = "linearize(feature_map=elu, gates=calibrated"
PIPELINES = {
    "window of 16": "window(size=16, sinks=1)",
    "window of 64": "window(size=64, sinks=1)",
    "normalised, elu": f"{LINEAR})",
    "normalised, hedgehog": f"{LINEAR}, feature_map=hedgehog)",
    "half of the layers, hedgehog": f"{LINEAR}, feature_map=hedgehog, keep=2)",
    "normalised with decay": f"{RETENTION}, window=0, combine=joint)",
    "two scans": f"{RETENTION}, window=0)",
    "window of 16 and two scans": f"{RETENTION}, window=16, sinks=1)",
    "the same, joint": f"{RETENTION}, window=16, sinks=1, combine=joint)",
}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def texts(model: str, held_out: Path, count: int) -> dict[str, Tensor]:
    """Long paragraphs as one batch, padded on the right."""
    paragraphs = held_out.read_text(encoding="utf-8").split("\n")
    chosen = [p for p in paragraphs if len(p) > 400][:count]
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = tokenizer(chosen, padding=True, truncation=True, max_length=256, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def pictures(size: int) -> dict[str, Tensor]:
    """Four crops of two photographs."""
    from sklearn.datasets import load_sample_images

    crops = []
    for photograph in load_sample_images().images:
        whole = torch.tensor(photograph).permute(2, 0, 1)[None].float() / 255
        for left in (0, 240):
            crop = whole[..., :400, left : left + 400]
            crops.append(F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True))
    mean, deviation = (torch.tensor(x)[:, None, None] for x in (MEAN, DEVIATION))
    return {"pixel_values": (torch.cat(crops) - mean) / deviation}


def features(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Those of tokens [tokens, width], and those that are used [batch, width]."""
    with torch.inference_mode():
        found = model(**inputs).last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None:
        return found[:, 1:].flatten(0, 1), found[:, 0]
    seen = mask.unsqueeze(-1)
    return found[mask.bool()], (found * seen).sum(1) / seen.sum(1)


def inputs_of(program: Any, path: str, options: Any) -> dict[str, Tensor]:
    """Text or pictures, as the model takes them."""
    types = {n.name: n.meta["type"] for n in program.graph.nodes if n.op == "placeholder"}
    if "pixel_values" in types:
        return pictures(types["pixel_values"].shape[-1])
    return texts(path, options.text, options.count)


def main() -> None:
    """One row for each model and pipeline."""
    options = parse_options(__doc__, models=("minilm-l6-v2", "dinov2-small"), text=WIKI, count=16)
    sample = TEXT / "wiki.train.txt"
    columns = {
        "model": "{}",
        "pipeline": "{}",
        "cosine, tokens": "{:.3f}",
        "cosine, used": "{:.3f}",
    }
    table = Table(options, columns)
    cases = ({"model": model, "pipeline": name} for model in options.models for name in PIPELINES)
    for case in table.missing(cases):
        path = f"models/{case['model']}"
        program = reroll.capture(path, dtype="float32")
        inputs = inputs_of(program, path, options)
        expected = features(program.to_module(), inputs)
        passes = PIPELINES[case["pipeline"]]
        after = reroll.run_passes(program, passes, text=sample, measure=False)
        cosines = [
            F.cosine_similarity(a, b, -1).mean().item()
            for a, b in zip(features(after.to_module(), inputs), expected, strict=True)
        ]
        table.add(case | dict(zip(list(columns)[2:], cosines, strict=True)) | {"passes": passes})


if __name__ == "__main__":
    main()
