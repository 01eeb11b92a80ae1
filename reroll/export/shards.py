"""Computing weights into safetensors files, one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from reroll.rewrite.checkpoint import save_tensors
from reroll.rewrite.ir.weights.evaluation import Output, evaluate_outputs, in_order
from reroll.rewrite.ir.weights.expressions import TensorSource

Progress = Callable[[int, int], None]

# what is held while it fills
SHARD_BYTES = 2**29
# no side file is in a folder of such a name
_UNFINISHED = ".shard"


def save_outputs(
    outputs: Sequence[Output],
    source: TensorSource,
    directory: Path,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Compute tensors and write them to `model.safetensors`, or to shards with an index.

    Which shard a tensor is in depends on the order of `outputs` only, not on the order in which
    they are best computed. `progress` is called with the bytes done and the bytes in all.
    """
    shards = _shards(outputs, shard_bytes)
    total = sum(o.expr.meta.bytes for o in outputs)
    done = 0

    def report(tensor: Tensor) -> None:
        nonlocal done
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)

    if len(shards) == 1:
        _save(shards[0], source, directory, report)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, source, directory / _UNFINISHED, report)
        (directory / _UNFINISHED / "model.safetensors").rename(directory / file)
        weight_map.update({o.name: file for o in shard})
    (directory / _UNFINISHED).rmdir()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    held = 0
    for output in outputs:
        size = output.expr.meta.bytes
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(output)
        held += size
    return shards


def _save(
    shard: list[Output], source: TensorSource, directory: Path, report: Callable[[Tensor], None]
) -> None:
    """Write one shard as the only file of a directory."""
    ordered = in_order(shard)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, _, tensor in evaluate_outputs(ordered, source):
            yield name, tensor
            report(tensor)

    metas = {o.name: o.expr.meta for o in ordered}
    save_tensors(directory, tensors(), metas, sum(m.bytes for m in metas.values()) + 1)
