"""Whisper as a Hugging Face directory, rebuilt from a CTranslate2 model.

CTranslate2 fuses the attention projections: `linear_0` of self-attention holds q, k, v, and
`linear_1` of cross-attention holds k, v. Keys have no bias in Whisper; there it is zero.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from tools.ctranslate2 import read_variables

Variables = dict[str, np.ndarray]
Weights = Iterator[tuple[str, np.ndarray]]

ENGLISH_VOCABULARY = 51864
HEAD_DIM = 64


def convert(source: Path, out: Path) -> None:
    """Write the CTranslate2 model in the folder `source` to the folder `out`."""
    variables = read_variables(source / "model.bin")
    tokenizer = WhisperTokenizer.from_pretrained(source, pad_token="<|endoftext|>")
    model = WhisperForConditionalGeneration(model_config(variables, tokenizer))
    weights = {name: torch.tensor(array).float() for name, array in whisper_weights(variables)}
    model.load_state_dict(weights)
    settings = json.loads((source / "config.json").read_text())
    model.generation_config = generation_config(settings, model.config, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(out)


def model_config(variables: Variables, tokenizer: WhisperTokenizer) -> WhisperConfig:
    """The configuration that the shapes of the variables imply."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    end = tokenizer.eos_token_id
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layer_count(variables, "encoder"),
        decoder_layers=layer_count(variables, "decoder"),
        encoder_attention_heads=width // HEAD_DIM,
        decoder_attention_heads=width // HEAD_DIM,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=variables["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=variables["decoder/position_encodings/encodings"].shape[0],
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        begin_suppress_tokens=[tokenizer.convert_tokens_to_ids("Ġ"), end],
        suppress_tokens=None,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def generation_config(
    settings: dict[str, Any], config: WhisperConfig, tokenizer: WhisperTokenizer
) -> GenerationConfig:
    """What `generate` needs to know of the CTranslate2 model's `config.json`."""
    token = tokenizer.convert_tokens_to_ids
    multilingual = config.vocab_size != ENGLISH_VOCABULARY
    # the tokens that name a language, such as `<|de|>`
    names: list[str] = tokenizer.convert_ids_to_tokens(settings["lang_ids"])
    languages = {
        "lang_to_id": {name: token(name) for name in names},
        "task_to_id": {task: token(f"<|{task}|>") for task in ("transcribe", "translate")},
    }
    return GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        no_timestamps_token_id=token("<|notimestamps|>"),
        max_length=config.max_target_positions,
        begin_suppress_tokens=settings["suppress_ids_begin"],
        suppress_tokens=settings["suppress_ids"],
        alignment_heads=settings["alignment_heads"],
        is_multilingual=multilingual,
        **(languages if multilingual else {}),
    )


def layer_count(variables: Variables, side: str) -> int:
    """The number of layers of the encoder or the decoder."""
    layers = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")}
    return len(layers - {"layer_norm"})


def whisper_weights(variables: Variables) -> Weights:
    """All weights by their names in transformers."""
    for conv in ("conv1", "conv2"):
        yield from linear(variables, f"encoder/{conv}", f"model.encoder.{conv}")
    for side in ("encoder", "decoder"):
        positions = variables[f"{side}/position_encodings/encodings"]
        yield f"model.{side}.embed_positions.weight", positions
        yield from norm(variables, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(layer_count(variables, side)):
            source, target = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            yield from layer(variables, source, target)
    embeddings = variables["decoder/embeddings/weight"]
    yield "model.decoder.embed_tokens.weight", embeddings
    yield "proj_out.weight", embeddings


def layer(variables: Variables, source: str, target: str) -> Weights:
    """The weights of one layer; a decoder's also has cross-attention."""
    norms = {"self_attention": "self_attn_layer_norm", "ffn": "final_layer_norm"}
    if f"{source}/attention/linear_0/weight" in variables:
        norms["attention"] = "encoder_attn_layer_norm"
        yield from cross_attention(variables, f"{source}/attention", f"{target}.encoder_attn")
    yield from self_attention(variables, f"{source}/self_attention", f"{target}.self_attn")
    for block, name in norms.items():
        yield from norm(variables, f"{source}/{block}/layer_norm", f"{target}.{name}")
    yield from linear(variables, f"{source}/ffn/linear_0", f"{target}.fc1")
    yield from linear(variables, f"{source}/ffn/linear_1", f"{target}.fc2")


def self_attention(variables: Variables, source: str, target: str) -> Weights:
    """The projections of a self-attention, split into q, k, v, and its output."""
    weights = np.split(variables[f"{source}/linear_0/weight"], 3)
    biases = np.split(variables[f"{source}/linear_0/bias"], 3)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        yield from projection(name, weight, bias, target)
    yield from linear(variables, f"{source}/linear_1", f"{target}.out_proj")


def cross_attention(variables: Variables, source: str, target: str) -> Weights:
    """The projections of a cross-attention: q, the fused k, v, and its output."""
    yield from linear(variables, f"{source}/linear_0", f"{target}.q_proj")
    weights = np.split(variables[f"{source}/linear_1/weight"], 2)
    biases = np.split(variables[f"{source}/linear_1/bias"], 2)
    for name, weight, bias in zip("kv", weights, biases, strict=True):
        yield from projection(name, weight, bias, target)
    yield from linear(variables, f"{source}/linear_2", f"{target}.out_proj")


def projection(name: str, weight: np.ndarray, bias: np.ndarray, target: str) -> Weights:
    """One of q, k, v; the key's bias is zero and does not exist in transformers."""
    yield f"{target}.{name}_proj.weight", weight
    if name == "k":
        assert not bias.any(), f"{target}: Whisper's keys have no bias"
    else:
        yield f"{target}.{name}_proj.bias", bias


def linear(variables: Variables, source: str, target: str) -> Weights:
    """A linear layer or convolution."""
    yield f"{target}.weight", variables[f"{source}/weight"]
    yield f"{target}.bias", variables[f"{source}/bias"]


def norm(variables: Variables, source: str, target: str) -> Weights:
    """A layer norm."""
    yield f"{target}.weight", variables[f"{source}/gamma"]
    yield f"{target}.bias", variables[f"{source}/beta"]
