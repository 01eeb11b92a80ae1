"""Tensors of a GGUF file under the state-dict names of its transformers model.

The table of names and the corrections for each architecture are those of transformers, applied to
one tensor at a time. For example, llama.cpp permutes the rows of Llama's queries and keys, and adds
one to Gemma's norms.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from reroll.errors import CheckpointError
from reroll.rewrite.checkpoint.gguf_file import GgufFile
from reroll.rewrite.checkpoint.model_names import ModelNames
from reroll.rewrite.ir.weights.expressions import Meta, meta_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GgufSource:
    """Source of a GGUF file's tensors, dequantized to fp32 one at a time.

    ``model`` is the Hugging Face model, which may be on the meta device; the names are those of
    its state dict. Raises CheckpointError if the file is damaged or of an unknown architecture.
    """

    def __init__(self, file: str | Path, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self._file = GgufFile(file)
        self._where = str(file)
        self._names = ModelNames(model)
        architecture = self._file.fields.get("general.architecture")
        make = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor: Any = make(config=model.config.to_dict())
        try:
            self._hf_names = _hf_names(model, self._processor)
        except NotImplementedError as error:
            raise CheckpointError(
                f"transformers has no names for GGUF files of {model.config.model_type}",
                where=str(file),
                hint="use the safetensors checkpoint of the model",
            ) from error
        # several tensors of the file may be merged into one: gate and up of experts
        self._parts: dict[str, list[str]] = {}
        self.unread: list[str] = []
        for stored in self._file.tensors:
            name = self._name(stored)
            if name is None:
                self.unread.append(stored)
            else:
                self._parts.setdefault(name, []).append(stored)
        first = [re.sub(r"(?<=\.)\d+(?=\.)", "0", stored) for stored in self.unread]
        self.beyond = [n for n, zero in zip(self.unread, first, strict=True) if self._name(zero)]

    def names(self) -> Iterable[str]:
        """Return the state-dict names of the tensors that the file has."""
        return self._names.available(self._parts)

    @property
    def stored(self) -> Collection[str]:
        """Names of the tensors that are stored under their own names, not under a tied one."""
        return self._parts.keys()

    def _name(self, stored: str) -> str | None:
        """Return the model's name of a tensor of the file; None if it has none."""
        name = self._hf_names.get(stored) or self._hf_names.get(stored.removesuffix(".weight"))
        return name if name is not None and name in self._names else None

    def meta(self, name: str) -> Meta:
        """Return shape and dtype (fp32) of one tensor; CheckpointError if missing."""
        return self._names.meta(self._names.resolve(name, self._parts, self._where), torch.float32)

    def load(self, name: str) -> Tensor:
        """Load one tensor; CheckpointError if it is missing or does not fit the model."""
        name = self._names.resolve(name, self._parts, self._where)
        collected: dict[str, Any] = {"tensors": {}}
        tensor = None
        for stored in self._parts[name]:
            done = self._processor.process(
                weights=self._file.load(stored).numpy(),
                name=stored,
                tensor_key_mapping=self._hf_names,
                parsed_parameters=collected,
            )
            # a processor that merges or renames tensors returns no name, and stores its result here
            tensor = collected["tensors"].get(name) if done.name is None else done.weights
        if tensor is None:
            raise CheckpointError(f"{name!r} cannot be made from this file", where=self._where)
        result = torch.as_tensor(tensor).contiguous()
        self._names.check(name, meta_of(result), self._where)
        return result


def _hf_names(model: PreTrainedModel, processor: Any) -> dict[str, str]:
    """Map each tensor name that a GGUF file may have to its name in the model."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    # transformers rebuilds one large table for every submodule, which takes half a minute
    make_table = gguf.get_tensor_name_map
    with mock.patch.object(gguf, "get_tensor_name_map", functools.cache(make_table)):
        names: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    return names
