"""A reference scheduler for `step.onnx`: continuous depth-wise batching.

Requests may come at any time. Every tick runs one round for all running rows, each at its own
depth. A row that has completed its last round gets its next token, and starts again at depth zero.
So a new request joins at once, and rows of different depths share a batch (Bae et al., 2024, arXiv
2410.20672, "continuous depth-wise batching"). Prompts run alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reroll.export.onnx.emit.session import opened
from reroll.export.onnx.emit.step import AFTER, DEPTH, HIDDEN
from reroll.export.onnx.plan.states import GROWS

Array = Any


@dataclass
class Row:
    """One request: its tokens, its depth and length, and its states by round."""

    tokens: list[int]
    left: int
    states: list[dict[str, Array]]
    hidden: Array = None
    depth: int = 0
    length: int = 0
    made: list[int] = field(default_factory=list)


class DepthScheduler:
    """Greedy generation of many requests with the graphs in a directory."""

    def __init__(self, directory: str | Path, rounds: int, threads: int = 0) -> None:
        self.embed, self.step, self.head = (
            opened(Path(directory) / f"{name}.onnx", threads) for name in ("embed", "step", "head")
        )
        self.rounds = rounds
        self.names = [i.name for i in self.step.get_inputs()]
        self.past = [i for i in self.step.get_inputs() if i.name.startswith("past_key_values")]
        self.rows: list[Row] = []
        # number of rows in each tick
        self.batches: list[int] = []

    def submit(self, tokens: list[int], new_tokens: int) -> Row:
        """Start a request: its prompt runs now, and its first token joins the next tick."""
        sizes = {"batch_size": 1, GROWS: 0}
        empty = {
            p.name: np.zeros([sizes.get(d, d) for d in p.shape], np.float32) for p in self.past
        }
        row = Row(list(tokens), new_tokens, [dict(empty) for _ in range(self.rounds)])
        self._start(row, row.tokens)
        for _ in range(self.rounds):
            self._run([row])
        self._finish(row)
        self.rows.append(row)
        return row

    def tick(self) -> None:
        """Run one round for all rows."""
        self.rows = [row for row in self.rows if row.left]
        if not self.rows:
            return
        self.batches.append(len(self.rows))
        self._run(self.rows)
        for row in self.rows:
            if row.depth == self.rounds:
                self._finish(row)

    def _start(self, row: Row, tokens: list[int]) -> None:
        (row.hidden,) = self.embed.run(None, {"input_ids": np.array([tokens])})
        row.depth, row.length = 0, row.length + len(tokens)

    def _finish(self, row: Row) -> None:
        """Choose the next token of a row that has completed all rounds."""
        (logits, *_) = self.head.run(["logits"], {HIDDEN: row.hidden[:, -1:]})
        token = int(logits[0, -1].argmax())
        row.made.append(token)
        row.left -= 1
        if row.left:
            self._start(row, [token])

    def _run(self, rows: list[Row]) -> None:
        """Run one round for rows with equally many new tokens.

        Shorter pasts are padded on the left.
        """
        longest = max(row.length for row in rows)
        new = rows[0].hidden.shape[1]
        feed: dict[str, Array] = {
            HIDDEN: np.concatenate([row.hidden for row in rows]),
            DEPTH: np.array([row.depth for row in rows]),
            "attention_mask": np.stack([_seen(row, longest) for row in rows]),
            "position_ids": np.stack([np.arange(row.length - new, row.length) for row in rows]),
        }
        for item in self.past:
            parts = [row.states[row.depth][item.name] for row in rows]
            if GROWS in item.shape:
                parts = [_padded(part, longest - new) for part in parts]
            feed[item.name] = np.concatenate(parts)
        outputs = [o.name for o in self.step.get_outputs()]
        given = {name: feed[name] for name in self.names}
        found = dict(zip(outputs, self.step.run(None, given), strict=True))
        for place, row in enumerate(rows):
            for item in self.past:
                after = found[item.name.replace("past_key_values", "present")][place : place + 1]
                if GROWS in item.shape:
                    after = after[:, :, -row.length :]
                row.states[row.depth][item.name] = after
            row.hidden = found[AFTER][place : place + 1]
            row.depth += 1


def _seen(row: Row, longest: int) -> Array:
    return (np.arange(longest) >= longest - row.length).astype(np.int64)


def _padded(state: Array, length: int) -> Array:
    missing = length - state.shape[2]
    return np.pad(state, ((0, 0), (0, 0), (missing, 0), (0, 0))) if missing else state
