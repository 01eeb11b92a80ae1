"""Unusual checkpoint directories: each function changes that of a tiny Llama, or replaces it.

`CASES` maps a name to the function and to what reroll has to do: "right", which is to give the
logits that transformers gives, or the words that its refusal has to contain.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny

Change = Callable[[Path], Path | None]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def base(directory: Path) -> Path:
    """The usual directory of a tiny model, with its tokenizer."""
    return tiny.save(tiny.llama(layers=2), directory, tiny.tokenizer())


# ---- helpers


def config(path: Path, **changes: Any) -> None:
    """Change entries of the configuration; None removes one."""
    data = json.loads((path / "config.json").read_text())
    data.update(changes)
    data = {key: value for key, value in data.items() if value is not None}
    (path / "config.json").write_text(json.dumps(data))


def tensors(path: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor] | None]) -> None:
    """Change the stored tensors."""
    found = load_file(path / WEIGHTS)
    made = change(found)
    save_file(dict(found if made is None else made), path / WEIGHTS, metadata={"format": "pt"})


def cut(file: Path, part: float) -> None:
    """Keep the first part of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])


def shard(path: Path) -> dict[str, str]:
    """Two shards in the place of one file; returns the index's map."""
    found = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(found)
    files = {
        n: f"model-0000{1 + 2 * i // len(names)}-of-00002.safetensors" for i, n in enumerate(names)
    }
    for file in sorted(set(files.values())):
        save_file({n: found[n] for n in names if files[n] == file}, path / file, {"format": "pt"})
    write_index(path, files)
    return files


def write_index(path: Path, files: Mapping[str, str]) -> None:
    """The index of shards."""
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def renamed(rename: Callable[[str], str]) -> Change:
    """Every stored tensor by another name."""

    def change(path: Path) -> None:
        tensors(path, lambda found: {rename(name): t for name, t in found.items()})

    return change


def configured(**changes: Any) -> Change:
    """Other entries of the configuration."""

    def change(path: Path) -> None:
        config(path, **changes)

    return change


def stored_as(dtype: torch.dtype, some: str = "") -> Change:
    """Tensors whose name has `some` in another dtype."""

    def change(path: Path) -> None:
        tensors(path, lambda f: {n: t.to(dtype) if some in n else t for n, t in f.items()})

    return change


def text(name: str, content: str | bytes) -> Change:
    """A file with other contents."""

    def change(path: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)

    return change


def without(*names: str) -> Change:
    """A directory that lacks some files."""

    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


def truncated(name: str, part: float) -> Change:
    """A file that ends too early."""

    def change(path: Path) -> None:
        cut(path / name, part)

    return change


def moved(*parts: str) -> Change:
    """The directory by another path."""

    def change(path: Path) -> Path:
        new = path.parent.joinpath(*parts)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
        return new

    return change


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(path: Path) -> Path | None:
        last = None
        for each in changes:
            last = each(path) or last
        return last

    return change


# ---- changes that take more than a line


def _sharded(path: Path) -> None:
    shard(path)


def _one_shard(path: Path) -> None:
    (path / WEIGHTS).rename(path / "model-00001-of-00001.safetensors")
    names = load_file(path / "model-00001-of-00001.safetensors")
    write_index(path, dict.fromkeys(names, "model-00001-of-00001.safetensors"))


def _missing_shard(path: Path) -> None:
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def _cut_shard(path: Path) -> None:
    shard(path)
    cut(path / "model-00002-of-00002.safetensors", 0.5)


def _swapped_index(path: Path) -> None:
    files = shard(path)
    other = dict(
        zip(sorted(set(files.values())), sorted(set(files.values()), reverse=True), strict=True)
    )
    write_index(path, {name: other[file] for name, file in files.items()})


def _index_of_too_few(path: Path) -> None:
    files = shard(path)
    write_index(path, {n: f for n, f in files.items() if "norm" not in n})


def _index_outside(path: Path) -> None:
    files = shard(path)
    write_index(path, {n: f"../{f}" for n, f in files.items()})


