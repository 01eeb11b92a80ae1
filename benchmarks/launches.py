"""How many kernels a bundle launches for one token: with its own kernels around the linear layers,
and with PyTorch's operations in their place.

    TRITON_INTERPRET=1 python -m benchmarks.launches

The model is a random Llama of four layers in bf16; launches do not depend on its width. Operations
that only look at memory in another way are not counted. Nothing is timed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

import reroll
from benchmarks.harness import Row, Table, module_of, parse_options
from reroll.export.triton import Triton
from tests import tiny

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
COLUMNS = {"program": "{}", "launches by PyTorch's operations": "{:d}", "with kernels": "{:d}"}
COLUMNS |= {"for each layer": "{}"}


class Counter(TorchDispatchMode):
    """Counts PyTorch's operations that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def launches(bundle: Any) -> int:
    """Launches of one decoding step of two rows."""
    counter = Counter()  # type: ignore[no-untyped-call]
    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        counter.count += 1
        # what the interpreter does inside is not counted
        with _disable_current_modes():
            return run(executor, *args, **kwargs)

    bundle.prefill([[1, 2, 3]] * 2)
    with patch.object(GridExecutor, "__call__", launch), counter:
        bundle.decode([4, 5])
    return counter.count


def counted(passes: str) -> Row:
    """Launches of a bundle of the model after these passes."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    program = reroll.capture(tiny.llama(LAYERS, vocab_size=64, **sizes).bfloat16())
    with tempfile.TemporaryDirectory() as folder:
        Triton(arch=("sm_90",)).write(
            reroll.run_passes(program, passes, measure=False), Path(folder)
        )
        module = module_of(Path(folder) / "model.py")
        bundle = module.Model(folder)
        ours = launches(bundle)
        # PyTorch's operations in the place of the kernels
        module.ROWS = 0
        module.norm, module.turned, module.gated = module.rms_norm, module.rope, module.glu
        theirs = launches(bundle)
    each = f"{theirs / LAYERS:.1f}, {ours / LAYERS:.1f}"
    return dict(zip(list(COLUMNS)[1:], (theirs, ours, each), strict=True))


def main() -> None:
    """Print a row for each program."""
    table = Table(parse_options(__doc__), COLUMNS)
    for case in table.missing({"program": name} for name in PASSES):
        table.add(case | counted(PASSES[case["program"]]))


if __name__ == "__main__":
    main()
