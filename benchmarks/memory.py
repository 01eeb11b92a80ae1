"""Peak memory and time of converting a 3B-shaped checkpoint, beside mergekit on the same files.

The script writes a Llama-shaped checkpoint of random bf16 weights in shards, converts it with `tie`
and `relax` in a process of its own, and reports the peak resident memory of that. mergekit, where
it is installed (in its own environment: give its command with --mergekit), does a plain linear
merge of the checkpoint with itself.

    python -m benchmarks.memory --work DIR [--mergekit PATH/TO/mergekit-yaml] [--json FILE]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness import Table, parse_options, run_process

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


def write_checkpoint(directory: Path, shape: dict[str, Any]) -> None:
    """Write a Llama checkpoint of random weights, one shard for every few layers."""
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
    """One row for each side."""
    options = parse_options(
        __doc__, work=Path, mergekit="", threads=2, layers=28, passes=PASSES, keep=False
    )
    if options.work is None:
        raise SystemExit("--work DIR: a folder for about 20 GB of files")
    source, out = options.work / "checkpoint", options.work / "converted"
    if not source.exists():
        write_checkpoint(source, dict(SHAPE, num_hidden_layers=options.layers))
    words = [sys.executable, "-m", "reroll.cli", "convert", source, out]
    commands = {"reroll": [*words, "--passes", options.passes, "--measure", "off"]}
    if options.mergekit:
        recipe = merge_config(source, options.work / "merge.yaml")
        commands["mergekit"] = [options.mergekit, recipe, out, "--lazy-unpickle", "--allow-crimes"]
    columns = {"": "{}", "peak MB": "{:,.0f}", "seconds": "{:.1f}", "written, MB": "{:,.0f}"}
    table = Table(options, columns | {"checkpoint, MB": "{:,.0f}"})
    for case in table.missing({"": side} for side in commands):
        shutil.rmtree(out, ignore_errors=True)
        row = case | run_process(commands[case[""]], options.threads)
        row |= {"written, MB": megabytes(out), "checkpoint, MB": megabytes(source)}
        table.add(row | {"output": None})
    if not options.keep:
        shutil.rmtree(options.work, ignore_errors=True)


def megabytes(directory: Path) -> float:
    """Size of the weights in a directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
