"""GGUF files: names and layouts of transformers, damaged files."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Quant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reroll.errors import CheckpointError
from reroll.rewrite.checkpoint import GgufSource
from reroll.rewrite.checkpoint.gguf_file import GgufFile

MODELS = Path(__file__).parents[3] / "models"
CONFIG = transformers.LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def permuted(weight: Tensor, heads: int) -> Tensor:
    """The order of rows in which llama.cpp stores queries and keys: rotary pairs side by side."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write(file: Path, tensors: dict[str, Tensor], quantization: dict[str, Quant]) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_string("note", "a small model")
    writer.add_array("tokens", [f"token{i}" for i in range(32)])
    writer.add_array("scores", [float(i) for i in range(32)])
    for name, tensor in tensors.items():
        kind = quantization.get(name, Quant.F32)
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def meta_model() -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(CONFIG)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(CONFIG)


@pytest.fixture
def file(tmp_path: Path, model: transformers.PreTrainedModel) -> Path:
    tensors, kinds = {}, {}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = table.get_name(name, try_suffixes=(".weight",))
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        tensors[stored] = permuted(tensor, heads) if heads else tensor
        kinds[stored] = {"up_proj": Quant.Q8_0, "v_proj": Quant.F16, "o_proj": Quant.BF16}.get(
            name.split(".")[-2], Quant.F32
        )
    write(tmp_path / "model.gguf", tensors, kinds)
    return tmp_path / "model.gguf"


def test_names_and_layouts(file: Path, model: transformers.PreTrainedModel) -> None:
    source = GgufSource(file, meta_model())
    assert set(source.names()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        loaded = source.load(name)
        assert source.meta(name).dtype == loaded.dtype == torch.float32
        assert source.meta(name).shape == tuple(loaded.shape)
        rounded = any(part in name for part in ("up_proj", "v_proj", "o_proj"))
        error = (loaded - tensor).norm() / tensor.norm()
        assert (0 < error < 1e-2) if rounded else torch.equal(loaded, tensor), name


def test_fields(file: Path) -> None:
    fields = GgufFile(file).fields
    assert fields["general.architecture"] == "llama"
    assert fields["note"] == "a small model"
    assert fields["llama.block_count"] == 2


def test_loaded_tensors_are_the_callers(file: Path) -> None:
    source = GgufSource(file, meta_model())
    source.load("model.norm.weight").zero_()
    assert source.load("model.norm.weight").norm() > 0


def test_a_pickled_source_opens_the_file_again(file: Path) -> None:
    source = GgufSource(file, meta_model())
    again = pickle.loads(pickle.dumps(source))
    assert list(again.names()) == list(source.names())
    for name in source.names():
        assert torch.equal(again.load(name), source.load(name))


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", {"output_norm.weight": torch.ones(63)}, {})
    source = GgufSource(tmp_path / "x.gguf", meta_model())
    with pytest.raises(CheckpointError, match=r"f32\[63\].*the model needs \[64\]"):
        source.load("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.0"):
        source.load("model.layers.0.mlp.up_proj.weight")


HEADER = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\3\4" * 8, "does not start with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version is 99"),
        (b"GGU", "ends too early"),
        (HEADER + struct.pack("<QQ", 2**63, 0), "ends too early"),
        (HEADER + struct.pack("<QQ", 0, 2**63), "ends too early"),
        (HEADER + struct.pack("<QQQ", 0, 1, 2**63), "ends too early"),
        # an array that claims to be endless
        (HEADER + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 0, 2**62), "ends too early"),
        (HEADER + struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 2**62), "ends too early"),
        (HEADER + struct.pack("<QQQ1sI", 0, 1, 1, b"k", 77), "unknown type 77"),
        (HEADER + struct.pack("<QQQ1sI", 0, 1, 1, b"\xff", 0), "utf-8"),
        (HEADER + struct.pack("<QQQ1sI", 1, 0, 1, b"t", 99), "99 dimensions"),
        (HEADER + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 99, 0), "unknown type 99"),
        (HEADER + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 4, 0, 0), "outside the file"),
        (HEADER + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 2**62, 0, 0), "absurdly large"),
        (HEADER + struct.pack("<QQQ1sIQIQ", 1, 0, 1, b"t", 1, 5, 8, 0), "not a multiple"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad.gguf: [\s\S]*{message}"):
        GgufFile(tmp_path / "bad.gguf")


def test_truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="outside the file"):
        GgufFile(file)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(file, {"a": torch.ones(2, 32), "b": torch.ones(4)}, {"a": Quant.Q8_0})
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        opened = GgufFile(file)
        with np.errstate(all="ignore"):
            for name in opened.tensors:
                opened.load(name)
    except CheckpointError as error:
        assert "model.gguf" in str(error)  # noqa: PT017


@pytest.mark.slow
def test_real_file() -> None:
    file = MODELS / "gguf" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.is_file():
        pytest.skip(f"{file.name} is not there")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.device("meta"):
        model = type(reference)(reference.config)
    source = GgufSource(file, model)
    assert set(source.names()) == set(reference.state_dict())
    for name, tensor in reference.state_dict().items():
        assert torch.equal(source.load(name), tensor)
