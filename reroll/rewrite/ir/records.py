"""Data classes of a Program: types, inputs, bodies of loops, and its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

Dim = int | str
Loss = Literal["shifted", "aligned"]

# beginning of the remark that the original has a cache and the Program none
NO_CACHE = "captured without a cache"


@dataclass(frozen=True)
class TensorType:
    """Dtype and shape of a tensor in a graph; a dimension known only at run time is a name."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Input:
    """Input of a Program.

    `role` determines the value if a caller leaves the input out: "data" is required; "padding" is
    ones over past and present tokens; "positions" count on from the past, and a document begins
    where they restart; "offsets" also count on from the past, but do not separate documents;
    "pictures" may be absent, as the text is read without them; "zeros" are zeros. If the model
    computes another default from the inputs before it, `default` is its graph. Its placeholders are
    inputs by name, and it returns one value.
    """

    name: str
    type: TensorType
    role: str = "data"
    # fx graphs do not define equality: `text.compare` compares them
    default: fx.Graph | None = field(default=None, compare=False)

    @property
    def counts(self) -> bool:
        """Whether it numbers the tokens, from the first token of the past on."""
        return self.role in ("positions", "offsets")


@dataclass(frozen=True)
class Step:
    """Record of a pass that has run: its text, seconds, remarks and measurements."""

    text: str
    seconds: float
    remarks: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Original model of a Program, and the passes that have run on it.

    `config` is the original model's configuration as JSON data. `files` maps names of the side
    files, which are saved again, to their paths (see `reroll.rewrite.capture.side_files`).
    `auto_class` names the transformers auto class that loads the saved model. `remarks` tell what
    of the original the capture left out. `rereads_at` is the length at which the original's
    generation drops its cache and recomputes the text, because its rotary frequencies change there.
    `loss` is the cross entropy of each position with the next label ("shifted") or with its own
    ("aligned"). It is None if the model computes another loss, or none. `cache_span` is the number
    of tokens above which the original's results with and without its cache differ: 0 if they always
    do, None if never. `adds_tokens`: the original appends tokens of its own to the prompt in
    generation. `wraps_labels`: given labels alone, its decoder starts with the last label.
    `scales_embeddings`: the module that looks up its tokens also scales, so embeddings that take
    their place are scaled already. `unread` are inputs that the original takes and that change none
    of its outputs.
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
    scales_embeddings: bool = False
    unread: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the original (or its hub id) and of the folders of its side files."""
        folders = [path.removesuffix(name) for name, path in self.files.items()]
        return tuple(dict.fromkeys([self.model, *folders]))

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens by the configuration; None if it has no maximum."""
        nested = self.config.get("text_config")
        for config in (self.config, nested if isinstance(nested, Mapping) else {}):
            for name in ("max_position_embeddings", "n_positions"):
                if isinstance(limit := config.get(name), int) and limit > 0:
                    return limit
        return None


@dataclass(frozen=True)
class Body:
    """Graph of one trip of a depth loop.

    The first placeholders of `graph` are the carry, in the order in which its output returns them;
    the others take the loop's inputs. `period` is the number of the original's layers in one trip.
    """

    graph: fx.Graph
    period: int = 1
