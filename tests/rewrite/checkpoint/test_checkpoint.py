"""Safetensors checkpoints: lazy reading, damaged and hostile files, streaming writing."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reroll.errors import CheckpointError, ExportError
from reroll.rewrite.checkpoint import (
    ChainSource,
    MemorySource,
    SafetensorsSource,
    save_tensors,
)
from reroll.rewrite.ir import weights as w

TENSORS = {f"layers.{i}.w": torch.full((4, 8), float(i)) for i in range(5)} | {
    "half": torch.arange(6).bfloat16(),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3),
}
METAS = {name: w.meta_of(tensor) for name, tensor in TENSORS.items()}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_tensors(tmp_path, TENSORS.items(), METAS)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tensors(tmp_path, TENSORS.items(), METAS, max_shard_bytes=300)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    return tmp_path


def assert_same(source: w.TensorSource, tensors: dict[str, Tensor]) -> None:
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert source.meta(name) == w.meta_of(tensor)
        assert torch.equal(source.load(name), tensor)


class TestReading:
    def test_single(self, single: Path) -> None:
        assert_same(SafetensorsSource(single), TENSORS)
        assert_same(SafetensorsSource(single / "model.safetensors"), TENSORS)

    def test_sharded(self, sharded: Path) -> None:
        source = SafetensorsSource(sharded)
        assert_same(source, TENSORS)

    def test_a_loaded_tensor_is_the_callers(self, single: Path) -> None:
        source = SafetensorsSource(single)
        source.load("layers.3.w").zero_()
        assert_same(source, TENSORS)

    def test_missing_tensor_names_the_nearest(self, single: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nearest name is 'layers.4.w'"):
            SafetensorsSource(single).load("layers.44.w")

    def test_chain_takes_the_first(self) -> None:
        first, second = {"a": torch.ones(1)}, {"a": torch.zeros(1), "b": torch.zeros(2)}
        chain = ChainSource([MemorySource(first), MemorySource(second)])
        assert_same(chain, {"a": torch.ones(1), "b": torch.zeros(2)})
        with pytest.raises(CheckpointError, match="no tensor 'c'"):
            chain.meta("c")


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


class TestDamaged:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x08\x00\x00",
            struct.pack("<Q", 100) + b"{}",
            struct.pack("<Q", 2**63) + b"{}",
            file_bytes(b"{"),
            file_bytes(b"[" * 100_000),
            file_bytes([]),
            file_bytes(b'{"a": {"dtype": "F32"'),
            file_bytes(b'{"a": 1, "a": 2}'),
            file_bytes({"a": 3}),
            file_bytes({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
            file_bytes(entry(), b"\0" * 7),
            file_bytes(entry(shape=[3]), b"\0" * 8),
            file_bytes(entry(shape=[-2]), b"\0" * 8),
            file_bytes(entry(shape=["2"]), b"\0" * 8),
            file_bytes(entry(shape=[2**63, 2**63]), b"\0" * 8),
            file_bytes(entry(data_offsets=[8, 0]), b"\0" * 8),
            file_bytes(entry(data_offsets=[-8, 0]), b"\0" * 8),
            file_bytes(entry(data_offsets=[0, 8, 9]), b"\0" * 8),
            file_bytes(entry(dtype=5), b"\0" * 8),
        ],
    )
    def test_file_is_refused_on_opening(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.safetensors: [\s\S]*hint: "):
            SafetensorsSource(tmp_path)

    @given(st.integers(0, 10**6), st.integers(0, 255))
    @settings(max_examples=60, deadline=None)
    def test_any_flipped_byte_is_read_or_refused(
        self, tmp_path_factory: pytest.TempPathFactory, place: int, value: int
    ) -> None:
        directory = tmp_path_factory.mktemp("damaged")
        file = directory / "model.safetensors"
        save_file(TENSORS, file)
        content = bytearray(file.read_bytes())
        content[place % len(content)] = value
        file.write_bytes(content)
        try:
            source = SafetensorsSource(directory)
            for name in source.names():
                source.load(name)
        except CheckpointError as error:
            assert "model.safetensors" in str(error)  # noqa: PT017

    def test_truncated_after_opening(self, single: Path) -> None:
        source = SafetensorsSource(single)
        file = single / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="cannot be read"):
            source.load("half")

    def test_quantized_dtype_is_refused_when_asked_for(self, tmp_path: Path) -> None:
        save_file({"q": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
        source = SafetensorsSource(tmp_path)
        with pytest.raises(CheckpointError, match=r"'q' has dtype F8_E4M3[\s\S]*not quantized"):
            source.meta("q")

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match="can run code"):
            SafetensorsSource(tmp_path)

    @pytest.mark.parametrize(
        ("shard", "message"),
        [
            ("../outside.safetensors", "plain name"),
            ("/etc/outside.safetensors", "plain name"),
            ("sub/x.safetensors", "plain name"),
            ("..\\x.safetensors", "plain name"),
            ("..", "plain name"),
            ("pytorch_model.bin", "plain name"),
            ("gone.safetensors", "'gone.safetensors' is missing"),
            (7, "plain name"),
        ],
    )
    def test_index_stays_inside(self, tmp_path: Path, shard: object, message: str) -> None:
        directory = tmp_path / "model"
        directory.mkdir()
        save_file(TENSORS, tmp_path / "outside.safetensors")
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"half": shard}}))
        with pytest.raises(CheckpointError, match=message):
            SafetensorsSource(directory)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"a":1,"a":2}'])
    def test_bad_index(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"index.json: "):
            SafetensorsSource(tmp_path)

    def test_index_that_does_not_fit_the_shards(self, sharded: Path) -> None:
        index = sharded / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        files = content["weight_map"]
        index.write_text(json.dumps({"weight_map": {**files, "more": files["half"]}}))
        with pytest.raises(CheckpointError, match="the index puts tensor 'more'"):
            SafetensorsSource(sharded)
        # the shards themselves say what they hold
        index.write_text(json.dumps({"weight_map": {**files, "half": files["layers.0.w"]}}))
        assert_same(SafetensorsSource(sharded), TENSORS)
        index.write_text(
            json.dumps({"weight_map": {n: f for n, f in files.items() if n != "half"}})
        )
        assert_same(SafetensorsSource(sharded), TENSORS)

    def test_tensor_in_two_shards(self, sharded: Path) -> None:
        first = sharded / "model-00001-of-00003.safetensors"
        save_file({**load_file(first), "half": TENSORS["half"]}, first)
        with pytest.raises(CheckpointError, match=r"'half' .* and model-0000"):
            SafetensorsSource(sharded)


class TestWriting:
    def test_same_bytes_again(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_tensors(tmp_path / name, TENSORS.items(), METAS, max_shard_bytes=300)
        files = sorted(f.name for f in (tmp_path / "a").iterdir())
        assert len(files) == 4
        for name in files:
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_transformers_layout(self, sharded: Path) -> None:
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(m.bytes for m in METAS.values())
        assert set(index["weight_map"]) == set(TENSORS)
        with safe_open(sharded / index["weight_map"]["half"], "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_one_shard_is_held(self, tmp_path: Path) -> None:
        metas = {f"{i}": w.Meta((8,), torch.float32) for i in range(6)}

        def items() -> Iterator[tuple[str, Tensor]]:
            for i, name in enumerate(metas):
                # two tensors a shard: those before are on disk when the next is asked for
                assert len(list(tmp_path.iterdir())) == i // 2
                yield name, torch.full((8,), float(i))

        save_tensors(tmp_path, items(), metas, max_shard_bytes=64)
        assert_same(
            SafetensorsSource(tmp_path), {f"{i}": torch.full((8,), float(i)) for i in range(6)}
        )

    def test_tensors_that_share_memory(self, tmp_path: Path) -> None:
        base = torch.arange(8.0)
        tensors = {"all": base, "again": base, "part": base[2:4], "t": base.view(2, 4).T}
        metas = {name: w.meta_of(t) for name, t in tensors.items()}
        save_tensors(tmp_path, tensors.items(), metas)
        assert_same(SafetensorsSource(tmp_path), tensors)

    @pytest.mark.parametrize(
        ("items", "message"),
        [
            ([("b", torch.ones(2)), ("a", torch.ones(2))], "'a' should come next, but 'b' did"),
            ([("a", torch.ones(2))], "'b' should come next, but None did"),
            ([("a", torch.ones(2)), ("b", torch.ones(3))], r"'b' is f32\[3\], not f32\[2\]"),
            ([(n, torch.ones(2)) for n in "abc"], "'c' was not announced"),
        ],
    )
    def test_items_must_be_as_announced(self, tmp_path: Path, items, message: str) -> None:
        metas = dict.fromkeys("ab", w.Meta((2,), torch.float32))
        with pytest.raises(ExportError, match=message):
            save_tensors(tmp_path, items, metas)

    def test_an_old_checkpoint_is_not_overwritten(self, single: Path) -> None:
        with pytest.raises(ExportError, match="there is a checkpoint already"):
            save_tensors(single, TENSORS.items(), METAS)
        assert_same(SafetensorsSource(single), TENSORS)
