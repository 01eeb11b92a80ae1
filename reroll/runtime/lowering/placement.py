"""Place the weights of a Program in the module tree: at which path, in which kind of module."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from reroll.errors import ProgramError
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.program import Program, weight_nodes
from reroll.runtime.functions.weights import ReadEmbedding, ReadLinear, ScaledEmbedding
from reroll.runtime.lowering.scaling import Scale, scales

aten = torch.ops.aten

Path = tuple[str, ...]

# by the number of dimensions of the kernel: the op, and the module that calls it
_CONVOLUTIONS: dict[int, tuple[Any, type[nn.Module]]] = {
    1: (aten.conv1d.default, nn.Conv1d),
    2: (aten.conv2d.default, nn.Conv2d),
    3: (aten.conv3d.default, nn.Conv3d),
}
# the ops that a module of the weight's own can compute
PRODUCTS = (aten.linear.default, *(op for op, _ in _CONVOLUTIONS.values()))

HEAD = ("lm_head",)
# the attribute of a ScaledEmbedding
SCALE = "embed_scale"


@dataclass(frozen=True)
class Linear:
    """An `nn.Linear` that multiplies by a weight.

    `read` says that graphs also use its weight or bias in another way.
    """

    path: Path
    inputs: int
    outputs: int
    bias: bool
    read: bool = False

    @property
    def kind(self) -> type[nn.Module]:
        """The class of the module, or of its base."""
        return nn.Linear

    def make(self) -> nn.Linear:
        """Make the module, on the meta device."""
        kind = ReadLinear if self.read else nn.Linear
        return kind(self.inputs, self.outputs, self.bias, device="meta")


@dataclass(frozen=True)
class Convolution:
    """An `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with a weight as its kernel.

    `shape` is the weight's: [outputs, inputs / groups, ...]. `settings` are the module's arguments
    behind the size of the kernel: stride, padding, dilation, groups.
    """

    path: Path
    shape: tuple[int, ...]
    settings: tuple[Any, ...]
    bias: bool

    @property
    def kind(self) -> type[nn.Module]:
        """The class of the module."""
        return _CONVOLUTIONS[len(self.shape) - 2][1]

    def make(self) -> nn.Module:
        """Make the module, on the meta device."""
        outputs, inputs, *kernel = self.shape
        groups = self.settings[-1]
        return self.kind(
            inputs * groups, outputs, tuple(kernel), *self.settings, self.bias, device="meta"
        )


@dataclass(frozen=True)
class Lookup:
    """An `nn.Embedding` that looks up rows of a weight; the row `padding` is not trained.

    `read` says that graphs also use the weight in another way. The rows are multiplied by `scale`.
    """

    path: Path
    rows: int
    columns: int
    padding: int | None
    read: bool = False
    scale: Scale | None = None

    @property
    def kind(self) -> type[nn.Embedding]:
        """The class of the module, or of its base."""
        return nn.Embedding if self.scale is None else ScaledEmbedding

    def make(self) -> nn.Embedding:
        """Make the module, on the meta device."""
        sizes = (self.rows, self.columns, self.padding)
        if self.scale is None:
            return (ReadEmbedding if self.read else nn.Embedding)(*sizes, device="meta")
        module = ScaledEmbedding(*sizes, device="meta")
        module.converted = self.scale.converted
        if isinstance(self.scale.value, float):
            module.embed_scale = self.scale.value
        return module


@dataclass(frozen=True)
class Placement:
    """Modules that hold a weight; a path may contain a `*` for the trip.

    `linear` is the module that multiplies by the weight, which may be a convolution. A weight that
    is neither multiplied nor looked up is the parameter `leaf` of a plain `owner`.
    """

    owner: Path
    leaf: str
    linear: Linear | Convolution | None = None
    lookup: Lookup | None = None

    @property
    def is_scale(self) -> bool:
        """Whether the weight is the factor of the rows of a table, whose module reads it alone."""
        return self.leaf == SCALE and self.lookup is not None

    @property
    def paths(self) -> list[Path]:
        """Paths of the modules that hold the weight; the `nn.Linear` is first."""
        return [m.path for m in (self.linear, self.lookup) if m is not None] or [self.owner]

    def marked(self, reads: set[Path]) -> Placement:
        """Return the place with a module that gives its weights, if its path is in `reads`.

        A kernel that is not only convolved with is a parameter of a plain module.
        """
        linear, lookup = self.linear, self.lookup
        if self.paths[0] not in reads:
            return self
        if isinstance(linear, Convolution):
            return replace(self, linear=None)
        if linear is not None:
            return replace(self, linear=replace(linear, read=True))
        return self if lookup is None else replace(self, lookup=replace(lookup, read=True))

    def at(self, trip: int) -> Placement:
        """Return the place in one trip."""
        linear, lookup = self.linear, self.lookup
        if linear is not None:
            linear = replace(linear, path=_at(linear.path, trip))
        if lookup is not None:
            lookup = replace(lookup, path=_at(lookup.path, trip))
        return Placement(_at(self.owner, trip), self.leaf, linear, lookup)


def placements(program: Program) -> dict[str, Placement]:
    """Return the place of every weight that a graph reads.

    No weight is placed in or below an `nn.Linear` or `nn.Embedding` other than its own `weight` and
    `bias`: adapters take the place of such a module, and what is read through it would be gone. So
    the factor `q_proj.lora_down.weight` is `q_proj_lora_down.weight` of a plain module.
    Raises ProgramError for a weight that the Program's table does not have.
    """
    users: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for graph_name, graph in program.graphs():
        for name, nodes in weight_nodes(graph).items():
            if name not in program.weights:
                raise ProgramError(f"there is no weight {name!r} in the table", where=graph_name)
            users.setdefault(name, []).extend((n, user) for n in nodes for user in n.users)
    linears = _linears(program, users)
    placed: dict[str, Placement] = {}
    for name, uses in users.items():
        path = path_of(name)
        linear, lookup = linears.get(name), None
        tables = [u for n, u in uses if u.target is aten.embedding.default and u.args[0] is n]
        if tables and path[-1] == "weight" and path[:-1]:
            rows, columns = program.weights[name].meta.shape
            padding = {argument(u, "padding_idx") for u in tables} - {-1}
            lookup = Lookup(path[:-1], rows, columns, min(padding, default=None))
        if linear is not None and lookup is not None:
            # tied: head and embeddings are two modules with transformers' names
            if path[:-1] == HEAD:
                lookup = replace(lookup, path=("input_embeddings",))
            else:
                linear = replace(linear, path=HEAD)
        placed[name] = Placement(path[:-1], path[-1], linear, lookup)
    for table, scale in scales(program).items():
        if (lookup := placed[table].lookup) is None:
            continue
        lookup = replace(lookup, scale=scale)
        placed[table] = replace(placed[table], lookup=lookup)
        if isinstance(scale.value, str):
            placed[scale.value] = Placement(lookup.path, SCALE, None, lookup)
    placed = _beside_modules(placed)
    reads = {
        placement.paths[0]
        for name, placement in placed.items()
        for node, user in users[name]
        if not _by_call(placement, name, node, user)
    }
    return {name: placement.marked(reads) for name, placement in placed.items()}


def _beside_modules(placed: dict[str, Placement]) -> dict[str, Placement]:
    """Move weights that are in or below a module of another weight to a plain module beside it."""
    modules = {m.path for p in placed.values() for m in (p.linear, p.lookup) if m is not None}
    taken = {(*path, p.leaf) for p in placed.values() for path in p.paths}
    moved = {}
    for name, place in placed.items():
        whole = (*place.owner, place.leaf)
        own = {m.path for m in (place.linear, place.lookup) if m is not None}
        above = [whole[:n] for n in range(1, len(whole)) if whole[:n] in modules]
        if not above or above[0] in own:
            moved[name] = place
            continue
        at = len(above[0])
        new = (*whole[: at - 1], "_".join(whole[at - 1 : at + 1]), *whole[at + 1 :])
        while new in taken:
            new = (*new[: at - 1], f"{new[at - 1]}_", *new[at:])
        taken.add(new)
        moved[name] = Placement(new[:-1], new[-1])
    return moved


def _by_call(placement: Placement, name: str, node: fx.Node, user: fx.Node) -> bool:
    """Whether a weight is used by calling the module that holds it."""
    if placement.is_scale:
        return True
    if user.target is aten.embedding.default:
        return placement.lookup is not None and user.args[0] is node
    if user.target not in PRODUCTS or placement.linear is None:
        return False
    if placement.leaf == "weight":
        return user.args[1] is node
    # the bias of a module of the same name
    beside = f"{name.rpartition('.')[0]}.weight"
    return getattr(user.args[1], "target", None) == beside


def _linears(
    program: Program, users: dict[str, list[tuple[fx.Node, fx.Node]]]
) -> dict[str, Linear | Convolution]:
    """Find the weights and biases that a linear layer or convolution of the same name can hold."""
    linears: dict[str, Linear | Convolution] = {}
    for name, uses in users.items():
        calls = [u for n, u in uses if u.target in PRODUCTS and u.args[1] is n]
        stem, dot, leaf = name.rpartition(".")
        shape = tuple(program.weights[name].meta.shape)
        if not calls or not dot or leaf != "weight":
            continue
        biases = {bias_name(call) for call in calls}
        path, bias = path_of(name)[:-1], biases != {None}
        linear: Linear | Convolution
        if len(shape) == 2:
            linear = Linear(path, shape[1], shape[0], bias)
        else:
            settings = {_settings(call) for call in calls}
            if len(settings) != 1:
                continue
            linear = Convolution(path, shape, settings.pop(), bias)
        if biases in ({None}, {f"{stem}.bias"}):
            linears[name] = linear
        if biases == {f"{stem}.bias"}:
            linears[f"{stem}.bias"] = linear
    return linears


def _settings(convolution: fx.Node) -> tuple[Any, ...]:
    """Return stride, padding, dilation and groups of a convolution."""
    values = (argument(convolution, n) for n in ("stride", "padding", "dilation", "groups"))
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def bias_name(linear: fx.Node) -> str | None:
    """Return the name of the bias that a linear node or convolution adds.

    It is "" for a computed bias, and None for none.
    """
    bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    if not isinstance(bias, fx.Node):
        return None
    return str(bias.target) if bias.op == "get_attr" else ""


def path_of(name: str) -> Path:
    """Convert a weight's name to a path of attributes.

    Parts have word characters only, and differ from names that modules use themselves.
    """
    first, *rest = name.split(".")
    return (_attribute(first, _model_names()), *(_attribute(p, _MODULE_NAMES) for p in rest))


def _attribute(part: str, reserved: frozenset[str]) -> str:
    part = re.sub(r"[^\w*]", "_", part, flags=re.ASCII) or "_"
    return f"{part}_" if part in reserved or keyword.iskeyword(part) else part


_MODULE_NAMES = frozenset(dir(nn.Module())) | {"gradient_checkpointing", "main_input_name"}


@cache
def _model_names() -> frozenset[str]:
    """Return the attribute names that a lowered model uses itself."""
    from transformers import PreTrainedModel

    attributes = {"config", "generation_config", "program", "code", "loops"}
    return _MODULE_NAMES | set(dir(PreTrainedModel)) | attributes


def _at(path: Path, trip: int) -> Path:
    return tuple(part.replace("*", str(trip)) for part in path)
