"""A GGUF file as a plain Hugging Face directory of fp32 weights."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def smollm_pre_tokenizer() -> PreTokenizer:
    """SmolLM's pre-tokenizer, which splits digits.

    GGUF only names it (`smollm`), and transformers does not know the name.
    """
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def convert(gguf: Path, out: Path, *, pre_tokenizer: PreTokenizer | None = None) -> None:
    """Dequantise the model in `gguf` and save it with its tokenizer in the folder `out`.

    `pre_tokenizer` replaces the one that transformers makes of the GGUF metadata.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    forget_quantization(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove the traces of GGUF that make `save_pretrained` refuse a dequantised model."""
    model.hf_quantizer = None
    for holder, name in (
        (model.config, "quantization_config"),
        (model.config, "_model_name_or_path"),
        (model, "quantization_method"),
        (model, "_is_quantized"),
    ):
        if name in vars(holder):
            delattr(holder, name)
    model.config.dtype = torch.float32
