"""How many kernels a bundle launches for one token: with its own kernels around the linear layers,
and with PyTorch's operations in their place.

    TRITON_INTERPRET=1 python -m benchmarks.launches

The model is a random Llama of four layers in bf16; launches do not depend on its width. Operations
that only look at memory in another way are not counted. Nothing is timed.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime import interpreter

import reroll
from reroll.export.triton import Triton

LAYERS = 4
VIEWS = {
    "view", "_unsafe_view", "reshape", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice",
    "select", "alias", "split", "detach", "permute", "as_strided", "empty", "empty_like",
    "new_empty", "empty_strided",
}  # fmt: skip
PASSES = {
    "as it is": "",
    "linearized": "linearize(mixer=retention, window=16, sinks=4)",
    "tied, relaxed": "tie(blocks=2, init=average), relax(rank=8)",
}


class Counter(TorchDispatchMode):
    """Counts PyTorch's operations that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.count += name not in VIEWS
        return func(*args, **(kwargs or {}))


def model() -> Any:
    """Four layers with shared keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16().eval()


def launches(bundle: Any) -> int:
    """Of one decoding step of two rows."""
    own = 0
    launch = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal own
        own += 1
        # what the interpreter does inside is none of ours
        with torch.utils._python_dispatch._disable_current_modes():
            return launch(self, *args, **kwargs)

    bundle.prefill([[1, 2, 3]] * 2)
    interpreter.GridExecutor.__call__ = counted
    try:
        counter = Counter()  # type: ignore[no-untyped-call]
        with counter:
            bundle.decode([4, 5])
    finally:
        interpreter.GridExecutor.__call__ = launch
    return own + counter.count


def by_torch(loaded: Any) -> None:
    """Put PyTorch's operations in the place of the kernels."""
    loaded.ROWS = 0
    loaded.norm, loaded.turned, loaded.gated = loaded.rms_norm, loaded.rope, loaded.glu


def main() -> None:
    """Print the table."""
    print(
        "| program | launches of a step by PyTorch's operations | with kernels | for each layer |"
    )
    print("| --- | ---: | ---: | --- |")
    for name, passes in PASSES.items():
        program = reroll.capture(model())
        if passes:
            program = reroll.run_passes(program, passes, measure=False)
        with tempfile.TemporaryDirectory() as folder:
            Triton(arch=("sm_90",)).write(program, Path(folder))
            spec = spec_from_file_location("bundle", Path(folder) / "model.py")
            assert spec is not None
            assert spec.loader is not None
            loaded = module_from_spec(spec)
            sys.modules["bundle"] = loaded
            spec.loader.exec_module(loaded)
            bundle = loaded.Model(folder)
            ours = launches(bundle)
            by_torch(loaded)
            theirs = launches(bundle)
        print(f"| {name} | {theirs} | {ours} | {theirs / LAYERS:.1f}, {ours / LAYERS:.1f} |")


if __name__ == "__main__":
    main()
