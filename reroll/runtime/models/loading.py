"""Load a saved model as transformers' `from_pretrained` does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from reroll.errors import UsageError
from reroll.rewrite.checkpoint.hub import directory_of
from reroll.rewrite.checkpoint.saved import load_program
from reroll.rewrite.ir.dtypes import retype
from reroll.runtime.models.auto import model_class
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.heads import program_for
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
    adapter_kwargs: dict[str, Any] | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load the lowered model of a directory or hub repository that reroll saved, in eval mode.

    `dtype` is the Program's own or "auto", or fp32 for one in half precision. `device_map` is one
    device. Other arguments change entries of the configuration, as in transformers.

    Raises UsageError for options that a lowered model does not support, such as quantisation on
    load, and for a class that does not run this model.
    """
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
    model.load_weights(_device(device_map))
    if adapter is not None:
        model.load_adapter(str(adapter))
    model.eval()
    if not output_loading_info:
        return model
    empty: dict[str, Any] = {
        k: set() for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return model, {**empty, "error_msgs": []}


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
    "attn_implementation", "_from_auto", "_commit_hash", "code_revision",
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


def _device(device_map: Any) -> torch.device | None:
    """Return the only device of a device map; None for the default device.

    Raises UsageError if there are several devices, or if it is no device.
    """
    if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) == 1:
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return None
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"a lowered model loads onto one device, not {device_map!r:.80}",
            hint='device_map is a device such as "cuda:0"',
        ) from error
