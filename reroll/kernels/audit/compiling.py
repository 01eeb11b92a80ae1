"""Compile one kernel ahead of time, without a GPU, and measure its binary.

`launches` runs a launch function on tensors without data and records what it would launch, so
signatures are those of real calls. `compiled` builds one of these for a target. A binary without
spills need not be fast: speed is not measured.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory per program: CUDA C programming guide, table of technical specifications;
# AMD CDNA 3 instruction set architecture, section 3
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORE = {
    "sm_80": r"\bHMMA", "sm_90": r"\bHG?MMA", "sm_100": r"\b(?:UTC[A-Z]*MMA|HMMA)",
    "gfx942": r"\bv_mfma",
}  # fmt: skip

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """Resources that one kernel's binary needs.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's stack on CUDA; registers that were spilled on AMD.
        shared: bytes of shared memory of a program.
        tensor_core: matrix instructions in the binary.
        error: why there is no binary.
    """

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_core: int = 0
    error: str = ""

    def problem(self, target: str) -> str:
        """Return why this must not be shipped; empty if it may."""
        if self.error:
            return self.error
        if self.spilled:
            return f"{self.spilled} spilled"
        if self.shared > SHARED_LIMIT[target]:
            return f"{self.shared} bytes of shared memory"
        return ""

    def data(self, target: str) -> dict[str, Any]:
        """Return JSON data, including the problem."""
        return {**asdict(self), "problem": self.problem(target)}


def launches(run: Callable[[], Any]) -> list[Launch]:
    """Record what `run` would launch: kernel, arguments and keyword arguments of each."""
    recorded: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        recorded.append((self, args, kwargs))

    with _instead_of_running(note):
        run()
    return recorded


@contextmanager
def _instead_of_running(note: Callable[..., None]) -> Iterator[None]:
    run = JITFunction.run
    JITFunction.run = note
    try:
        yield
    finally:
        JITFunction.run = run


def compiled(launch: Launch, target: str) -> Measured:
    """Compile one launch and read its binary."""
    source, options = _source(launch)
    try:
        built = triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:  # every failure of the compiler is a result of the measurement
        return Measured(error=_reason(error))
    if "cubin" in built.asm:
        return _of_cubin(built.asm["cubin"], built.metadata.shared, target)
    return _of_amdgcn(built.asm["amdgcn"], built.metadata.shared)


def _reason(error: BaseException) -> str:
    """Return the last line of the innermost cause: a compiler's messages quote the source first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:200]


def binary(launch: Launch, target: str) -> tuple[bytes, dict[str, Any]]:
    """Return the binary of a launch, and what a driver needs to load it."""
    source, options = _source(launch)
    built = triton.compile(source, target=TARGETS[target], options=options)
    format_ = "cubin" if "cubin" in built.asm else "hsaco"
    about = {"name": built.metadata.name, "shared": built.metadata.shared, **options}
    return built.asm[format_], about


def _source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    kernel, args, kwargs = launch
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
    # set explicitly, because Triton 3.10 changes the default
    options["enable_fp_fusion"] = True
    arguments = dict(zip(kernel.arg_names, args, strict=False))
    arguments |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    declared = {p.name: p.is_constexpr for p in kernel.params}
    for i, name in enumerate(kernel.arg_names):
        type_, value = _type(arguments[name], declared[name]), arguments[name]
        signature[name] = type_
        if type_ == "constexpr":
            constants[(i,)] = value
        elif type_.startswith("*") or (type_.startswith("i") and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def _type(value: Any, constant: bool) -> str:
    # as in a real launch, the integer 1 is a constant
    if constant or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if abs(value) < 1 << 31 else "i64"
    name: str = triton.runtime.jit.mangle_type(value)
    return name


def _of_cubin(cubin: bytes, shared: int, target: str) -> Measured:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if match is None:
        return Measured(error="cuobjdump says nothing about resources")
    registers, stack, _, local = map(int, match.groups())
    # the stack holds spilled registers only, because the kernels have no arrays
    count = len(re.findall(TENSOR_CORE[target], code))
    return Measured(registers, stack + local, shared, count)


def _of_amdgcn(text: str, shared: int) -> Measured:
    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    return Measured(
        number("vgpr_count"),
        number("vgpr_spill_count"),
        # the text says 0: only the metadata has what a launch requests
        shared,
        len(re.findall(TENSOR_CORE["gfx942"], text)),
    )


def _output(*command: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
