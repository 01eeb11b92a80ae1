"""Save a lowered model as transformers' `save_pretrained` does.

config.json, program.json, ...     the model, with the weights and configurations of now
adapter_config.json, ...           the active adapter of peft, if there is one

A model that has adapters of peft (`add_adapter`) is saved as transformers saves one: only the
adapter, with the path from which the model was loaded. A model that was not loaded from a
directory is saved with its adapter, and `from_pretrained` adds the adapter again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from reroll.errors import UsageError
from reroll.runtime.lowering.recapture import program_of

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_model(
    model: Any,
    directory: str,
    state: Mapping[str, Tensor] | None = None,
    *,
    save_peft_format: bool = True,
    **layout: Any,
) -> None:
    """Write a lowered model, or its adapter, to a directory; `state` has its tensors if given.

    Raises UsageError for a module that the Program has no place for, and for missing tensors. It
    also raises for a directory that holds an adapter if the model has none, because loading would
    add it.
    """
    del layout
    adapted = bool(getattr(model, "_hf_peft_config_loaded", False))
    if not adapted and (Path(directory) / ADAPTER_FILES[0]).exists():
        raise UsageError(
            f"{ADAPTER_FILES[0]} is there, and would change the model when it is loaded",
            where=directory,
            hint="choose another directory, or delete the adapter's files",
        )
    if not (adapted and model.name_or_path):
        program = program_of(model, state, adapters=adapted)
        program.save(directory, overwrite="files", config=model.config)
    if adapted:
        _save_adapter(model, Path(directory), state, save_peft_format)


def _save_adapter(
    model: Any, directory: Path, state: Mapping[str, Tensor] | None, peft_format: bool
) -> None:
    from safetensors.torch import save_file

    active = model.active_adapters()
    if len(active) != 1:
        raise UsageError(
            f"{len(active)} adapters are active, and one is saved at a time",
            hint="model.set_adapter(name), then save_pretrained",
        )
    tensors = model.get_adapter_state_dict(active[0], state)
    prefix = "base_model.model." if peft_format else ""
    directory.mkdir(parents=True, exist_ok=True)
    model.peft_config[active[0]].save_pretrained(str(directory))
    save_file(
        {f"{prefix}{n}": t.detach().cpu().contiguous().clone() for n, t in tensors.items()},
        directory / ADAPTER_FILES[1],
        metadata={"format": "pt"},
    )
