"""The bf16 form of a Hugging Face directory, as most checkpoints are published."""

import shutil
from pathlib import Path

import torch
import transformers


def narrow(source: Path, out: Path) -> None:
    """Save the model in the folder `source` in bf16, with all that stands beside its weights."""

    def weights(folder: str, names: list[str]) -> list[str]:
        # those of further modules, in folders of their own, stay as they are
        own = Path(folder) == source
        return [n for n in names if own and (n.endswith(".safetensors") or n == "config.json")]

    shutil.copytree(source, out, ignore=weights)
    (architecture,) = transformers.AutoConfig.from_pretrained(source).architectures
    cls = getattr(transformers, architecture)
    cls.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(out)
