"""Put the weights of a lowered model on one device, or spread them over several and the disk.

accelerate's hooks then bring each weight to where it is used: see `accelerate.dispatch_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.runtime.lowering.modules import Slot

# strategies of accelerate that choose the devices of modules
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
DISK = "disk"


@dataclass(frozen=True)
class Placing:
    """Where the weights of a model go; see `load_model` for the fields."""

    device_map: Any = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | Path | None = None
    offload_buffers: bool = False

    def fill(self, model: Any) -> None:
        """Compute the weights of a model whose weights have no data, and put them in their places.

        Raises UsageError for a device map that is none, or that the model does not fit, and for a
        missing folder.
        """
        devices = self._devices(model)
        if isinstance(devices, torch.device) or devices is None:
            model.load_weights(devices)
            return
        index: dict[str, dict[str, str]] = {}
        names = model.slot_names()

        def put(slot: Slot, tensor: Tensor) -> None:
            places = {name: _place(devices, name) for name in names[id(slot)]}
            # the hooks of accelerate keep buffers where they are used
            offloaded = slot.is_parameter or self.offload_buffers
            on_disk = [n for n, place in places.items() if place == DISK] if offloaded else []
            if on_disk:
                self._write(on_disk, tensor, index)
            if len(on_disk) < len(places):
                slot.fill(tensor.to(next((p for p in places.values() if p != DISK), "cpu")))

        model.load_weights(put=put)
        self._dispatch(model, devices, index)

    def _dispatch(self, model: Any, devices: dict[str, Any], index: dict[str, Any]) -> None:
        from accelerate import dispatch_model

        try:
            dispatch_model(
                model,
                device_map=devices,
                offload_dir=None if self.offload_folder is None else str(self.offload_folder),
                offload_index=index or None,
                offload_buffers=self.offload_buffers,
                skip_keys=model._skip_keys_device_placement,
            )
        except ValueError as error:
            raise UsageError(str(error), where="device_map") from error

    def _write(self, names: list[str], tensor: Tensor, index: dict[str, Any]) -> None:
        """Write a weight to the folder once, under all of its names."""
        from safetensors.torch import save_file

        if self.offload_folder is None:
            raise UsageError(
                "the device map puts weights on the disk, and there is no folder for them",
                where="device_map",
                hint='pass offload_folder="a directory"',
            )
        folder = Path(self.offload_folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{names[0]}.safetensors"
        save_file({names[0]: tensor.detach().contiguous()}, file)
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry = {"safetensors_file": str(file), "weight_name": names[0], "dtype": dtype}
        index.update(dict.fromkeys(names, entry))

    def _devices(self, model: Any) -> torch.device | dict[str, Any] | None:
        """Return the only device, or the device of each module; None is the default device."""
        device_map = self.device_map
        if isinstance(device_map, str) and device_map in STRATEGIES:
            device_map = self._chosen(model, device_map)
        if isinstance(device_map, dict):
            distinct = list({str(d): d for d in device_map.values()}.values())
            for device in distinct:
                _check_here(device)
            if len(distinct) > 1 or DISK in distinct:
                return device_map
            device_map = next(iter(distinct), None)
        if device_map is None:
            return None
        try:
            return torch.device(device_map)
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"{device_map!r:.80} is no device map",
                where="device_map",
                hint='it is a device such as "cuda:0", a device for each module, or '
                + ", ".join(STRATEGIES),
            ) from error

    def _chosen(self, model: Any, strategy: str) -> dict[str, Any]:
        """Return the device of each module, as accelerate chooses them for a memory."""
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory, get_max_memory

        whole, memory = model._no_split_modules, self.max_memory
        memory = None if memory is None else dict(memory)
        if strategy == "sequential":
            memory = get_max_memory(memory)
        else:
            low = strategy == "balanced_low_0"
            memory = get_balanced_memory(model, memory, whole, low_zero=low)
        found: dict[str, Any] = infer_auto_device_map(model, memory, whole)
        return found


def _check_here(device: Any) -> None:
    """Raise UsageError for a device that this machine does not have."""
    try:
        torch.empty(0, device="cpu" if device == DISK else device)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"the device {device!r:.80} is not on this machine: {str(error).splitlines()[0]}",
            where="device_map",
        ) from error


def _place(devices: Mapping[str, Any], name: str) -> Any:
    """Return the device of a weight: that of the module around it that a device map names."""
    parts = name.split(".")
    for count in range(len(parts), -1, -1):
        module = ".".join(parts[:count])
        if module in devices:
            return devices[module]
    raise UsageError(f"the device map has no device for {name}", where="device_map")


def offloaded_state(model: Any) -> dict[str, Tensor] | None:
    """Return all weights of a model that accelerate keeps elsewhere; None if it keeps none."""
    if all(t.device.type != "meta" for t in model.parameters()):
        return None
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return None
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    state: dict[str, Tensor] = get_state_dict_offloaded_model(model)
    return state
