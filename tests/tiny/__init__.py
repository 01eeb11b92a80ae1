"""Tiny random models with tokenizers, saved as transformers saves them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
    XLMConfig,
    XLMWithLMHeadModel,
)

from reroll.rewrite.analysis.samples import sample_text

Model = TypeVar("Model", bound=PreTrainedModel)

WORDS = 300
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}<assistant> "


@cache
def _trained() -> str:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    trained.train_from_iterator([sample_text()], trainer)
    return trained.to_str()


def tokenizer(prefix: bool = False, suffix: bool = False) -> Any:
    """A byte-level tokenizer of `WORDS` tokens that puts `<s>` before or `</s>` after a text."""
    made = Tokenizer.from_str(_trained())
    if prefix or suffix:
        template = f"{'<s> ' if prefix else ''}$A{' </s>' if suffix else ''}"
        made.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )


def llama(layers: int = 4, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A decoder that has learned nothing, far enough from uniform that passes change it."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": WORDS,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return _made(LlamaForCausalLM, LlamaConfig(**{**sizes, **options}), seed)


def bert(seed: int = 0) -> BertModel:
    """An encoder of text."""
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=WORDS,
        max_position_embeddings=128,
    )
    return _made(BertModel, config, seed)


def xlm(seed: int = 0) -> XLMWithLMHeadModel:
    """A model that makes a mask of its tokens, and generates from a mask token at the end."""
    config = XLMConfig(
        emb_dim=32,
        n_layers=2,
        n_heads=4,
        vocab_size=WORDS,
        max_position_embeddings=128,
        pad_token_id=0,
        mask_token_id=5,
    )
    return _made(XLMWithLMHeadModel, config, seed)


def vit(seed: int = 0) -> ViTModel:
    """An encoder of images of 16 by 16 pixels."""
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    return _made(ViTModel, config, seed)


def _made(cls: type[Model], config: PreTrainedConfig, seed: int) -> Model:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: Model = cls(config)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.train(False)
    return model


def save(model: PreTrainedModel, directory: Path, tokens: Any | None = None) -> Path:
    """The model, and a tokenizer if there is one, as a directory."""
    model.save_pretrained(directory)
    if tokens is not None:
        tokens.save_pretrained(directory)
    return directory
