"""Compiling ahead of time: a few kernels here, all of them by `python -m reroll.kernels.audit`."""

from __future__ import annotations

from typing import Any

import pytest

from reroll.kernels.audit.__main__ import summary, table
from reroll.kernels.audit.sweep import _registers
from reroll.kernels.audit.workers import Worker
from reroll.kernels.configurations import key, manifest

SMALL = {"BT": 16, "BK": 64, "BV": 16, "num_warps": 4, "num_stages": 1}
VARIANT = {"numbers": "bf16", "gate": 1, "size": 64, "limit": 64, "groups": 3, "packed": True}


@pytest.fixture(scope="module")
def worker() -> Any:
    with Worker() as found:
        yield found


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_kernel_compiles_without_a_gpu(worker: Worker, target: str) -> None:
    answer = worker.ask(
        do="measure", family="diagonal", variant=VARIANT, target=target, tiles={"scan": SMALL}
    )
    found = answer["found"]["scan"]
    assert found["problem"] == ""
    assert found["registers"] > 30
    assert found["tensor_core"] > 0


def test_a_spill_is_seen(worker: Worker) -> None:
    greedy = SMALL | {"BT": 64, "BV": 64, "num_warps": 1}
    answer = worker.ask(
        do="measure", family="diagonal", variant=VARIANT, target="sm_80", tiles={"scan": greedy}
    )
    found = answer["found"]["scan"]
    assert found["spilled"] > 0
    assert "spilled" in found["problem"]
    record = {"configuration": "diagonal/sm_80/bf16/gate1/64/64", "kernel": "scan", **found}
    assert "spilled |" in table([record])
    assert "| sm_80 | diagonal | 1 | 1 | 1 | 255 |" in summary([record])


def test_what_does_not_compile_is_reported(worker: Worker) -> None:
    wrong = {"scan": SMALL | {"BT": 17}}
    answer = worker.ask(
        do="measure", family="diagonal", variant=VARIANT, target="sm_90", tiles=wrong
    )
    assert "power of 2" in answer["found"]["scan"]["problem"]


def test_the_manifest_is_what_the_sweep_writes() -> None:
    for at, entry in manifest().items():
        family, target, numbers, gate, size, limit = at.split("/")
        assert at == key(family, target, numbers, int(gate[4:]), int(size), int(limit))
        assert set(entry["registers"]) == set(entry["tiles"])
        sizes = {tile["BT"] for tile in entry["tiles"].values() if "BT" in tile}
        assert len(sizes) <= 1, "kernels of one family share their chunks"
        assert all(size <= int(limit) for size in sizes)
    assert _registers({"found": {"scan": {"registers": 3}}}) == {"scan": 3}
