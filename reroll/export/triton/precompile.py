"""Binaries of a bundle's kernels, for GPUs that are not there.

A process of its own imports model.py without the interpreter, and compiles what its launches
would be. The binaries are for hosts with a launcher of their own; model.py compiles from source.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from reroll.errors import ExportError

FOLDER = "binaries"


def precompile(directory: Path, archs: Sequence[str]) -> list[dict[str, Any]]:
    """Write the binaries; returns what a launcher needs to know. ExportError if one fails."""
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
    """Compile what is named on the command line: a directory, then GPUs."""
    directory, *archs = sys.argv[1:]
    model = _module(Path(directory))
    folder = Path(directory) / FOLDER
    folder.mkdir(exist_ok=True)
    found = []
    for arch in archs:
        model.architecture = lambda arch=arch: arch
        for site in model.SITES:
            if isinstance(site, model.Recurrence):
                found += _site(site, arch, model.DTYPE, folder)
    sys.stdout.write(json.dumps(found))


def _site(site: Any, arch: str, dtype: torch.dtype, folder: Path) -> list[dict[str, Any]]:
    from reroll.kernels.audit.compiling import binary, launches

    rows, time, (keys, values) = 2, 64, site.state

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = empty(rows, site.heads, time, keys), empty(rows, site.kv_heads, time, keys)
    v, shape = empty(rows, site.kv_heads, time, values), (rows, site.kv_heads, time)
    g = empty(*shape, *site.gates[0], dtype=torch.float32) if site.decay else None
    beta = empty(*shape, dtype=torch.float32) if site.delta else None
    pool = empty(rows, site.kv_heads, keys, values, dtype=torch.float32)
    slots = empty(rows, dtype=torch.int64)

    def run() -> None:
        site.scan(q, k, v, g, beta)
        first = [None if x is None else x[:, :, 0] for x in (q, k, v, g, beta)]
        site.step(*first, pool, slots)

    found = []
    for launch in launches(run):
        data, about = binary(launch, arch)
        kind = "hsaco" if arch.startswith("gfx") else "cubin"
        file = f"{about['name']}.{arch}.{kind}"
        (folder / file).write_bytes(data)
        found.append({"file": f"{FOLDER}/{file}", "arch": arch, **about})
    return found


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
