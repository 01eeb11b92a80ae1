"""Checkpoints as safetensors files: lazy reading, and streaming writing shard by shard."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reroll.errors import CheckpointError, ExportError
from reroll.rewrite.checkpoint.safetensors_header import DOWNLOAD_AGAIN, read_header, read_index
from reroll.rewrite.ir.weights.expressions import Meta, meta_of
from reroll.rewrite.ir.weights.sources import missing_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsSource:
    """Source of the tensors of a safetensors checkpoint, read one at a time.

    ``path`` is one file, or a directory with ``model.safetensors`` or an index of shards. The
    constructor checks all headers. Raises CheckpointError if a file is missing, damaged, or names a
    file outside the directory.
    """

    def __init__(self, path: str | Path) -> None:
        file = _checkpoint_file(Path(path))
        if file.name == INDEX_FILE:
            index = read_index(file)
            headers = {shard: read_header(shard) for shard in sorted(set(index.values()))}
            _check_shards(index, headers)
        else:
            headers = {file: read_header(file)}
        # names are read from the shards and not from the index; in the order of safetensors
        self._file_of = {name: file for file, header in headers.items() for name in sorted(header)}
        self._entries = {name: headers[file][name] for name, file in self._file_of.items()}
        self._where = str(path)

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._file_of.keys()

    def meta(self, name: str) -> Meta:
        """Shape and dtype of one tensor; CheckpointError if missing or of an unknown dtype."""
        if name not in self._entries:
            raise missing_tensor(name, self._entries, self._where)
        return self._entries[name].meta(name, self._file_of[name])

    def load(self, name: str) -> Tensor:
        """One tensor; CheckpointError if it is missing or cannot be read."""
        self.meta(name)
        file = self._file_of[name]
        try:
            # opened for each tensor: pages read from a mapped file count as resident until it is
            # closed
            with safe_open(file, framework="pt") as handle:
                # a view would keep the file mapped, and later writes to the file would change it
                return handle.get_tensor(name).clone()  # type: ignore[no-any-return]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"tensor {name!r} cannot be read ({error})", str(file), DOWNLOAD_AGAIN
            ) from error


def has_safetensors(directory: Path) -> bool:
    """Whether a directory has a safetensors checkpoint, complete or not."""
    return any((directory / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def _checkpoint_file(path: Path) -> Path:
    """Return the single safetensors file of a checkpoint, or the index of its shards."""
    if path.suffix == ".safetensors" and path.is_file():
        return path
    for name in (SINGLE_FILE, INDEX_FILE):
        if (path / name).is_file():
            return path / name
    hint = f"the directory needs {SINGLE_FILE} or {INDEX_FILE}"
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        hint += "; pickled weights are not read, since they can run code: save as safetensors"
    raise CheckpointError("there is no safetensors checkpoint", where=str(path), hint=hint)


def _check_shards(file_of: Mapping[str, Path], headers: Mapping[Path, Mapping[str, Any]]) -> None:
    names = {name: file for file, header in headers.items() for name in header}
    for name, file in {**names, **file_of}.items():
        holders = [f for f, header in headers.items() if name in header]
        if len(holders) != 1:
            actual = " and ".join(f.name for f in holders) or "no shard"
            raise CheckpointError(
                f"the index puts tensor {name!r} in {file.name}, but it is in {actual}",
                where=str(file.parent / INDEX_FILE),
                hint=DOWNLOAD_AGAIN,
            )


# ---- writing


def write_file(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to one file; OSError if the disk is full or not writable."""
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as error:
        # the library gives the system's error number only in its message
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_tensors(
    directory: str | Path,
    items: Iterable[tuple[str, Tensor]],
    metas: Mapping[str, Meta],
    max_shard_bytes: int = 2**30,
) -> None:
    """Stream tensors to ``model.safetensors``, or to shards with an index.

    ``metas`` lists all tensors in the order in which ``items`` yields them; the shards are planned
    from it. See `write_shards`.
    """
    shards = plan_shards({name: meta.bytes for name, meta in metas.items()}, max_shard_bytes)
    write_shards(directory, items, [{name: metas[name] for name in shard} for shard in shards])


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Assign names to checkpoint shards of at most `limit` bytes, in order.

    A larger tensor gets a shard of its own.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def write_shards(
    directory: str | Path,
    items: Iterable[tuple[str, Tensor]],
    shards: Sequence[Mapping[str, Meta]],
) -> None:
    """Stream tensors to checkpoint shards, with one shard at a time in memory.

    ``shards`` lists all tensors in the order in which ``items`` yields them. The same tensors give
    the same bytes. Raises ExportError if the directory has a checkpoint already, or if the items
    differ from ``shards``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    old = [*directory.glob("model*.safetensors"), *directory.glob(INDEX_FILE)]
    if old:
        raise ExportError(
            f"there is a checkpoint already ({old[0].name})",
            where=str(directory),
            hint="choose another directory, or delete the old files",
        )
    stream = iter(items)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(_announced(stream, shard))
        write_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(shard, file))
        del tensors
    for name, _ in stream:
        raise ExportError(f"tensor {name!r} was not announced", where=str(directory))
    if len(shards) > 1:
        total = sum(meta.bytes for shard in shards for meta in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX_FILE).write_text(text, encoding="utf-8")


def _announced(
    stream: Iterator[tuple[str, Tensor]], shard: Mapping[str, Meta]
) -> Iterator[tuple[str, Tensor]]:
    """Yield a shard's tensors in order, each with its own memory; ExportError if one differs."""
    storages: set[int] = set()
    for wanted, meta in shard.items():
        name, tensor = next(stream, (None, None))
        if name != wanted or tensor is None:
            raise ExportError(f"tensor {wanted!r} should come next, but {name!r} did")
        if meta_of(tensor) != meta:
            raise ExportError(f"tensor {name!r} is {meta_of(tensor)}, not {meta}")
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        yield name, tensor
