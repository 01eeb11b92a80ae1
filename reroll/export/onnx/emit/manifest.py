"""Write the files that describe an exported directory.

manifest.json       for programs: files with checksums, inputs, outputs, states, checks
genai_config.json   for onnxruntime-genai
README.md           for people
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

import reroll
from reroll.export.huggingface import write_json
from reroll.export.onnx.emit.readme import readme
from reroll.export.onnx.emit.weight_file import digests
from reroll.export.onnx.graph import ELEMENT
from reroll.export.onnx.plan.parts import computed_inputs
from reroll.export.onnx.plan.record import Plan
from reroll.export.onnx.plan.states import CONV, PAST, PRESENT, RECURRENT, State
from reroll.export.onnx.plan.weights import FILE
from reroll.rewrite.analysis.reach import position_limits
from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.program import Program
from reroll.runtime.speculation.drafts import can_borrow

MANIFEST, GENAI = "manifest.json", "genai_config.json"


def write_manifest(
    directory: Path,
    plan: Plan,
    part: str,
    files: dict[str, str],
    checked: dict[str, Any],
) -> dict[str, Any]:
    """Write the three files, and return the manifest."""
    program, settings = plan.program, plan.settings
    causal = program.origin.auto_class == "AutoModelForCausalLM"
    graphs = {kind: _graph(directory / file) for kind, file in files.items()}
    states = _states(plan)
    config = _genai_config(program, states, directory, files)
    if config is not None:
        write_json(directory / GENAI, config)
    for kind, result in checked.items():
        graphs[kind]["check"] = result
    found: dict[str, Any] = {
        "format": 1,
        "producer": {"reroll": reroll.__version__, "onnx": onnx.__version__},
        "model": program.origin.model,
        "part": part,
        "passes": [step.text for step in program.origin.steps],
        "remarks": list(program.origin.remarks),
        "precision": settings.precision,
        "opset": settings.opset,
        "runtime": settings.runtime,
        "loops": [
            {"name": p.name, "trips": p.trips, "period": p.period, "layers": p.layers}
            for p in program.loops
        ],
        "graphs": graphs,
        "computed_inputs": list(plan.computed_inputs),
        "states": states,
        # what a run of a causal model takes: new tokens, or all; None for other models
        "decoding": "states" if states else "whole" if causal else None,
        # for hosts that generate: sizes, and the tokens after which nothing follows
        "vocabulary": _vocabulary(program),
        "positions": position_limits(program).get("input_ids"),
        "ends": _ends(program),
        **({} if plan.draft is None else {"draft": _draft(plan, plan.draft)}),
        "weights": {
            "file": FILE,
            "bytes": (directory / FILE).stat().st_size,
            "sha256": digests(plan, directory),
        },
    }
    (directory / "README.md").write_text(readme(found, config is not None), encoding="utf-8")
    others = sorted(
        str(p.relative_to(directory))
        for p in directory.rglob("*")
        if p.is_file() and p.name not in (FILE, *files.values())
    )
    found["files"] = {name: _digest(directory / name) for name in others}
    write_json(directory / MANIFEST, found)
    return found


def _graph(path: Path) -> dict[str, Any]:
    model = onnx.load(str(path), load_external_data=False)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": _digest(path),
        "nodes": len(model.graph.node),
        "inputs": [_described(i) for i in model.graph.input],
        "outputs": [_described(o) for o in model.graph.output],
        # states that are appended to where they lie: one buffer may be past and present
        "in_place": _in_place(model),
    }


def _in_place(model: Any) -> list[str]:
    """Return the inputs that GroupQueryAttention takes as its past keys and values."""
    given = {item.name for item in model.graph.input}
    nodes = [n for n in model.graph.node if n.op_type == "GroupQueryAttention"]
    return [name for node in nodes for name in node.input[3:5] if name in given]


def _described(item: Any) -> dict[str, Any]:
    kind = item.type.tensor_type
    return {
        "name": item.name,
        "dtype": TensorProto.DataType.Name(kind.elem_type).lower(),
        "shape": [d.dim_param or d.dim_value for d in kind.shape.dim],
    }


def _state(state: State) -> dict[str, Any]:
    """Describe a state: which output is which input of the next run."""
    return {
        "layer": state.named,
        "part": state.part,
        "input": state.input,
        "output": state.output,
        "dtype": TensorProto.DataType.Name(ELEMENT[state.dtype]).lower(),
        "shape": list(state.shape),
        "grows": state.grows,
    }


def _states(plan: Plan) -> list[dict[str, Any]]:
    return [_state(state) for state in next(iter(plan.graphs.values())).states]


def _draft(plan: Plan, draft: Plan) -> dict[str, Any]:
    """Describe a draft: its passes, graphs and states, and what it needs no state of its own for.

    `borrows` says that each of its states is made of entries of the model's of the same number.
    """
    steps = draft.program.origin.steps[len(plan.program.origin.steps) :]
    layers = [plan_states(each.program).layers for each in (plan, draft)]
    borrows = len(layers[0]) == len(layers[1]) and all(map(can_borrow, *layers))
    return {
        "passes": [step.text for step in steps],
        "graphs": list(draft.graphs),
        "computed_inputs": list(draft.computed_inputs),
        "states": _states(draft),
        "borrows": borrows,
    }


def _vocabulary(program: Program) -> int | None:
    values: Any = program.graph.output_node().args[0]
    if "logits" not in program.outputs:
        return None
    size = shape(values[program.outputs.index("logits")])[-1]
    return size if isinstance(size, int) else None


def _ends(program: Program) -> list[int]:
    config = dict(program.origin.config)
    found = _generation(program).get("eos_token_id", config.get("eos_token_id"))
    return [int(i) for i in (found if isinstance(found, list) else [found]) if i is not None]


_GROWING = ("key", "value")


def _genai_config(
    program: Program, states: list[dict[str, Any]], directory: Path, files: dict[str, str]
) -> dict[str, Any] | None:
    """Return the configuration of a decoder for onnxruntime-genai.

    Returns None for other models, and for states that it does not support: windows, tokens that
    wait, the additional states of mLSTM and GSA, and keys or values of several sizes.
    """
    parts = {s["part"] for s in states if not s["grows"]}
    if not states or program.outputs[0] != "logits" or not parts <= {RECURRENT, CONV}:
        return None
    sizes = {part: {str(s["shape"]) for s in states if s["part"] == part} for part in _GROWING}
    counts = {part: sum(s["part"] == part for s in states) for part in _GROWING}
    if len(set.union(*sizes.values())) > 1 or len(set(counts.values())) > 1:
        return None
    key = next(s["shape"] for s in states if s["part"] in ("key", RECURRENT))
    names = {"key": "key", "value": "value", "conv": CONV, "recurrent": RECURRENT}
    names = {k: v for k, v in names.items() if k in ("key", "value") or v in parts}
    graph = next((files[kind] for kind in ("unrolled", "loop") if kind in files), None)
    if graph is None:
        return None
    config = dict(program.origin.config)
    generation = _generation(program)
    end = generation.get("eos_token_id", config.get("eos_token_id"))
    pad = generation.get("pad_token_id", config.get("pad_token_id"))
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    heads = int(config.get("num_attention_heads", key[1]))
    context = program.origin.positions or 2048
    computed = computed_inputs(program)
    given = {i.name: i.name for i in program.inputs if i.name not in computed}
    return {
        "model": {
            "type": "decoder",
            "context_length": context,
            "bos_token_id": generation.get("bos_token_id", config.get("bos_token_id")) or 0,
            "eos_token_id": end,
            "pad_token_id": pad,
            "vocab_size": config.get("vocab_size"),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": key[3],
                "hidden_size": config.get("hidden_size") or config.get("n_embd") or 0,
                "num_attention_heads": heads,
                "num_hidden_layers": 1 + max(s["layer"] for s in states),
                "num_key_value_heads": key[1],
                "inputs": {
                    **given,
                    **{f"past_{k}_names": PAST.format("%d", v) for k, v in names.items()},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{k}_names": PRESENT.format("%d", v) for k, v in names.items()},
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": _shares_buffers(directory / graph, states),
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _shares_buffers(path: Path, states: list[dict[str, Any]]) -> bool:
    """Whether past and present of every cache may be the same buffer.

    They may where GroupQueryAttention appends to all of them.
    """
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    count: int = sum(node.op_type == "GroupQueryAttention" for node in nodes)
    keys: int = sum(s["part"] == "key" for s in states)
    return 0 < count == keys


def _generation(program: Program) -> dict[str, Any]:
    path = program.origin.files.get("generation_config.json")
    if path is None or not Path(path).is_file():
        return {}
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
