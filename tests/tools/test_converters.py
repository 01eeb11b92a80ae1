import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from tools.ctranslate2 import read_variables
from tools.errors import PrepareError
from tools.pretrained import check_sha256
from tools.whisper import cross_attention, layer_count, self_attention


def string(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def model_file(weight: np.ndarray) -> bytes:
    shape = struct.pack("<B", weight.ndim) + struct.pack(f"<{weight.ndim}I", *weight.shape)
    variable = string("weight") + shape + struct.pack("<BI", 4, weight.nbytes) + weight.tobytes()
    header = struct.pack("<I", 6) + string("Spec") + struct.pack("<II", 3, 1)
    return header + variable + struct.pack("<I", 1) + string("alias") + string("weight")


def test_reads_variables_and_aliases(tmp_path: Path) -> None:
    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = tmp_path / "model.bin"
    path.write_bytes(model_file(weight))
    variables = read_variables(path)
    assert sorted(variables) == ["alias", "weight"]
    np.testing.assert_array_equal(variables["alias"], weight)


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_file(np.zeros((2, 3), dtype=np.float16))[:-3])
    with pytest.raises(PrepareError, match="ends at byte"):
        read_variables(path)


def test_another_version_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<I", 7))
    with pytest.raises(PrepareError, match="version is 7"):
        read_variables(path)


def test_fused_projections_are_split() -> None:
    rows = np.repeat([1.0, 2.0, 3.0], 2)
    bias = np.repeat([1.0, 0.0, 3.0], 2)
    variables = {
        "a/linear_0/weight": rows[:, None],
        "a/linear_0/bias": bias,
        "a/linear_1/weight": rows[2:, None],
        "a/linear_1/bias": bias[2:],
        "a/linear_2/weight": rows[:, None],
        "a/linear_2/bias": bias,
    }
    own = dict(self_attention(variables, "a", "x"))
    assert [own[f"x.{name}_proj.weight"].flat[0] for name in "qkv"] == [1, 2, 3]
    assert own["x.v_proj.bias"].tolist() == [3, 3]
    assert "x.k_proj.bias" not in own
    cross = dict(cross_attention(variables, "a", "x"))
    assert [cross[f"x.{name}_proj.weight"].flat[0] for name in "kv"] == [2, 3]
    assert cross["x.q_proj.weight"].shape == (6, 1)


def test_layers_are_counted() -> None:
    names = ["encoder/layer_0/ffn", "encoder/layer_1/ffn", "encoder/layer_norm/beta", "decoder/x"]
    assert layer_count({name: np.zeros(1) for name in names}, "encoder") == 2


def test_a_wrong_hash_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    check_sha256(path, hashlib.sha256(b"content").hexdigest())
    with pytest.raises(PrepareError, match="file has the SHA-256"):
        check_sha256(path, "0" * 64)
