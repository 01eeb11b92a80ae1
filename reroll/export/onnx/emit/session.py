"""Run an exported graph in ONNX Runtime, with its caches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.errors import ExportError

_UNRELEASED = "ALLOW_RELEASED_ONNX_OPSET_ONLY=0 in the environment lets it try"


def opened(path: str | Path, threads: int = 0) -> Any:
    """Open a graph in ONNX Runtime itself, on the processor; 0 threads are as many as it has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # no warnings, for example about shapes that differ from this batch's
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Session:
    """An ONNX graph and the caches of one batch of sequences.

    `run` takes the Program's inputs, without the caches, and returns the outputs. The caches that a
    run returns are inputs of the next one. Raises ExportError if ONNX Runtime refuses the graph.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        try:
            self.session = opened(path, threads)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"ONNX Runtime refuses the graph: {reason}",
                str(path),
                hint=_UNRELEASED if "under development" in reason else None,
            ) from error
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.state: dict[str, Any] = {}

    @property
    def past(self) -> list[str]:
        """Names of the inputs that hold states from earlier runs."""
        return [name for name in self.inputs if name.startswith("past_key_values.")]

    def reset(self, batch: int) -> None:
        """Empty the caches, for a new batch of this size."""
        import numpy as np

        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.state = {}
        for name in self.past:
            item = self.inputs[name]
            sizes = {"batch_size": batch, "past_sequence_length": 0}
            shape = [sizes[d] if isinstance(d, str) else d for d in item.shape]
            self.state[name] = np.zeros(shape, kinds[item.type])

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs for the next tokens of the batch, by name."""
        given = {name: value.numpy() for name, value in inputs.items() if name in self.inputs}
        values = self.session.run(None, {**given, **self.state})
        found = dict(zip(self.outputs, values, strict=True))
        for name in self.past:
            self.state[name] = found.pop(name.replace("past_key_values.", "present."))
        return {name: torch.from_numpy(value) for name, value in found.items()}
