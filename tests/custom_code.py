"""A model that is Python code beside its checkpoint, as hub repositories bring it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests import tiny

CONFIGURATION = """
from transformers import PretrainedConfig


class LoomConfig(PretrainedConfig):
    model_type = "loom"

    def __init__(self, vocab_size=256, width=32, num_hidden_layers=4, heads=4, **options):
        self.vocab_size, self.width, self.heads = vocab_size, width, heads
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**options)
"""

MODEL = '''
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_loom import LoomConfig


class Thread(nn.Module):
    """A layer with attention of its own."""

    def __init__(self, config, index):
        super().__init__()
        self.index, self.heads = index, config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.mix = nn.Linear(config.width, config.width)

    def forward(self, hidden, mask, past):
        batch, length, width = hidden.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        )
        if past is not None:
            key, value = past.update(key, value, self.index)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(-1) @ value
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mix(nn.functional.silu(hidden))


class Loom(PreTrainedModel, GenerationMixin):
    config_class = LoomConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.threads = nn.ModuleList(Thread(config, i) for i in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
        **options,
    ):
        hidden = self.words(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        for thread in self.threads:
            hidden = thread(hidden, mask, past_key_values)
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden), past_key_values=past_key_values
        )
'''


def directory(path: Path, layers: int = 4) -> Path:
    """A checkpoint with its code, a tokenizer, and random weights that matter."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "configuration_loom.py").write_text(CONFIGURATION)
    (path / "modeling_loom.py").write_text(MODEL)
    config = {
        "model_type": "loom",
        "architectures": ["Loom"],
        "num_hidden_layers": layers,
        "vocab_size": tiny.WORDS,
        "auto_map": {
            "AutoConfig": "configuration_loom.LoomConfig",
            "AutoModel": "modeling_loom.Loom",
            "AutoModelForCausalLM": "modeling_loom.Loom",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    made = original(path, from_config=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    state = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    from safetensors.torch import save_file

    save_file(state, path / "model.safetensors", {"format": "pt"})
    tiny.tokenizer().save_pretrained(path)
    return path


def original(path: Path, *, from_config: bool = False) -> Any:
    """The model as transformers opens it when its code is trusted."""
    from transformers import AutoConfig

    if from_config:
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
