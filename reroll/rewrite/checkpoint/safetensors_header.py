"""Read and check the header of a safetensors file, and the index of checkpoint shards.

The format is eight bytes with the length of a JSON header, the header, then the tensors' bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.errors import CheckpointError, ProgramError
from reroll.rewrite.ir.weights.expressions import DTYPES, Meta

# the limit of the safetensors library itself
MAX_HEADER_BYTES = 100_000_000

DOWNLOAD_AGAIN = "the file is damaged or incomplete: download it again"
DTYPE_OF = {name.upper(): dtype for name, dtype in DTYPES.items()} | {"BOOL": DTYPES["b1"]}


@dataclass(frozen=True)
class Entry:
    """Header entry of one tensor: the format's name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def meta(self, name: str, file: Path) -> Meta:
        """Return the Meta of the tensor; CheckpointError for an unsupported dtype."""
        if self.dtype not in DTYPE_OF:
            raise CheckpointError(
                f"tensor {name!r} has dtype {self.dtype}, which cannot be rewritten",
                where=str(file),
                hint="use a checkpoint of the model that is not quantized",
            )
        return Meta(self.shape, DTYPE_OF[self.dtype])


def read_header(file: Path) -> dict[str, Entry]:
    """Read the entries of a file; CheckpointError if the header or the file's size is invalid."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(file, "it is shorter than its header")
            header = _json_object(stream.read(length), file)
    except OSError as error:
        raise CheckpointError(
            f"it cannot be read ({error.strerror})", str(file), "fetch the missing file"
        ) from error
    header.pop("__metadata__", None)
    return {name: _entry(name, value, size - 8 - length, file) for name, value in header.items()}


def read_index(file: Path, suffix: str = ".safetensors") -> dict[str, Path]:
    """Read the file of each tensor in checkpoint shards; CheckpointError for an invalid index."""
    try:
        weight_map = _json_object(file.read_bytes(), file).get("weight_map")
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror})", str(file)) from error
    if not isinstance(weight_map, dict):
        raise _damaged(file, "it has no weight_map")
    for shard in set(map(str, weight_map.values())):
        # a name like ../x or /etc/x would read outside the checkpoint
        plain = shard == Path(shard).name and "\\" not in shard and "\0" not in shard
        if not plain or not shard.endswith(suffix):
            raise CheckpointError(
                f"{shard!r} is not the plain name of a {suffix} file",
                where=str(file),
                hint="do not use a checkpoint from a source that you do not trust",
            )
        if not file.with_name(shard).is_file():
            raise CheckpointError(
                f"the shard {shard!r} is missing", str(file), "fetch the missing file"
            )
    return {name: file.with_name(str(shard)) for name, shard in weight_map.items()}


def _damaged(file: Path, message: str) -> CheckpointError:
    return CheckpointError(message, where=str(file), hint=DOWNLOAD_AGAIN)


def _json_object(data: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise _damaged(file, "a name occurs twice in its JSON")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "its JSON cannot be read") from error
    if not isinstance(value, dict):
        raise _damaged(file, "its JSON is not an object")
    return value


def _entry(name: str, value: object, data_bytes: int, file: Path) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            entry = Entry(dtype, tuple(shape))
        case _:
            raise _damaged(file, f"the entry of tensor {name!r} is not complete")
    try:
        wanted = entry.meta(name, file).bytes if dtype in DTYPE_OF else end - begin
    except ProgramError as error:
        raise _damaged(file, f"tensor {name!r}: {error.message}") from error
    if not 0 <= begin <= end <= data_bytes or end - begin != wanted:
        raise _damaged(file, f"tensor {name!r} does not lie within the file")
    return entry
