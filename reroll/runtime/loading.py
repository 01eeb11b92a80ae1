"""Loading a saved model as transformers' `from_pretrained` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reroll.errors import UsageError
from reroll.rewrite.program import Program
from reroll.runtime.auto import MODELS, model_class
from reroll.runtime.config import RerollConfig
from reroll.runtime.dtypes import retype
from reroll.runtime.pretrained import find_directory, load_program


def load_model(
    cls: Any,
    name: Any,
    *,
    config: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    subfolder: str = "",
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """The lowered model in a directory or hub repository that reroll saved, in eval mode.

    `dtype` is the Program's own or "auto", or fp32 for one in half precision; `device_map` is one
    device. Other arguments change entries of the configuration, as in transformers.

    Raises UsageError for what a lowered model cannot do, such as quantisation on load, and for a
    class that does not run it.
    """
    hub = {
        key: kwargs.pop(key, None) for key in ("revision", "cache_dir", "token", "local_files_only")
    }
    directory = find_directory(str(name), **hub) / (subfolder or "")
    program = load_program(directory)
    fitting = MODELS.get(program.origin.auto_class, MODELS["AutoModel"])[1]
    if cls.__name__ not in (fitting, "RerollPreTrainedModel"):
        raise UsageError(
            f"{cls.__name__} does not run this model",
            where=str(name),
            hint=f"use {program.origin.auto_class}.from_pretrained",
        )
    program = retype(program, torch_dtype if dtype is None else dtype)
    own = _config(directory, program, config, kwargs)
    model = model_class(program.origin.auto_class)(own, program)
    model.load_weights(_device(device_map))
    model.eval()
    if not output_loading_info:
        return model
    empty: dict[str, Any] = {
        k: set() for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return model, {**empty, "error_msgs": []}


# arguments of from_pretrained that choose between ways of loading which are all the same here
_NO_EFFECT = {
    "low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "weights_only", "force_download",
    "attn_implementation", "adapter_kwargs", "_from_auto", "_commit_hash", "code_revision",
    "resume_download", "proxies", "use_auth_token", "ignore_mismatched_sizes",
}  # fmt: skip


def _config(directory: Path, program: Program, config: Any, kwargs: dict[str, Any]) -> RerollConfig:
    """The configuration in a directory, changed by keyword; what the Program fixes stays."""
    kwargs = {k: v for k, v in kwargs.items() if k not in _NO_EFFECT}
    own = config if isinstance(config, RerollConfig) else RerollConfig.from_pretrained(directory)
    for name, value in kwargs.items():
        if not hasattr(own, name):
            # callers such as lm-eval pass None for what they do not ask for
            if value is None:
                continue
            raise UsageError(
                f"a lowered model has no option {name!r}", hint="convert the model it was made from"
            )
        setattr(own, name, value)
    own.dtype = program.dtype
    return own


def _device(device_map: Any) -> torch.device | None:
    """The one device of a device map."""
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
