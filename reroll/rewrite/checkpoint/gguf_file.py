"""Reader of GGUF files that checks every length in the header.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the gguf
package builds an object for each token of the vocabulary and trusts the lengths in the file. A
damaged file can make it run endlessly. Its tables of types and its dequantization are used here.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reroll.errors import CheckpointError, ProgramError
from reroll.rewrite.ir.weights.expressions import Meta

VERSIONS = (2, 3)
MAX_DIMS = 8
MAX_NESTING = 4
# sizes of the scalar value types by their number; 8 is a string, 9 an array
_FORMATS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?"])) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# arrays of up to this many numbers are read: one number per layer, but not one per token
KEPT_ITEMS = 1024


@dataclass(frozen=True)
class GgufTensor:
    """Record of one tensor: shape in the order of torch, quantization, offset and size in bytes."""

    meta: Meta
    quantization: Any
    offset: int
    stored_bytes: int


class GgufFile:
    """Metadata (scalars, strings, short arrays of numbers) and tensors of a GGUF file.

    Raises CheckpointError if the file is no GGUF file, is damaged, or is truncated.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # the data is a map of the file, which is opened again
        return GgufFile, (self.path,)

    def __init__(self, file: str | Path) -> None:
        self.path = Path(file)
        try:
            self._data: Any = np.memmap(self.path, mode="r", dtype=np.uint8)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"it cannot be read ({error})", where=str(file)) from error
        # slices of a memoryview are much cheaper than those of an array
        self._header: memoryview = self._data.data
        self._at = 0
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read_header()
        except (_Damage, UnicodeDecodeError, ProgramError) as error:
            reason = error.message if isinstance(error, ProgramError) else error
            raise CheckpointError(
                f"it is not a whole GGUF file: {reason}",
                where=str(file),
                hint="download it again",
            ) from error

    def load(self, name: str) -> Tensor:
        """Load one tensor, dequantized to fp32; CheckpointError if its quantization is unknown."""
        from gguf import dequantize

        tensor = self.tensors[name]
        raw = self._data[tensor.offset : tensor.offset + tensor.stored_bytes]
        # rows of bytes, since a block of quantized numbers never spans two rows
        rows = np.asarray(raw).reshape(*tensor.meta.shape[:-1], -1)
        try:
            values = dequantize(rows, tensor.quantization)
        except NotImplementedError as error:
            raise CheckpointError(
                f"tensor {name!r} is stored as {tensor.quantization.name}, "
                "which the gguf package cannot dequantize",
                where=str(self.path),
            ) from error
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    # ---- header

    def _read_header(self) -> None:
        if bytes(self._take(4)) != b"GGUF":
            raise _Damage("it does not start with GGUF")
        version = self._scalar("I")
        if version not in VERSIONS:
            raise _Damage(f"its version is {version}")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        for _ in range(field_count):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"), 0)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Damage("its alignment is not a size")
        start = -(-self._at // alignment) * alignment
        for name, meta, quantization, offset in infos:
            self._add_tensor(name, meta, quantization, start + offset)

    def _add_tensor(self, name: str, meta: Meta, quantization: Any, offset: int) -> None:
        from gguf.quants import quant_shape_to_byte_shape

        try:
            stored = math.prod(quant_shape_to_byte_shape(meta.shape, quantization))
        except ValueError as error:
            raise _Damage(str(error)) from error
        if name in self.tensors or offset + stored > len(self._data):
            raise _Damage(f"tensor {name!r} occurs twice or lies outside the file")
        self.tensors[name] = GgufTensor(meta, quantization, offset, stored)

    def _tensor_info(self) -> tuple[str, Meta, Any, int]:
        from gguf import GGMLQuantizationType

        name = self._string()
        dims = self._scalar("I")
        if not 1 <= dims <= MAX_DIMS:
            raise _Damage(f"tensor {name!r} has {dims} dimensions")
        # GGUF lists the fastest-varying dimension first
        shape = tuple(self._scalar("Q") for _ in range(dims))[::-1]
        type_number = self._scalar("I")
        try:
            quantization = GGMLQuantizationType(type_number)
        except ValueError as error:
            raise _Damage(f"tensor {name!r} has the unknown type {type_number}") from error
        return name, Meta(shape, torch.float32), quantization, self._scalar("Q")

    def _value(self, type_number: int, depth: int) -> Any:
        """Read a scalar, a string, or a tuple of numbers; skip other arrays and return None."""
        if type_number == _STRING:
            return self._string()
        if type_number in _FORMATS:
            return self._scalar(_FORMATS[type_number])
        if type_number != _ARRAY or depth >= MAX_NESTING:
            raise _Damage(f"a field has the unknown type {type_number}")
        item, count = self._scalar("I"), self._scalar("Q")
        if item in _FORMATS:
            raw = self._take(count * struct.calcsize(_FORMATS[item]))
            return struct.unpack(f"<{count}{_FORMATS[item]}", raw) if count <= KEPT_ITEMS else None
        # every item has at least one byte, so the size of the file bounds the loop
        for _ in range(count):
            self._value(item, depth + 1)
        return None

    def _string(self) -> str:
        return bytes(self._take(self._scalar("Q"))).decode()

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, count: int) -> memoryview:
        if count > len(self._header) - self._at:
            raise _Damage("it ends too early")
        self._at += count
        return self._header[self._at - count : self._at]


class _Damage(Exception):
    """Damage of the file; reported as a CheckpointError."""