def _index_beside_single(path: Path) -> None:
    names = load_file(path / WEIGHTS)
    write_index(path, dict.fromkeys(names, "model-00001-of-00001.safetensors"))


def _pickled(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def _pickled_shards(path: Path) -> None:
    found = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(found)
    for number, part in enumerate((names[:5], names[5:])):
        torch.save({n: found[n] for n in part}, path / f"pytorch_model-{number}.bin")
    files = {n: f"pytorch_model-{int(i >= 5)}.bin" for i, n in enumerate(names)}
    (path / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )


def _pickled_code(path: Path) -> None:
    (path / WEIGHTS).unlink()
    with (path / "pytorch_model.bin").open("wb") as file:
        torch.save({"a": Path("/")}, file)


def _pickled_beside(path: Path) -> None:
    torch.save({n: t * 0 for n, t in load_file(path / WEIGHTS).items()}, path / "pytorch_model.bin")


def _links(path: Path) -> None:
    """As in the hub's cache: every file is a link to a blob."""
    blobs = path.with_name("blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))


def _linked_directory(path: Path) -> Path:
    link = path.with_name("link")
    link.symlink_to(path)
    return link


def _broken_link(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to(path / "gone")


def _adapter(path: Path) -> None:
    text("adapter_config.json", json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": "some/model", "r": 2, "lora_alpha": 2,
        "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    }))(path)  # fmt: skip
    made = {}
    for layer in range(2):
        for side, shape in (("lora_A", (2, 32)), ("lora_B", (32, 2))):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{side}.weight"
            made[name] = torch.full(shape, 0.1)
    save_file(made, path / "adapter_model.safetensors", {"format": "pt"})


def _adapter_alone(path: Path) -> None:
    _adapter(path)
    (path / "config.json").unlink()
    (path / WEIGHTS).unlink()


def _tied_head_stored(path: Path) -> None:
    config(path, tie_word_embeddings=True)
    tensors(path, lambda f: {**f, "lm_head.weight": f["model.embed_tokens.weight"].clone()})


def _tied_head_left_out(path: Path) -> None:
    config(path, tie_word_embeddings=True)
    tensors(path, lambda f: {n: t for n, t in f.items() if n != "lm_head.weight"})


def _padded_vocabulary(path: Path) -> None:
    def pad(t: Tensor) -> Tensor:
        return torch.cat([t, torch.zeros(20, t.shape[1])])

    config(path, vocab_size=tiny.WORDS + 20)
    wide = ("model.embed_tokens.weight", "lm_head.weight")
    tensors(path, lambda f: {n: pad(t) if n in wide else t for n, t in f.items()})


def _wrong_shape(path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors(path, lambda f: {**f, name: f[name][:-1].contiguous()})


def _transposed(path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors(path, lambda f: {**f, name: f[name].T.contiguous()})


def _drop(part: str) -> Change:
    def change(path: Path) -> None:
        tensors(path, lambda f: {n: t for n, t in f.items() if part not in n})

    return change


def _add(**names: Tensor) -> Change:
    def change(path: Path) -> None:
        tensors(path, lambda f: {**f, **{n.replace("__", "."): t for n, t in names.items()}})

    return change


def _nan(path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors(path, lambda f: {**f, name: torch.full_like(f[name], float("nan"))})


def _subfolder(path: Path) -> None:
    (path / "weights").mkdir()
    (path / WEIGHTS).rename(path / "weights" / WEIGHTS)


def _original_beside(path: Path) -> None:
    (path / "original").mkdir()
    (path / "original" / "params.json").write_text("{}")
    save_file({"x": torch.ones(1)}, path / "original" / "consolidated.00.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(3)}, path / "consolidated.safetensors")


def _consolidated_alone(path: Path) -> None:
    (path / WEIGHTS).rename(path / "consolidated.safetensors")


def _metadata(path: Path) -> None:
    save_file(load_file(path / WEIGHTS), path / WEIGHTS, {"format": "pt", "note": "é" * 100})


def _no_metadata(path: Path) -> None:
    save_file(load_file(path / WEIGHTS), path / WEIGHTS)


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("{}")


def _weights_alone(path: Path) -> Path:
    return path / WEIGHTS


def _gguf(path: Path, count: int = 1) -> None:
    from tests.rewrite.checkpoint.gguf_files import write_gguf

    for number in range(count):
        write_gguf(path / f"model-{number}.gguf")


def _one_gguf(path: Path) -> None:
    _empty(path)
    _gguf(path)


def _two_ggufs(path: Path) -> None:
    _empty(path)
    _gguf(path, 2)


def _gguf_beside(path: Path) -> None:
    _gguf(path)


def _cut_gguf(path: Path) -> Path:
    _empty(path)
    _gguf(path)
    cut(path / "model-0.gguf", 0.4)
    return path / "model-0.gguf"


def _as_bytes(path: Path) -> None:
    (path / "config.json").write_text((path / "config.json").read_text(), encoding="utf-8-sig")


def _quantised(method: str, **settings: Any) -> Change:
    return configured(quantization_config={"quant_method": method, **settings})


RIGHT = "right"
# as the class that the configuration names, which is not one for language
BARE = "bare"
CASES: dict[str, tuple[Change, str]] = {
    "as it is": (both(), RIGHT),
    # the configuration
    "no configuration": (without("config.json"), "config.json"),
    "an empty configuration": (text("config.json", ""), "config.json"),
    "a configuration that is cut": (truncated("config.json", 0.5), "config.json"),
    "a list as configuration": (text("config.json", "[]"), "config.json"),
    "a configuration with a byte order mark": (_as_bytes, "config.json"),
    "a configuration that is not UTF-8": (
        text("config.json", b'{"model_type": "\xe9"}'),
        "config.json",
    ),
    "an unknown model type": (configured(model_type="no_such_type"), "no_such_type"),
    "no model type": (configured(model_type=None), "model_type"),
    "no architectures": (configured(architectures=None), RIGHT),
    "an architecture of another type": (configured(architectures=["GPT2LMHeadModel"]), RIGHT),
    "an unknown architecture": (configured(architectures=["NoSuchModel"]), RIGHT),
    "architectures that are no list": (configured(architectures="LlamaForCausalLM"), RIGHT),
    "a bare architecture": (configured(architectures=["LlamaModel"]), BARE),
    "more layers than are stored": (configured(num_hidden_layers=3), "layers.2"),
    "fewer layers than are stored": (configured(num_hidden_layers=1), RIGHT),
    "another width": (configured(hidden_size=64), "needs"),
    "no layers": (configured(num_hidden_layers=0), RIGHT),
    "numbers as text": (configured(num_hidden_layers="2"), "num_hidden_layers"),
    "dtype float16": (configured(dtype="float16", torch_dtype="float16"), RIGHT),
    "an unknown dtype": (configured(dtype="float7"), "float7"),
    "an unknown activation": (configured(hidden_act="no_such_act"), "no_such_act"),
    # quantised formats
    "bitsandbytes": (_quantised("bitsandbytes", load_in_4bit=True), "quanti"),
    "gptq": (_quantised("gptq", bits=4, group_size=128), "quanti"),
    "awq": (_quantised("awq", bits=4, group_size=128), "quanti"),
    "compressed tensors": (_quantised("compressed-tensors", config_groups={}), "quanti"),
    "an unknown quantisation": (_quantised("no-such-method"), RIGHT),
    "tensors of 8 bits without a configuration": (
        stored_as(torch.float8_e4m3fn, "proj"),
        "F8_E4M3",
    ),
    # tensors
    "extra tensors": (_add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)), RIGHT),
    "a tensor that is missing": (_drop("layers.1.mlp.up_proj"), "layers.1.mlp.up_proj"),
    "no head": (_drop("lm_head"), "lm_head"),
    "no tensors": (_drop(""), "embed_tokens"),
    "a prefix that is missing": (renamed(lambda n: n.removeprefix("model.")), RIGHT),
    "a prefix that is doubled": (renamed(lambda n: f"model.{n}"), RIGHT),
    "a foreign prefix": (renamed(lambda n: f"transformer.{n}"), "embed_tokens"),
    "a wrapper's prefix": (renamed(lambda n: f"module.{n}"), "embed_tokens"),
    "a wrong shape": (_wrong_shape, "up_proj"),
    "a transposed tensor": (_transposed, "up_proj"),
    "half precision": (stored_as(torch.float16), RIGHT),
    "bfloat16": (stored_as(torch.bfloat16), RIGHT),
    "mixed dtypes": (stored_as(torch.bfloat16, "mlp"), RIGHT),
    "double precision": (stored_as(torch.float64), RIGHT),
    "integers": (stored_as(torch.int8, "up_proj"), RIGHT),
    "not a number": (_nan, RIGHT),
    "a tied head that is stored": (_tied_head_stored, RIGHT),
    "a tied head that is not": (_tied_head_left_out, RIGHT),
    "a padded vocabulary": (_padded_vocabulary, RIGHT),
    # files
    "an empty directory": (_empty, "config.json"),
    "a file in its place": (_file_instead, "a file"),
    "the weights alone": (_weights_alone, "a file"),
    "no weights": (without(WEIGHTS), WEIGHTS),
    "weights of no bytes": (text(WEIGHTS, ""), WEIGHTS),
    "weights that are cut": (truncated(WEIGHTS, 0.6), WEIGHTS),
    "a header that is cut": (truncated(WEIGHTS, 0.001), WEIGHTS),
    "weights that are text": (
        text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        WEIGHTS,
    ),
    "shards": (_sharded, RIGHT),
    "one shard": (_one_shard, RIGHT),
    "a shard that is missing": (_missing_shard, "model-00002-of-00002.safetensors"),
    "a shard that is cut": (_cut_shard, "model-00002-of-00002.safetensors"),
    "an index that swaps shards": (_swapped_index, RIGHT),
    "an index of too few tensors": (_index_of_too_few, RIGHT),
    "an index that leads outside": (_index_outside, "plain name"),
    "an index that is no JSON": (both(_sharded, text(INDEX, "{")), INDEX),
    "an index beside a single file": (_index_beside_single, RIGHT),
    "pickled weights": (_pickled, RIGHT),
    "pickled shards": (_pickled_shards, RIGHT),
    "pickled weights that are cut": (
        both(_pickled, truncated("pytorch_model.bin", 0.5)),
        "pytorch_model.bin",
    ),
    "pickled code": (_pickled_code, "pytorch_model.bin"),
    "pickled weights beside others": (_pickled_beside, RIGHT),
    "metadata": (_metadata, RIGHT),
    "no metadata": (_no_metadata, RIGHT),
    "weights in a folder": (_subfolder, WEIGHTS),
    "the original's own format beside": (_original_beside, RIGHT),
    "the original's own format alone": (_consolidated_alone, WEIGHTS),
    "an adapter beside the model": (_adapter, "adapter_config.json"),
    "an adapter alone": (_adapter_alone, "adapter"),
    "one GGUF file": (_one_gguf, "model-0.gguf"),
    "several GGUF files": (_two_ggufs, "model-1.gguf"),
    "a GGUF file beside": (_gguf_beside, RIGHT),
    "a GGUF file that is cut": (_cut_gguf, "model-0.gguf"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), RIGHT),
    "a tokenizer that is cut": (truncated("tokenizer.json", 0.5), RIGHT),
    "generation settings that are broken": (text("generation_config.json", "{"), RIGHT),
    # paths
    "links, as in the hub's cache": (_links, RIGHT),
    "a link to the directory": (_linked_directory, RIGHT),
    "a link to nothing": (_broken_link, WEIGHTS),
    "spaces and other letters": (moved("a model é 模型 %20 [1]"), RIGHT),
    "a deep path": (moved(*["deep" * 10] * 20, "model"), RIGHT),
}
