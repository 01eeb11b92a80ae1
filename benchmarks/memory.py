"""Peak memory and time of converting a 3B-shaped checkpoint, beside mergekit on the same files.

The script writes a Llama-shaped checkpoint of random bf16 weights in shards, converts it with `tie`
and `relax` in a process of its own, and reports the peak resident memory of that. mergekit, where
it is installed (in its own environment: give its command with --mergekit), does a plain linear
merge of the checkpoint with itself.

    python -m benchmarks.memory --work DIR [--mergekit PATH/TO/mergekit-yaml] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PASSES = "tie(blocks=14, init=average), relax(rank=64)"
# the sizes of Llama-3.2-3B
SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}


def write_checkpoint(directory: Path, shape: dict[str, Any]) -> int:
    """A Llama checkpoint of random weights, one shard for every few layers; returns its bytes."""
    from transformers import LlamaConfig

    directory.mkdir(parents=True)
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    hidden, ffn = shape["hidden_size"], shape["intermediate_size"]
    heads, kv = shape["num_attention_heads"] * shape["head_dim"], shape["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads, hidden),
        "self_attn.k_proj.weight": (kv * shape["head_dim"], hidden),
        "self_attn.v_proj.weight": (kv * shape["head_dim"], hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    names: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (shape["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    ]
    for start in range(0, shape["num_hidden_layers"], 4):
        stop = min(start + 4, shape["num_hidden_layers"])
        names.append(
            {f"model.layers.{i}.{n}": s for i in range(start, stop) for n, s in layer.items()}
        )
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(names, 1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        tensors = {
            name: torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, size in shard.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measured(command: list[str], threads: int) -> dict[str, Any]:
    """Run a command to its end: its seconds and the peak resident memory of its process, in MB."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{output[-2000:]}")
    return {"seconds": time.perf_counter() - start, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def merge_config(source: Path, file: Path) -> Path:
    """Write the recipe of a plain linear merge of a checkpoint with itself."""
    # by another name: mergekit refuses to merge a path with itself
    again = file.with_name("checkpoint-again")
    again.unlink(missing_ok=True)
    again.symlink_to(source.resolve(), target_is_directory=True)
    models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (source, again)]
    file.write_text(json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
    return file


def main() -> None:
    """Run the comparison and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for about 20 GB of files")
    parser.add_argument("--mergekit", help="the mergekit-yaml command, where there is one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--passes", default=PASSES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    options = parser.parse_args()
    source = options.work / "checkpoint"
    shape = dict(SHAPE, num_hidden_layers=options.layers)
    size = (
        sum(f.stat().st_size for f in source.glob("*.safetensors"))
        if source.exists()
        else write_checkpoint(source, shape)
    )
    rows: dict[str, Any] = {"checkpoint_mb": size / 1e6, "threads": options.threads}
    out = options.work / "converted"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "reroll.cli", "convert", str(source), str(out)]
    rows["reroll"] = measured(
        [*command, "--passes", options.passes, "--measure", "off"], options.threads
    )
    rows["reroll"]["written_mb"] = sum(f.stat().st_size for f in out.glob("*.safetensors")) / 1e6
    if options.mergekit:
        merged = options.work / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        recipe = merge_config(source, options.work / "merge.yaml")
        command = [options.mergekit, str(recipe), str(merged), "--lazy-unpickle", "--allow-crimes"]
        rows["mergekit"] = measured(command, options.threads)
        rows["time_ratio"] = rows["reroll"]["seconds"] / rows["mergekit"]["seconds"]
    print(json.dumps(rows, indent=2))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))
    if not options.keep:
        shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()
