"""Compile binaries of a bundle's kernels, without a GPU.

A separate process imports model.py without the interpreter, and compiles the kernels that its
launches would run. The binaries are for hosts with a launcher of their own; model.py compiles from
source.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from reroll.errors import ExportError

FOLDER = "binaries"


def precompile(directory: Path, archs: Sequence[str]) -> list[dict[str, Any]]:
    """Write the binaries, and return the data that a launcher needs.

    Raises ExportError if a kernel does not compile.
    """
    done = subprocess.run(
        [sys.executable, "-m", "reroll.export.triton.precompile", str(directory), *archs],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ExportError("a kernel does not compile", hint=done.stderr.strip()[-300:])
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Compile the bundle in a directory for GPUs, both named on the command line."""
    directory, *archs = sys.argv[1:]
    model = _module(Path(directory))
    folder = Path(directory) / FOLDER
    folder.mkdir(exist_ok=True)
    found = []
    for arch in archs:
        model.architecture = lambda arch=arch: arch
        for run in _runs(model):
            found += _binaries(run, arch, folder)
    sys.stdout.write(json.dumps(found))


def _runs(model: Any) -> list[Callable[[], Any]]:
    """Return calls that launch every kernel of a bundle once, on tensors without data."""
    runs: dict[Any, Callable[[], Any]] = {}
    for site in model.SITES:
        if isinstance(site, model.Recurrence):
            runs[site.scan] = partial(_recurrence, site)
        elif isinstance(site, model.Convolution):
            runs[site.scan] = partial(_convolution, site)
        elif site.near is not None:
            runs[site.near] = partial(_attention, site, model.DTYPE)
    for run, about in model.LINEARS:
        runs[run] = partial(_linear, model, run, about)
    return list(runs.values())


def _binaries(run: Callable[[], Any], arch: str, folder: Path) -> list[dict[str, Any]]:
    from reroll.kernels.audit.compiling import binary, launches

    found = []
    for launch in launches(run):
        data, about = binary(launch, arch)
        kind = "hsaco" if arch.startswith("gfx") else "cubin"
        file = f"{about['name']}.{arch}.{kind}"
        (folder / file).write_bytes(data)
        found.append({"file": f"{FOLDER}/{file}", "arch": arch, **about})
    return found


ROWS, TIME = 2, 64


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _recurrence(site: Any) -> None:
    (keys, values), dtype = site.state, site.dtype
    q, k = (_empty(ROWS, n, TIME, keys, dtype=dtype) for n in (site.heads, site.kv_heads))
    v, shape = _empty(ROWS, site.kv_heads, TIME, values, dtype=dtype), (ROWS, site.kv_heads, TIME)
    g = _empty(*shape, *site.gates[0], dtype=torch.float32) if site.decay else None
    beta = _empty(*shape, dtype=torch.float32) if site.delta else None
    pool = _empty(ROWS, site.kv_heads, keys, values, dtype=torch.float32)
    site.scan(q, k, v, g, beta)
    first = [None if x is None else x[:, :, 0] for x in (q, k, v, g, beta)]
    site.step(*first, pool, _empty(ROWS, dtype=torch.int64))


def _convolution(site: Any) -> None:
    channels, size = site.channels, site.size
    shapes = (ROWS, TIME, channels), (channels, size), (channels,), (ROWS, channels, size - 1)
    x, weight, bias, pool = (_empty(*shape, dtype=site.dtype) for shape in shapes)
    given = weight, bias if site.bias else None
    site.scan(x.transpose(1, 2), *given)
    site.step(x[:, 0], *given, pool, _empty(ROWS, dtype=torch.int64))


def _attention(site: Any, dtype: torch.dtype) -> None:
    sizes = (site.heads, site.k_size), (site.kv_heads, site.k_size), (site.kv_heads, site.v_size)
    q, k, v = (_empty(ROWS, heads, TIME, size, dtype=dtype) for heads, size in sizes)
    first = _empty(ROWS, 1, dtype=torch.int64)
    site.near(q, k, v, site.scale, site.window, site.prefix, first)


def _linear(model: Any, run: Any, about: dict[str, Any]) -> None:
    inputs, rank, outputs, dtype = about["inputs"], about["rank"], 1024, model.DTYPE
    low = (rank, inputs), (outputs, rank)
    layer = model.Layer(
        _empty(outputs, inputs, dtype=dtype),
        _empty(outputs, dtype=dtype) if about["bias"] else None,
        *(_empty(*shape, dtype=dtype) if rank else None for shape in low),
    )
    x: Any = _empty(ROWS, inputs, dtype=dtype)
    if about["norm"]:
        x = model.Normed(x, _empty(inputs, dtype=dtype) if about["gain"] else None, 1e-6)
    run(x, *[layer] * (2 if about["activation"] else 1))


def _module(directory: Path) -> Any:
    spec = spec_from_file_location("model", directory / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["model"] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
