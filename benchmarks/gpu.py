"""Everything that takes a GPU, in one command: are the kernels right there, and how fast are they.

    python -m benchmarks.gpu [MODEL] [--json gpu.json] [--quick]

1. self-test: kernels of mixers, with gradients, and of layers against their references on this
   device; those of a bundle test themselves in 3
2. kernels beside flash-linear-attention (if installed) and `scaled_dot_product_attention`
3. with MODEL (a converted directory): a bundle is exported, tested and decodes, beside the torch
   module

Sides take turns and the median of all turns counts. Exits with 1 if a kernel is wrong. Needs CUDA
or ROCm and under ten minutes. Without a GPU, TRITON_INTERPRET=1 does the first step, and without
that it exits with 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
DEVICE = "cuda"
# of the self-test
TESTED = (2, 100, 3, 64)
MIXERS = ("retention", "gla", "gated_deltanet")
NUMBERS = (torch.float32, torch.bfloat16)


def draw(mixer: Any, shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Any]:
    """Inputs of a mixer on the GPU."""
    rows, length, heads, size = shape
    q, k, v = (
        torch.randn(rows, length, heads, size, device=DEVICE, dtype=dtype).transpose(1, 2)
        for _ in range(3)
    )
    gates = [
        g.activation(torch.randn(rows, heads, length, *g.shape, device=DEVICE) + 3)
        for g in mixer.gates(size, size)
    ]
    return [q, k, v, gates]


def selftest() -> list[dict[str, Any]]:
    """Kernels against their definitions: relative errors, and whether they are small."""
    found = []
    for name in MIXERS:
        for dtype in NUMBERS:
            mixer = make(name)
            trains = name != "gated_deltanet"
            q, k, v, gates = draw(mixer, TESTED, dtype)
            leaves = [t.detach().requires_grad_(trains) for t in (q, k, v, *gates)]
            queries, keys, values, *rest = leaves
            with dispatch.use("triton"):
                out, (end,) = dispatch.chunk(mixer, queries, keys, values, rest)
            wanted, (state,) = mixer.parallel(queries, keys, values, rest)
            errors = {"out": _far(out, wanted), "state": _far(end, state)}
            if trains:
                seed = torch.randn_like(out)
                theirs = torch.autograd.grad(wanted, leaves, seed)
                for family in recurrence.BACKWARDS:
                    # not all numbers have tiles of both
                    if not _has_tiles(family, mixer, k, v):
                        continue
                    with _only(family):
                        ours = torch.autograd.grad(out, leaves, seed, retain_graph=True)
                    errors[f"gradients, {family}"] = max(map(_far, ours, theirs))
            queries, keys, values, *rest = (t[:, :, :1].detach() for t in leaves)
            with dispatch.use("triton"):
                stepped = dispatch.step(mixer, queries, keys, values, rest, (state.detach(),))
            again = mixer.step(queries, keys, values, rest, (state.detach(),))
            errors |= {
                "step": _far(stepped[0], again[0]),
                "after": _far(stepped[1][0], again[1][0]),
            }
            found.append(_tested(name, dtype, errors))
    return found + [_tested("layers", dtype, layers_far(dtype)) for dtype in NUMBERS]


def layers_far(dtype: torch.dtype) -> dict[str, float]:
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
    return {"depth_lora": _far(y, wanted)} | {
        name: _far(a, b) for name, a, b in zip(theirs._fields, sure, theirs, strict=True)
    }


def _tested(name: str, dtype: torch.dtype, errors: dict[str, float]) -> dict[str, Any]:
    # fp32 products may be in tf32 on a GPU
    limit = tolerances.FORWARD_TRITON_FP32 if dtype == torch.float32 else 1e-2
    ok = all(e <= limit for e in errors.values())
    return {"of": name, "dtype": str(dtype), "errors": errors, "ok": ok}


def speed(quick: bool) -> list[dict[str, Any]]:
    """Milliseconds of forward, and of forward with backward, of each side."""
    found = []
    for shape in SHAPES[: 1 if quick else None]:
        for name in MIXERS:
            mixer = make(name)
            q, k, v, gates = draw(mixer, shape, torch.bfloat16)
            for backward in (False, True):
                sides: dict[str, Callable[[], Any]] = {}
                for backend in ("triton", "fla"):
                    if backend == "fla" and find_spec("fla") is None:
                        continue
                    if backend == "triton" and backward and name == "gated_deltanet":
                        continue
                    sides[backend] = _run(mixer, backend, q, k, v, gates, backward)
                if backward and "triton" in sides:
                    # which of its two forms is quicker has to be measured
                    sides["triton, split"] = _split(sides["triton"])
                sides["sdpa"] = _attention(q, k, v, backward)
                times = turns(sides)
                found.append({"shape": shape, "mixer": name, "backward": backward, "ms": times})
    return found


def _has_tiles(family: str, mixer: Any, k: Tensor, v: Tensor) -> bool:
    gate = 2 if mixer.gates(1, 1)[0].shape else 1
    limit = forms.limit_of(mixer)
    return configurations.find_tiles(family, k, v, gate, forms.precision(), limit) is not None


@contextmanager
def _only(family: str) -> Iterator[None]:
    """Take the backward of `diagonal` from this family of tiles."""
    before = recurrence.BACKWARDS
    recurrence.BACKWARDS = (family,)
    try:
        yield
    finally:
        recurrence.BACKWARDS = before


def _split(run: Callable[[], Any]) -> Callable[[], Any]:
    def split() -> None:
        with _only("diagonal_backward"):
            run()

    return split


def _run(
    mixer: Any, backend: Any, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], backward: bool
) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_(backward) for t in (q, k, v, *gates)]
    queries, keys, values, *rest = leaves

    def run() -> None:
        with dispatch.use(backend):
            out, _ = dispatch.chunk(mixer, queries, keys, values, rest)
        if backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def _attention(q: Tensor, k: Tensor, v: Tensor, backward: bool) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_(backward) for t in (q, k, v)]
    queries, keys, values = leaves

    def run() -> None:
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        if backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def turns(sides: dict[str, Callable[[], Any]], count: int = 20) -> dict[str, float]:
    """The median milliseconds of each side, which take turns."""
    for run in sides.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(count):
        for name, run in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def end_to_end(model: str, quick: bool) -> dict[str, Any]:
    """Tokens per second of decoding, of a bundle and of the torch module."""
    import reroll
    from reroll.export.triton import Triton
    from reroll.kernels.configurations import target

    program = reroll.capture(model)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        Triton(arch=(target(torch.device(DEVICE)),)).write(program, Path(folder))
        bundle = _load(Path(folder)).Model(folder, slots=64)
        found["selftest"] = bundle.selftest()
        module = program.to_module(device=DEVICE)
        for rows in (1, 64):
            found[f"rows {rows}"] = _decoding(bundle, module, rows, 32 if quick else 128)
    return found


def _decoding(bundle: Any, module: Any, rows: int, steps: int) -> dict[str, float]:
    ids = torch.randint(3, 1000, (rows, 128), device=DEVICE)
    with torch.no_grad():
        wanted = module(ids, use_cache=True)
    logits = bundle.prefill(ids)
    token = logits[:, -1].argmax(-1)
    same = token == wanted.logits[:, -1].argmax(-1)

    def step() -> None:
        module(token[:, None], past_key_values=wanted.past_key_values, use_cache=True)

    return {
        "same first token": same.float().mean().item(),
        "bundle tokens/s": rows * steps / _seconds(lambda: bundle.decode(token), steps),
        "module tokens/s": rows * steps / _seconds(step, steps),
    }


def _seconds(run: Callable[[], Any], count: int) -> float:
    with torch.no_grad():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _far(actual: Tensor, wanted: Tensor) -> float:
    return tolerances.relative_rms(actual.float(), wanted.float())


def _load(directory: Path) -> Any:
    spec = spec_from_file_location("bundle", directory / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["bundle"] = module
    spec.loader.exec_module(module)
    return module


def _interpreted() -> None:
    """What can be done without a GPU."""
    global DEVICE
    if not interpreter.active():
        print("there is no GPU; TRITON_INTERPRET=1 tests the kernels without one")
        sys.exit(2)
    DEVICE = "cpu"
    found = selftest()
    for one in found:
        print(json.dumps(one))
    sys.exit(0 if all(one["ok"] for one in found) else 1)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a directory that reroll convert wrote")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--quick", action="store_true", help="one shape, fewer steps")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        _interpreted()
    import triton

    torch.set_float32_matmul_precision("highest")
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "selftest": selftest(),
        "speed": speed(chosen.quick),
    }
    if chosen.model:
        record["decode"] = end_to_end(chosen.model, chosen.quick)
    chosen.json.write_text(json.dumps(record, indent=1) + "\n")
    for one in record["selftest"]:
        print(one)
    for one in record["speed"]:
        print(one)
    print(record.get("decode", "no model was given"))
    sys.exit(0 if all(one["ok"] for one in record["selftest"]) else 1)


if __name__ == "__main__":
    main()
