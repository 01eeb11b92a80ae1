"""Sources of a program's kernels, specialised to its shapes, and their launch functions."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reroll.errors import ExportError
from reroll.export.triton.linears import Fused
from reroll.export.triton.sites import Site
from reroll.kernels import (
    configurations,
    delta,
    diagonal,
    linear_rows,
    pointwise,
    short_convolution,
    step,
    window,
)

NUMBERS = {
    torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16",
}  # fmt: skip


# these launch functions are copied, because they need only torch and triton
POINTWISE = (pointwise.norm, pointwise.turned, pointwise.gated)


def kernels_of(
    sites: Sequence[Site], linears: Sequence[Fused], dtype: torch.dtype, archs: Sequence[str]
) -> str:
    """Return the source of all kernels and launch functions; sites with equal shapes share them.

    `linears` has one of each kind, as `kinds_of` returns them. Raises ExportError if the manifest
    has no tiles for one of the GPUs.
    """
    recurrences = [site for site in sites if site.mixer is not None]
    attentions = [site for site in sites if has_kernel(site)]
    convolutions = [site for site in sites if site.kind == "Convolution"]
    helpers: list[Any] = []
    if attentions:
        helpers += [window.near_tile]
    if recurrences:
        helpers += [diagonal.sequence, diagonal.beginnings, diagonal.tile, diagonal.state_tile,
                    diagonal.log_decay, diagonal.decays, diagonal.between, diagonal.scores,
                    diagonal.faded, diagonal.read_chunk, diagonal.after_chunk,
                    step.softplus, step.decay_of]  # fmt: skip
    if any(site.fields["delta"] for site in recurrences):
        helpers += [delta.inverse]
    if convolutions:
        helpers += [short_convolution.convolved_input]
    helpers += [linear_rows.activated, pointwise.norm_row, pointwise.rope_part, pointwise.glu_part]
    if linears:
        helpers += [linear_rows.weight_tile, linear_rows.finished_layer]
    parts = [f"{plain(h)}" for h in helpers]
    parts.append(f"BLOCK, VECTORS = {pointwise.BLOCK}, {pointwise.VECTORS}")
    parts += [inspect.getsource(f).rstrip() for f in POINTWISE]
    for some, write in (
        (attentions, _attention),
        (recurrences, _kernels),
        (convolutions, _convolution),
    ):
        done: set[int] = set()
        for site in some:
            number = kernel_number(site, some)
            if number not in done:
                done.add(number)
                parts += write(site, number, site.fields.get("dtype", dtype), archs)
    for number, fused in enumerate(linears):
        parts += _linear(fused, number, dtype, archs)
    return "\n\n\n".join(parts)


def has_kernel(site: Site) -> bool:
    """Whether an attention has a kernel for prompts: its heads have at most 128 channels."""
    f = site.fields
    return site.kind == "Attention" and max(f["k_size"], f["v_size"]) <= 128


def _attention(site: Site, number: int, dtype: torch.dtype, archs: Sequence[str]) -> list[str]:
    heads, kv_heads, keys, values = _key(site)
    constants = {
        "H": kv_heads, "GROUPS": heads // kv_heads, "K": keys, "V": values, "BK": _power(keys),
        "BV": _power(values), "DT": NUMBERS[dtype], "HAS_FAR": False, "HAS_FIRST": True,
        "PRECISION": _precision(dtype),
    }  # fmt: skip
    tiles = {}
    for arch in archs:
        found = configurations.tiles_for("window", arch, dtype, "ieee", 1, max(keys, values), 16)
        if found is None:
            raise _no_tiles("window", arch)
        tiles[arch] = found["window_attention_tile"]
    return [
        specialised(window.window_attention_tile, f"near_{number}", constants),
        f"NEAR_TILES_{number} = {json.dumps(tiles, indent=4)}",
        _NEAR.replace("NUMBER", str(number)).strip(),
    ]


def has_tiles(fused: Fused, dtype: torch.dtype, archs: Sequence[str]) -> bool:
    """Whether the manifest has tiles for a layer's kernel on all GPUs."""
    return None not in _linear_tiles(fused, dtype, archs).values()


def _linear_tiles(fused: Fused, dtype: torch.dtype, archs: Sequence[str]) -> dict[str, Any]:
    _, rank, *_, activation = fused.key
    return {a: configurations.linear_tiles(a, dtype, bool(activation), rank) for a in archs}


def _linear(fused: Fused, number: int, dtype: torch.dtype, archs: Sequence[str]) -> list[str]:
    inputs, rank, norm, gain, bias, activation = fused.key
    constants = {
        "K": inputs, "R": rank, "NORM": norm, "HAS_GAIN": gain, "HAS_BIAS": bias,
        "GATED": bool(activation), "ACTIVATION": repr(activation), "DT": NUMBERS[dtype],
        "BR": _power(rank), "PRECISION": _precision(dtype),
    }  # fmt: skip
    tiles = _linear_tiles(fused, dtype, archs)
    return [
        specialised(linear_rows.linear_rows_tile, f"linear_{number}", constants),
        f"LINEAR_TILES_{number} = {json.dumps(tiles, indent=4)}",
        _LINEAR.replace("NUMBER", str(number)).replace("ACTIVATION", activation).strip(),
    ]


