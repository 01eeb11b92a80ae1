"""The plain data that a Program is made of: types, inputs, bodies of loops, and its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

Dim = int | str
Loss = Literal["shifted", "aligned"]

# how the remark begins that a Program has lost the state of its original
NO_CACHE = "captured without a cache"


@dataclass(frozen=True)
class TensorType:
    """The dtype and shape of a tensor in a graph; a dimension known only at run time is a name."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Input:
    """One input of a Program.

    `role` says what stands in its place when a caller leaves the input out: "data" (nothing: it is
    required), "padding" (ones over past and present tokens), "positions" (counted from the past;
    where they begin anew, so does a document), "offsets" (counted from the past, and nothing else
    depends on them), "pictures" (nothing: the text is read without), or "zeros". Where the model
    computes something else from the inputs before it, `default` is the graph of that: its
    placeholders are inputs by name, and it returns one value.
    """

    name: str
    type: TensorType
    role: str = "data"
    # graphs have no equality of their own: `text.compare` compares them
    default: fx.Graph | None = field(default=None, compare=False)

    @property
    def counts(self) -> bool:
        """Whether it numbers the tokens from the first on."""
        return self.role in ("positions", "offsets")


@dataclass(frozen=True)
class Step:
    """A pass that has run: its text, how long it took, and what it remarked and measured."""

    text: str
    seconds: float
    remarks: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What a Program was made from, and the passes that it has been through.

    `config` is the original model's configuration as JSON data; `files` are the side files
    (see `reroll.rewrite.capture.side_files`) that are saved again, name to path;
    `auto_class` names the transformers auto class that loads the saved model; `remarks` say what of
    the original the capture left out. `rereads_at` is the length at which the original's generation
    drops its cache and reads the text anew, because its rotary frequencies change there. `loss` is
    what a language model computes from labels: the cross entropy of each position with the next
    label ("shifted") or with its own ("aligned"); None if it is another, or none. `cache_span` is
    the number of tokens beyond which the original computes something else with its cache than
    without: 0 if it always does, None if it never does. `adds_tokens`: the original's generation
    reads tokens beside those that it is given. `wraps_labels`: given labels alone, its decoder
    begins with the last of them.
    """

    model: str
    revision: str | None = None
    architecture: str = ""
    auto_class: str = "AutoModel"
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    remarks: tuple[str, ...] = ()
    rereads_at: int | None = None
    loss: Loss | None = "shifted"
    cache_span: int | None = None
    adds_tokens: bool = False
    wraps_labels: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the original and the side files lie; the original may be a hub id."""
        folders = [path.removesuffix(name) for name, path in self.files.items()]
        return tuple(dict.fromkeys([self.model, *folders]))

    @property
    def positions(self) -> int | None:
        """How many tokens the configuration allows; None if it does not say."""
        nested = self.config.get("text_config")
        for config in (self.config, nested if isinstance(nested, Mapping) else {}):
            for name in ("max_position_embeddings", "n_positions"):
                if isinstance(found := config.get(name), int) and found > 0:
                    return found
        return None


@dataclass(frozen=True)
class Body:
    """One trip of a depth loop.

    The first placeholders of `graph` are the carry, in the order in which its output returns them;
    the others take the loop's inputs. `period` is how many of the original layers one trip runs.
    """

    graph: fx.Graph
    period: int = 1
