"""What `benchmarks.onnx_speed` puts beside exported graphs: transformers, and llama.cpp."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache

TEXT = "The history of the bicycle begins in"
GREEDY = 32


class Eager:
    """The model in transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def fill(self, context: int) -> None:
        """Random states behind so many tokens."""
        config = self.model.config
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        self.cache = DynamicCache(config=config)
        few = 0.1 * torch.randn(shape[0], shape[1], 128, shape[3])
        whole = few.repeat(1, 1, context // 128, 1)
        for layer in range(config.num_hidden_layers):
            self.cache.update(whole.clone(), whole.clone(), layer)

    def step(self) -> None:
        """One token."""
        with torch.inference_mode():
            self.model(torch.tensor([[7]]), past_key_values=self.cache, use_cache=True)


class Llama:
    """llama.cpp in an environment that has `xllamacpp`; `cache` is the type of keys and values."""

    def __init__(self, python: Path, gguf: Path, cache: str, threads: int) -> None:
        self.name = f"llama.cpp {gguf.stem}, {cache} cache"
        self.folder = tempfile.TemporaryDirectory()
        words: list[object] = [python, Path(__file__).with_name("llama_peer.py"), gguf]
        words += ["--folder", self.folder.name, "--cache", cache, "--threads", threads]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **what: Any) -> Any:
        """The answer to one line of `llama_peer`."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.name} ended: run benchmarks/llama_peer.py by itself to see why"
            )
        return json.loads(line)

    def agrees(self, folder: str, model: Any) -> int:
        """How many of the first `GREEDY` tokens are those of the model in transformers."""
        ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
        length = ids.shape[1]
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=GREEDY, do_sample=False, eos_token_id=None)
        expected = whole[0, length:].tolist()
        found = self.ask(greedy=ids[0].tolist(), count=GREEDY)
        same = [a == b for a, b in zip(found, expected, strict=True)]
        return same.index(False) if False in same else len(same)

    def seconds(self, context: int, steps: int) -> tuple[float, float]:
        """A decoded token: of the processor and of the clock."""
        processor, clock = self.ask(context=context, steps=steps)
        return processor, clock

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()