def _precision(dtype: torch.dtype) -> str:
    return '"ieee"' if dtype == torch.float32 else '"tf32"'


def kernel_number(site: Site, alike: Sequence[Site]) -> int:
    """Return the number of the site's kernels: that of the first site with the same shapes.

    `alike` are all sites of its kind that have kernels.
    """
    keys = [_key(s) for s in alike]
    return keys.index(_key(site))


def _key(site: Site) -> tuple[Any, ...]:
    f = site.fields
    if site.kind == "Convolution":
        return f["channels"], f["size"], f["bias"], f["dtype"]
    if site.mixer is None or site.mixer.core is None:
        return f["heads"], f["kv_heads"], f["k_size"], f["v_size"]
    return f["heads"], f["kv_heads"], f["state"], site.mixer.core.gate, f["delta"], f["dtype"]


def _kernels(site: Site, number: int, dtype: torch.dtype, archs: Sequence[str]) -> list[str]:
    heads, kv_heads, (rows, columns), gate, deltas, _ = _key(site)
    shape = {"H": kv_heads, "GROUPS": heads // kv_heads, "K": rows, "V": columns, "GATE": gate}
    shared = {name: str(value) for name, value in shape.items()}
    block = max(16, configurations.head_size(rows, rows) if rows > 64 else _power(rows))
    numbers = {
        "DT": NUMBERS[dtype],
        "PRECISION": _precision(dtype),
        "VARLEN": "False",
        "BK": str(block),
    }
    stepped = shared | {
        "ACTIVATION": "0", "HAS_FLOOR": "False", "DELTA": str(deltas), "UNIT": "False",
        "HAS_GAIN": "False", "HAS_SLOTS": "True", "BK": str(_power(rows)),
    }  # fmt: skip
    numbers |= {"HAS_START": "False"}
    if deltas:
        numbers |= {"SOLVE": '"ieee"'}
    else:
        numbers |= {"STORE_O": "True", "STORE_H": "False", "STORE_END": "True"}
    kernel = delta.delta_scan if deltas else diagonal.scan
    scanned = specialised(kernel, f"scan_{number}", shared | numbers)
    tiles = {arch: _tiles(site, dtype, arch, block) for arch in archs}
    launch = _LAUNCH_DELTA if deltas else _LAUNCH
    text = launch.replace("NUMBER", str(number))
    for name, value in shape.items():
        text = text.replace(f"<{name}>", str(value))
    return [
        scanned,
        specialised(step.recurrent_step, f"step_{number}", stepped),
        f"# block sizes by GPU, from reroll's sweep\n"
        f"TILES_{number} = {json.dumps(tiles, indent=4)}",
        text.strip(),
    ]


def _convolution(site: Site, number: int, dtype: torch.dtype, archs: Sequence[str]) -> list[str]:
    channels, size, bias, _ = _key(site)
    constants = {"C": channels, "K": size, "HAS_BIAS": bias}
    tiles = {}
    for arch in archs:
        found = configurations.convolution_tiles(arch, dtype, size)
        if found is None:
            raise _no_tiles(f"short convolutions of {size} tokens in {dtype}", arch)
        tiles[arch] = {name.removeprefix("short_convolution_"): t for name, t in found.items()}
    return [
        specialised(
            short_convolution.short_convolution_part, f"convolve_{number}",
            constants | {"HAS_START": False},
        ),
        specialised(
            short_convolution.short_convolution_step, f"convolve_step_{number}",
            constants | {"HAS_SLOTS": True},
        ),
        f"CONVOLUTION_TILES_{number} = {json.dumps(tiles, indent=4)}",
        _CONVOLVE.replace("NUMBER", str(number)).strip(),
    ]  # fmt: skip


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _tiles(site: Site, dtype: torch.dtype, arch: str, block: int) -> dict[str, Any]:
    """Return the tiles of both kernels on one GPU.

    Raises ExportError if the manifest has none.
    """
    _, _, (rows, columns), gate, deltas, _ = _key(site)
    assert site.mixer is not None
    limit = site.mixer.longest_chunk or max(configurations.CHUNKS)
    found = {}
    for family, kernel in (("delta" if deltas else "diagonal", "scan"), ("step", "step")):
        entry = configurations.tiles_for(family, arch, dtype, "ieee", gate, max(rows, columns - 1),
                                         limit)  # fmt: skip
        name = {"scan": "delta_scan" if deltas else "scan", "step": "recurrent_step"}[kernel]
        if entry is None or name not in entry:
            raise _no_tiles(family, arch)
        found[kernel] = {k: v for k, v in entry[name].items() if k != "BK"}
    if "BT" in found["scan"] and deltas:
        found["scan"]["LEVELS"] = found["scan"]["BT"].bit_length() - 1
    found["scan"]["BV"] = min(found["scan"]["BV"], _power(columns))
    return found


def _no_tiles(family: str, arch: str) -> ExportError:
    return ExportError(
        f"there are no tiles without spills for {family} on {arch}",
        hint="choose another --arch, or run python -m reroll.kernels.audit.sweep",
    )


_NEAR = '''
def run_near_NUMBER(q, k, v, scale, window, prefix, first):
    """Attention of a prompt over a window and the first tokens: [rows, time, heads, V]."""
    tiles = tiles_of(NEAR_TILES_NUMBER)
    return launch_near(near_NUMBER, tiles, q, k, v, scale, window, prefix, first)
'''
_CONVOLVE = '''
def run_convolve_NUMBER(x, weight, bias):
    """A short convolution of a prompt [rows, channels, time], and its last inputs."""
    tiles = tiles_of(CONVOLUTION_TILES_NUMBER)["part"]
    return launch_convolution(convolve_NUMBER, tiles, x, weight, bias)


def run_convolve_step_NUMBER(x, weight, bias, state, slots):
    """One token [rows, channels] of a short convolution; states in slots move on in place."""
    tiles = tiles_of(CONVOLUTION_TILES_NUMBER)["step"]
    return launch_convolution_step(convolve_step_NUMBER, tiles, x, weight, bias, state, slots)
'''
_LINEAR = '''
def run_linear_NUMBER(x, *layers):
    """A layer of x with its norm and low-rank term, or a gated unit of two, in one launch."""
    return launch_linear(linear_NUMBER, tiles_of(LINEAR_TILES_NUMBER), x, layers, "ACTIVATION")
'''
_LAUNCH = '''
def run_scan_NUMBER(q, k, v, g, beta):
    """Chunks of a prompt: the output [rows, time, heads, V] and the last states, in one launch."""
    rows, time = k.shape[0], k.shape[2]
    tiles = tiles_of(TILES_NUMBER)["scan"]
    o = v.new_empty(rows, time, <H> * <GROUPS>, <V>)
    end = k.new_empty(rows, <H>, <K>, <V>, dtype=torch.float32)
    q, k, v, g = together(q, k, v, g)
    gate = k if g is None else g
    scan_NUMBER[(triton.cdiv(<V>, tiles["BV"]), 1, rows * <H>)](
        q, k, v, gate, o, k, end, end, k, 1.0, time,
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(o.transpose(1, 2)), **tiles)
    return o, end


def run_step_NUMBER(q, k, v, g, beta, state, slots):
    """One token for each row, onto states in slots, in place: [rows, heads, V], in one launch."""
    return launch_step(step_NUMBER, tiles_of(TILES_NUMBER)["step"], q, k, v, g, beta, state, slots)
'''
_LAUNCH_DELTA = _LAUNCH.replace(
    "    q, k, v, g = together(q, k, v, g)\n", "    q, k, v, g, beta = together(q, k, v, g, beta)\n"
).replace(
    """    scan_NUMBER[(triton.cdiv(<V>, tiles["BV"]), 1, rows * <H>)](
        q, k, v, gate, o, k, end, end, k, 1.0, time,
        *strides(q), *strides(k), *strides(v), *strides(g), *strides(o.transpose(1, 2)), **tiles)
""",
    """    scan_NUMBER[(triton.cdiv(<V>, tiles["BV"]), rows * <H>)](
        q, k, v, gate, beta, o, end, end, k, 1.0, time, *strides(q), *strides(k), *strides(v),
        *strides(g), *strides(beta), *strides(o.transpose(1, 2)), **tiles)
""",
)


# ---- source text of kernels, with constants written into them


def specialised(kernel: Any, name: str, constants: Mapping[str, object]) -> str:
    """Return the source of a kernel under a new name.

    `constants` are values by parameter, or expressions as text.
    """
    function = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    assert isinstance(function, ast.FunctionDef)
    function.name = name
    values = {key: ast.parse(str(value), mode="eval").body for key, value in constants.items()}
    known = {a.arg for a in function.args.args}
    missing = set(values) - known
    assert not missing, f"{name} has no parameters {missing}"
    function.args.args = [a for a in function.args.args if a.arg not in values]
    tree = _Fold(values).visit(function)
    return ast.unparse(ast.fix_missing_locations(tree))


def plain(function: Any) -> str:
    """Return the unchanged source of a function that kernels call, with its comments."""
    return textwrap.dedent(inspect.getsource(function.fn)).rstrip()


class _Fold(ast.NodeTransformer):
    def __init__(self, values: Mapping[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.values:
            return self.values[node.id]
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        # a condition that depends on names or calls is not decided
        if any(isinstance(n, ast.Name | ast.Call) for n in ast.walk(node.test)):
            return node
        condition = compile(ast.Expression(node.test), "<condition>", "eval")
        return node.body if eval(condition, {"__builtins__": {}}) else node.orelse
