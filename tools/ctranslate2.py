"""A reader for CTranslate2's `model.bin`, version 6, with nothing but struct and numpy.

The file holds, little-endian: the format's version, the name and revision of the model
specification, the variables (name, shape, type, bytes), then aliases of variables. A string is its
length in 16 bits and its bytes, closed by a zero.
"""

import struct
from pathlib import Path

import numpy as np

from tools.errors import PrepareError

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class Reader:
    """A cursor over the bytes of a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if self.at + count > len(self.data):
            raise malformed(f"it ends at byte {len(self.data)}, inside a field")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> int:
        """The next unsigned integer, by its struct letter: B, H or I."""
        (value,) = struct.unpack("<" + kind, self.take(struct.calcsize(kind)))
        return int(value)

    def string(self) -> str:
        """The next string."""
        return self.take(self.number("H")).rstrip(b"\0").decode()

    def array(self) -> np.ndarray:
        """The next variable's value."""
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind = self.number("B")
        if kind not in DTYPES:
            raise malformed(f"data type {kind} is unknown")
        data = self.take(self.number("I"))
        return np.frombuffer(data, DTYPES[kind]).reshape(shape)


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """All variables of a CTranslate2 model by name, aliases included."""
    reader = Reader(path.read_bytes())
    version = reader.number("I")
    if version != 6:
        raise malformed(f"its version is {version}, and this reads version 6")
    reader.string()  # the specification's name
    reader.number("I")  # its revision
    variables = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        variables[name] = reader.array()
    for _ in range(reader.number("I")):
        alias, name = reader.string(), reader.string()
        if name in variables:
            variables[alias] = variables[name]
    return variables


def malformed(what: str) -> PrepareError:
    """The error for a file that this reader cannot follow."""
    return PrepareError(
        f"CTranslate2 model file: {what}",
        "use the pinned package version, or adapt tools/ctranslate2.py to the newer format",
    )
