"""One graph in ONNX Runtime, and the state of one sequence of tokens in it.

A run never changes a state that was given to it, but for caches in place: those are one buffer
with room for more tokens, in which the tokens behind the first `read` are not looked at. So a
snapshot is the arrays of before, and costs no copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from reroll.errors import UsageError

Array = Any

# tokens of a prompt that are read at a time, which bounds the memory of scores and logits
PIECE = 256

_KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_GIVEN = {"input_ids", "attention_mask", "position_ids"}
_GROWS = "past_sequence_length"


@dataclass(frozen=True)
class Part:
    """One state of a graph.

    Attributes:
        input, output: its names before and after a run.
        dims: its sizes behind the batch; that of the tokens is None.
        in_place: whether the graph appends to its buffer.
    """

    input: str
    output: str
    dims: tuple[int | None, ...]
    dtype: Any
    in_place: bool

    @property
    def grows(self) -> bool:
        """Whether it holds all tokens, in its third dimension."""
        return None in self.dims

    def zeros(self, tokens: int) -> Array:
        """Return the state before any token, of one row, with room for some."""
        return np.zeros((1, *(tokens if d is None else d for d in self.dims)), self.dtype)


class Graph:
    """A graph of an exported directory: its session, and the states that it keeps."""

    def __init__(self, path: Path, described: Mapping[str, Any], threads: int) -> None:
        self.name = path.stem
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # no warnings, for example about shapes that differ from this row's
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"ONNX Runtime refuses the graph: {reason}", str(path)) from error
        in_place, inputs = set(described.get("in_place", ())), self.session.get_inputs()
        self.parts = tuple(
            Part(
                item.name,
                item.name.replace("past_key_values.", "present."),
                tuple(None if size == _GROWS else size for size in item.shape[1:]),
                _KINDS[item.type],
                item.name in in_place,
            )
            for item in inputs
            if item.name.startswith("past_key_values.")
        )
        self.inputs = {i.name for i in inputs} - {part.input for part in self.parts}
        unknown = sorted(self.inputs - _GIVEN)
        if unknown or "input_ids" not in self.inputs:
            raise UsageError(
                f"the graph takes {unknown[0] if unknown else 'no input_ids'}, and the runner "
                "gives tokens alone",
                where=str(path),
            )
        # nodes that only the logits need are not run where those are not wanted
        self.without_logits = onnxruntime.RunOptions()
        self.without_logits.only_execute_path_to_fetches = True

    @property
    def only_grows(self) -> bool:
        """Whether every state holds all tokens, so that the last of them can be cut off."""
        return all(part.grows for part in self.parts)


@dataclass(frozen=True)
class Snapshot:
    """The state after `read` tokens."""

    read: int
    arrays: Mapping[str, Array]


class State:
    """What one graph keeps of one sequence: arrays by the names of its inputs.

    `read` tokens are in it.
    """

    def __init__(self, graph: Graph, room: int = 0) -> None:
        self.graph, self.read, self.room = graph, 0, room
        self.arrays: dict[str, Array] = {
            part.input: OrtValue.ortvalue_from_numpy(part.zeros(room if part.in_place else 0))
            for part in graph.parts
        }

    def copy(self) -> State:
        """Return a state that goes on by itself; only what is written in place is copied."""
        made = State(self.graph)
        made.read, made.room, made.arrays = self.read, self.room, dict(self.arrays)
        for part in self.graph.parts:
            if part.in_place:
                own = self.arrays[part.input].numpy().copy()
                made.arrays[part.input] = OrtValue.ortvalue_from_numpy(own)
        return made

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all, where caches are appended to in place."""
        if tokens <= self.room:
            return
        # at least doubled, so that few tokens are copied often
        self.room = max(tokens, 2 * self.room)
        for part in self.graph.parts:
            if part.in_place:
                larger = part.zeros(self.room)
                larger[:, :, : self.read] = self.arrays[part.input].numpy()[:, :, : self.read]
                self.arrays[part.input] = OrtValue.ortvalue_from_numpy(larger)

    def extend(self, tokens: Sequence[int], keep: int) -> Array:
        """Read tokens; return the logits [keep, vocabulary] of the last of them, in fp32.

        Long inputs are read in pieces.
        """
        self.reserve(self.read + len(tokens))
        while len(tokens) > PIECE + keep:
            self._run(tokens[:PIECE], 0)
            tokens = tokens[PIECE:]
        return self._run(tokens, keep)

    def _run(self, tokens: Sequence[int], keep: int) -> Array:
        total = self.read + len(tokens)
        given = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.read, total)[None],
        }
        binding = self.graph.session.io_binding()
        for name in self.graph.inputs:
            binding.bind_cpu_input(name, given[name])
        if keep:
            binding.bind_output("logits")
        made = []
        for part in self.graph.parts:
            binding.bind_ortvalue_input(part.input, self.arrays[part.input])
            if part.in_place:
                binding.bind_ortvalue_output(part.output, self.arrays[part.input])
            else:
                binding.bind_output(part.output)
                made.append(part.input)
        options = None if keep else self.graph.without_logits
        self.graph.session.run_with_iobinding(binding, options)
        outputs = dict(zip(_bound(self.graph, keep), binding.get_outputs(), strict=True))
        self.arrays |= {name: outputs[name] for name in made}
        self.read = total
        if not keep:
            return np.empty((0, 0), np.float32)
        return outputs["logits"].numpy()[0, -keep:].astype(np.float32, copy=False)

    # ---- going back

    def mark(self) -> Snapshot:
        """Return what `back` needs to undo the runs from here on."""
        return Snapshot(self.read, dict(self.arrays))

    def back(self, start: Snapshot, right: int) -> None:
        """Undo the tokens behind the first `right`, which were read after `start`.

        Caches that grow are cut. Where a state has a constant size, all states are those of
        `start`, and the right tokens behind it are to be read again: `read` says how many are in.
        """
        if right == self.read:
            return
        if not self.graph.only_grows:
            places = {part.input for part in self.graph.parts if part.in_place}
            self.arrays |= {n: a for n, a in start.arrays.items() if n not in places}
            self.read = start.read
            return
        for part in self.graph.parts:
            if not part.in_place:
                cut = self.arrays[part.input].numpy()[:, :, :right]
                self.arrays[part.input] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(cut))
        self.read = right


def _bound(graph: Graph, keep: int) -> list[str]:
    """Return what the outputs of a run are, in their order: logits, and states by input."""
    return [*(["logits"] if keep else []), *(part.input for part in graph.parts)]
