"""How many kernels a bundle launches for one token, counted in the interpreter."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

import reroll
from benchmarks.harness import Table, module_of
from reroll.export.triton import Triton
from tests import tiny

LAYERS = 4


def measure(table: Table, options: Namespace) -> None:
    """Add a row for each program: launches by PyTorch's operations, and with kernels."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    program = reroll.capture(tiny.llama(LAYERS, vocab_size=64, **sizes).bfloat16())
    for case in table.missing({"program": name} for name in options.pipelines):
        passes = options.pipelines[case["program"]]
        with tempfile.TemporaryDirectory() as folder:
            rewritten = reroll.run_passes(program, passes, measure=False)
            Triton(arch=("sm_90",)).write(rewritten, Path(folder))
            module = module_of(Path(folder) / "model.py")
            bundle = module.Model(folder)
            ours = counted(bundle, options.views)
            # PyTorch's operations in the place of the kernels
            module.ROWS = 0
            module.norm, module.turned, module.gated = module.rms_norm, module.rope, module.glu
            theirs = counted(bundle, options.views)
        for title, count in (("by PyTorch's operations", theirs), ("with kernels", ours)):
            case |= {title: count, f"a layer {title}": count / LAYERS}
        table.add(case)


def counted(bundle: Any, views: list[str]) -> int:
    """Launches of one decoding step of two rows."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += func.__name__.split(".")[0] not in views
            return func(*args, **(kwargs or {}))

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
