"""Load a saved model as transformers' `from_pretrained` does."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reroll.errors import ContextError, UsageError
from reroll.rewrite.checkpoint.hub import directory_of
from reroll.rewrite.checkpoint.saved import load_program
from reroll.rewrite.ir.dtypes import retype
from reroll.rewrite.ir.program import Program
from reroll.runtime.models.auto import model_class
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.heads import program_for
from reroll.runtime.models.placing import Placing
from reroll.runtime.models.saving import ADAPTER_FILES


def load_model(
    cls: Any,
    name: Any,
    *,
    config: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    subfolder: str = "",
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: Any = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, Any] | None = None,
    adapter_kwargs: dict[str, Any] | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load the lowered model of a directory or hub repository that reroll saved, in eval mode.

    `dtype` is the Program's own or "auto", or fp32 for one in half precision. `device_map` is a
    device, a device for each module, or "auto" and the like, with `max_memory` by device; modules
    on "disk" have their weights in `offload_folder`. `state_dict` has weights to use instead of the
    directory's. Other arguments change entries of the configuration, as in transformers.

    Raises UsageError for options that a lowered model does not support, such as quantisation on
    load, and for a class that does not run this model.
    """
    _refuse_meta()
    name = name or getattr(config, "name_or_path", None)
    if not name:
        raise UsageError(
            "the program of a lowered model is in its directory, and none is named",
            where=f"{cls.__name__}.from_pretrained",
            hint="name the directory, with state_dict if the weights are others",
        )
    hub = {
        key: kwargs.pop(key, None) for key in ("revision", "cache_dir", "token", "local_files_only")
    }
    directory = directory_of(str(name), **hub) / (subfolder or "")
    directory, adapter = _base_and_adapter(directory, adapter_kwargs)
    program = load_program(directory)
    new_config = _config(directory, str(name), config, kwargs)
    program = program_for(cls.__name__, program, new_config, str(name))
    program = retype(program, torch_dtype if dtype is None else dtype)
    new_config.dtype = program.dtype
    model = model_class(program)(new_config, program)
    Placing(device_map, max_memory, offload_folder, offload_buffers).fill(model)
    if state_dict is not None:
        model.load_state_dict(state_dict, strict=False)
    if adapter is not None:
        model.load_adapter(str(adapter))
    model.eval()
    if not output_loading_info:
        return model
    empty: dict[str, Any] = {
        k: set() for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return model, {**empty, "error_msgs": []}


def program_beside(config: RerollConfig, title: str) -> Program:
    """Load the Program of the directory that a configuration was loaded from.

    It is for a model without weights, which `accelerate.init_empty_weights` and the meta device
    ask for. Raises UsageError elsewhere: a Program's model has no random weights.
    """
    name = config.name_or_path
    if not name or nn.Linear(1, 1).weight.device.type != "meta":
        raise UsageError(
            f"{title} cannot be made from a configuration alone",
            hint="use from_pretrained on what reroll saved, or Program.to_module; for a model "
            "without weights, load the configuration from the directory, and make the model "
            "inside accelerate.init_empty_weights()",
        )
    program = program_for(title, load_program(directory_of(name)), config, name)
    return retype(program, config.dtype)


def _base_and_adapter(
    directory: Path, adapter_kwargs: dict[str, Any] | None
) -> tuple[Path, Path | None]:
    """Return the directory of the model, and that of the adapter to add to it, if there is one."""
    asked = (adapter_kwargs or {}).get("_adapter_model_path")
    if asked is not None:
        return directory, directory_of(str(asked))
    file = directory / ADAPTER_FILES[0]
    if not file.is_file():
        return directory, None
    if (directory / "config.json").is_file():
        return directory, directory
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return directory_of(str(base)), directory


# arguments of from_pretrained that make no difference for a lowered model
_NO_EFFECT = {
    "low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "weights_only", "force_download",
    "attn_implementation", "_from_auto", "_commit_hash", "code_revision", "offload_state_dict",
    "resume_download", "proxies", "use_auth_token", "ignore_mismatched_sizes",
}  # fmt: skip


def _config(directory: Path, name: str, config: Any, kwargs: dict[str, Any]) -> RerollConfig:
    """Load the configuration of a directory, changed by keyword arguments.

    Raises UsageError for an unknown option, or a change of an entry that the Program fixes.
    """
    if config is not None and not isinstance(config, RerollConfig):
        raise UsageError(
            f"the configuration of a lowered model is a RerollConfig, not {type(config).__name__}",
            where=name,
            hint="leave config out, or load it with AutoConfig.from_pretrained",
        )
    kwargs = {k: v for k, v in kwargs.items() if k not in _NO_EFFECT}
    stored = RerollConfig.from_pretrained(directory)
    result = copy.deepcopy(stored) if config is None else config
    for option, value in kwargs.items():
        if not hasattr(result, option):
            # callers such as lm-eval pass None for options that they do not use
            if value is None:
                continue
            raise UsageError(
                f"a lowered model has no option {option!r}",
                hint="convert the model it was made from",
            )
        setattr(result, option, value)
    _check_fixed(result.to_dict(), stored.to_dict(), name)
    # peft records this as the base model of an adapter
    result.name_or_path = name
    return result


def _check_fixed(new: dict[str, Any], stored: dict[str, Any], name: str) -> None:
    """Raise UsageError if an entry of the original's configuration has another value.

    Entries that all configurations have, and token ids, are read when a lowered model runs. All
    others are fixed in its graph.
    """
    # which weights are tied, the Program says
    free = RerollConfig().to_dict().keys() - {"tie_word_embeddings", "is_encoder_decoder"}
    for key, value in stored.items():
        if key in free or key.endswith("_token_id") or new.get(key) == value:
            continue
        raise UsageError(
            f"{key} is part of the program, where it is {value!r:.80}, not {new.get(key)!r:.80}",
            where=name,
            hint="change the original's configuration, and convert it again",
        )


def _refuse_meta() -> None:
    """Raise ContextError where new tensors are made without data, as in transformers."""
    if torch.get_default_device().type == "meta":
        raise ContextError(
            "You are using `from_pretrained` with a meta device context manager or "
            "`torch.set_default_device('meta')`: the weights would have no data",
            where="from_pretrained",
            hint="call it outside, with device_map=... ; AutoModel...from_config makes a model "
            "without weights",
        )
