"""Features of encoders whose attention is replaced, before any training: how near they stay.

Text: paragraphs in one padded batch. Pictures: crops of the two photographs that scikit-learn has.
Each line is the cosine between the features of the original and of the rewritten model, mean over
all tokens that are not padding, and of what is used of them: the mean over tokens for text, the
class token for pictures.

    python -m benchmarks.linearize_encoders [--models minilm-l6-v2,dinov2-small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

import reroll

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


def main() -> None:
    """Print a line for each model and pipeline."""
    parser = argparse.ArgumentParser(description="features of linearized encoders, untrained")
    parser.add_argument("--models", default="minilm-l6-v2,dinov2-small")
    parser.add_argument("--held-out", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--calibrate-on", type=Path, default=Path("data/text/wiki.train.txt"))
    parser.add_argument("--count", type=int, default=16, help="paragraphs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sample = options.calibrate_on.read_text(encoding="utf-8")[:60_000]
    rows = []
    for name in options.models.split(","):
        path = f"models/{name}"
        program = reroll.capture(path, dtype="float32")
        named = {n.name: n.meta["type"] for n in program.graph.nodes if n.op == "placeholder"}
        picture = named.get("pixel_values")
        inputs = (
            texts(path, options.held_out, options.count)
            if picture is None
            else pictures(int(picture.shape[-1]))
        )
        original = features(program.to_module(), inputs)
        for what, text in PIPELINES.items():
            after = reroll.run_passes(program, text, text=sample, measure=False)
            pairs = zip(features(after.to_module(), inputs), original, strict=True)
            tokens, used = (float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs)
            rows.append(
                {"model": name, "name": what, "passes": text, "tokens": tokens, "used": used}
            )
            print(f"{name:14s} {what:34s} tokens {tokens:.3f}  used {used:.3f}", flush=True)
            print(*(f"    {r}" for r in after.origin.steps[-1].remarks), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
