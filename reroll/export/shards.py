"""Compute weights into safetensors files, one shard at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from reroll.rewrite.checkpoint.safetensors_files import plan_shards, write_shards
from reroll.rewrite.ir.weights.evaluation import Output, evaluate_outputs, in_order
from reroll.rewrite.ir.weights.expressions import TensorSource

Progress = Callable[[int, int], None]

# bytes of one shard, which are in memory while it is written
SHARD_BYTES = 2**29


def save_outputs(
    outputs: Sequence[Output],
    source: TensorSource,
    directory: Path,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Compute tensors and write them to `model.safetensors`, or to shards with an index.

    The shard of a tensor depends on the order of `outputs` only, not on the order of computing.
    `progress` is called with the bytes written and the total.
    """
    by_name = {o.name: o for o in outputs}
    sizes = {o.name: o.expr.meta.bytes for o in outputs}
    # within a shard, tensors are written as they are computed
    planned = plan_shards(sizes, shard_bytes)
    shards = [in_order([by_name[name] for name in names]) for names in planned]
    total, done = sum(sizes.values()), 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for shard in shards:
            for name, _, tensor in evaluate_outputs(shard, source):
                yield name, tensor
                done += tensor.nbytes
                if progress is not None:
                    progress(done, total)

    write_shards(directory, tensors(), [{o.name: o.expr.meta for o in shard} for shard in shards])
