"""Everything that takes a GPU, in one command: are the kernels right there, and how fast are they.

    python -m benchmarks.gpu [MODEL] [--json gpu.json] [--quick]

1. self-test: kernels of mixers, with gradients, and of layers against their references on this
   device; those of a bundle test themselves in 3
2. kernels beside flash-linear-attention (if installed) and `scaled_dot_product_attention`
3. with MODEL (a converted directory): a bundle is exported, tested and decodes, beside the torch
   module

Sides take turns and the median of all turns counts. Exits with 1 if a kernel is wrong. Needs CUDA
or ROCm and under ten minutes. Without a GPU, TRITON_INTERPRET=1 does the first step, and without
that it exits with 2. All is measured anew each time: no result of an earlier run is kept.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import reroll
from benchmarks.harness import Row, in_turns, medians, module_of, parse_options, passing, write_json
from reroll.export.triton import Triton
from reroll.kernels import (
    confidence,
    configurations,
    depth_lora,
    dispatch,
    forms,
    interpreter,
    layers,
    recurrence,
)
from reroll.mixers import make
from reroll.rewrite.analysis import tolerances

# rows, tokens, heads, head size
SHAPES = ((8, 1024, 9, 64), (8, 2048, 9, 64), (4, 2048, 16, 128), (1, 8192, 9, 64))
# of the self-test
TESTED = (2, 100, 3, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the mixers, and whether their kernels have a backward
MIXERS = {"retention": True, "gla": True, "gated_deltanet": False}
NUMBERS = (torch.float32, torch.bfloat16)


def draw(mixer: Any, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Inputs of a mixer on the GPU: queries, keys, values, and gates."""
    rows, length, heads, size = shape
    vectors = [
        torch.randn(rows, length, heads, size, device=DEVICE, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    ]
    gates = [
        g.activation(torch.randn(rows, heads, length, *g.shape, device=DEVICE) + 3)
        for g in mixer.gates(size, size)
    ]
    return [*vectors, *gates]


def selftest() -> Iterator[Row]:
    """Kernels against their definitions: relative errors, and whether they are small."""
    errors = {name: partial(mixer_errors, name) for name in MIXERS} | {"layers": layer_errors}
    for name, errors_of in errors.items():
        for dtype in NUMBERS:
            found = errors_of(dtype)
            # fp32 products may be in tf32 on a GPU
            limit = tolerances.FORWARD_TRITON_FP32 if dtype == torch.float32 else 1e-2
            ok = all(error <= limit for error in found.values())
            yield {"of": name, "dtype": str(dtype), "errors": found, "ok": ok}


def mixer_errors(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Errors of a mixer's kernels: of a sequence, its gradients, and one token more."""
    mixer, trains = make(name), MIXERS[name]
    leaves = [t.detach().requires_grad_(trains) for t in draw(mixer, TESTED, dtype)]
    q, k, v, *gates = leaves
    with dispatch.use("triton"):
        out, (end,) = dispatch.chunk(mixer, q, k, v, gates)
    wanted, (state,) = mixer.parallel(q, k, v, gates)
    errors = {"out": _far(out, wanted), "state": _far(end, state)}
    if trains:
        seed = torch.randn_like(out)
        theirs = torch.autograd.grad(wanted, leaves, seed)
        for family in recurrence.BACKWARDS:
            # not all numbers have tiles of both
            if _has_tiles(family, mixer, k, v):
                with _only(family):
                    ours = torch.autograd.grad(out, leaves, seed, retain_graph=True)
                errors[f"gradients, {family}"] = max(map(_far, ours, theirs))
    q, k, v, *gates = (t[:, :, :1].detach() for t in leaves)
    with dispatch.use("triton"):
        stepped, (after,) = dispatch.step(mixer, q, k, v, gates, (state.detach(),))
    again, (state,) = mixer.step(q, k, v, gates, (state.detach(),))
    return errors | {"step": _far(stepped, again), "after": _far(after, state)}


def layer_errors(dtype: torch.dtype) -> dict[str, float]:
    """Errors of the kernels of `reroll.kernels.layers`."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    x, weight, down, up = random(40, 72), random(200, 72), random(5, 6, 72), random(5, 200, 6)
    depth = torch.arange(40, device=DEVICE) % 5
    tables = depth_lora.tiles_by_depth(depth, 5, depth_lora.ROWS)
    y = layers.depth_lora(x, weight, down, up, *tables, forms.precision())
    wanted = depth_lora.depth_lora_reference(x, weight, down, up, depth)
    sure = layers.confidence(x, weight, forms.precision())
    theirs = confidence.confidence_reference(x, weight)
    errors = dict(zip(theirs._fields, map(_far, sure, theirs), strict=True))
    return {"depth_lora": _far(y, wanted)} | errors


def speed(quick: bool) -> Iterator[Row]:
    """Milliseconds of forward, and of forward with backward, of each side."""
    for shape in SHAPES[: 1 if quick else None]:
        for name, trains in MIXERS.items():
            mixer = make(name)
            inputs = draw(mixer, shape, torch.bfloat16)
            for backward in (False, True):
                sides: dict[str, Callable[[], Any]] = {}
                if trains or not backward:
                    sides["triton"] = passing(_by(mixer, "triton"), inputs, backward)
                if find_spec("fla"):
                    sides["fla"] = passing(_by(mixer, "fla"), inputs, backward)
                if trains and backward:
                    # which of its two forms is quicker has to be measured
                    sides["triton, split"] = _only("diagonal_backward")(sides["triton"])
                attention = partial(scaled_dot_product_attention, is_causal=True)
                sides["sdpa"] = passing(attention, inputs[:3], backward)
                times = medians(in_turns(sides, 20, clock=_clock, warm=3))
                ms = {side: 1e3 * seconds for side, seconds in times.items()}
                yield {"shape": shape, "mixer": name, "backward": backward, "ms": ms}


def _by(mixer: Any, backend: Any) -> Callable[..., Tensor]:
    def forward(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
        with dispatch.use(backend):
            return dispatch.chunk(mixer, q, k, v, list(gates))[0]

    return forward


def _only(family: str) -> Any:
    # the backward of `diagonal` is taken from this family of tiles
    return patch.object(recurrence, "BACKWARDS", (family,))


def _has_tiles(family: str, mixer: Any, k: Tensor, v: Tensor) -> bool:
    gate = 2 if mixer.gates(1, 1)[0].shape else 1
    limit = forms.limit_of(mixer)
    return configurations.find_tiles(family, k, v, gate, forms.precision(), limit) is not None


def end_to_end(model: str, steps: int) -> Row:
    """Tokens per second of decoding, of a bundle and of the torch module."""
    program = reroll.capture(model)
    with tempfile.TemporaryDirectory() as folder:
        target = configurations.target(torch.device(DEVICE))
        Triton(arch=(target,)).write(program, Path(folder))
        bundle = module_of(Path(folder) / "model.py").Model(folder, slots=64)
        module = program.to_module(device=DEVICE)
        found: Row = {"selftest": bundle.selftest()}
        return found | {f"rows {n}": _decoding(bundle, module, n, steps) for n in (1, 64)}


@torch.no_grad()
def _decoding(bundle: Any, module: Any, rows: int, steps: int) -> dict[str, float]:
    ids = torch.randint(3, 1000, (rows, 128), device=DEVICE)
    wanted = module(ids, use_cache=True)
    token = bundle.prefill(ids)[:, -1].argmax(-1)
    same = token == wanted.logits[:, -1].argmax(-1)
    step = partial(module, token[:, None], past_key_values=wanted.past_key_values, use_cache=True)
    found = {"same first token": same.float().mean().item()}
    for name, run in {"bundle": partial(bundle.decode, token), "module": step}.items():
        run()
        start = _clock()
        for _ in range(steps):
            run()
        found[f"{name} tokens/s"] = rows * steps / (_clock() - start)
    return found


def _clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _far(actual: Tensor, wanted: Tensor) -> float:
    return tolerances.relative_rms(actual.float(), wanted.float())


def main() -> None:
    """Print a line for each result, and write all of them."""
    options = parse_options(__doc__, "model*", json=Path("gpu.json"), quick=False)
    if DEVICE == "cpu" and not interpreter.active():
        print("there is no GPU; TRITON_INTERPRET=1 tests the kernels without one")
        sys.exit(2)
    torch.set_float32_matmul_precision("highest")
    parts: dict[str, Iterator[Row]] = {"selftest": selftest()}
    record: Row = {"torch": torch.__version__, "triton": triton.__version__}
    if DEVICE == "cuda":
        record["device"] = torch.cuda.get_device_name()
        parts["speed"] = speed(options.quick)
    for part, rows in parts.items():
        record[part] = []
        for row in rows:
            print(json.dumps(row), flush=True)
            record[part].append(row)
    if DEVICE == "cuda":
        for model in options.model:
            record["decode"] = end_to_end(model, 32 if options.quick else 128)
            print(json.dumps(record["decode"]))
        write_json(options.json, record)
    sys.exit(0 if all(row["ok"] for row in record["selftest"]) else 1)


if __name__ == "__main__":
    main()
