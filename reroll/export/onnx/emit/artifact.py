"""Write the directory: graphs, weights, tokenizer, and files that describe their use."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnx import helper

import reroll
import reroll.export.onnx.ops
from reroll.errors import ExportError
from reroll.export.onnx.emit import check
from reroll.export.onnx.emit.manifest import write_manifest
from reroll.export.onnx.emit.step import step_graphs
from reroll.export.onnx.emit.translate import Translator
from reroll.export.onnx.emit.weight_file import write_weights
from reroll.export.onnx.graph import Graph, nodes_of
from reroll.export.onnx.plan.parts import exported_part
from reroll.export.onnx.plan.record import make_plan
from reroll.export.onnx.plan.settings import Settings
from reroll.export.side_files import copy_side_files
from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.dtypes import HALVES, retype
from reroll.rewrite.ir.program import Program

if TYPE_CHECKING:
    from reroll.export.onnx import Onnx
    from reroll.export.targets import Progress

log = logging.getLogger(__name__)

# IR version by opset; opset 27 came with version 14, but no graph here needs it, and ONNX
# Runtime 1.31, which has the operators, reads 13 at most
IR_VERSION = {23: 11, 24: 12, 25: 12, 26: 13, 27: 13}
CONTRIB = "com.microsoft"


def write(
    target: Onnx, program: Program, directory: Path, progress: Progress | None
) -> dict[str, Any]:
    """Write everything into a directory; see `Target.write`."""
    start = time.perf_counter()
    whole, program = program, exported_part(program)
    if program is not whole:
        log.warning("%s: only the encoder is exported, the decoder is not", whole.origin.model)
    _check_past(program)
    if program.draft is not None:
        _check_past(program.draft)
    settings = Settings(target.precision, target.opset, target.block, target.runtime)
    # first, so that no side file replaces a file written here
    copy_side_files(program, directory)
    plan = make_plan(program, settings, target.graphs)
    log.debug("%s", plan)
    files: dict[str, str] = {}
    parts = step_graphs(plan) if "step" in plan.graphs else {}
    for each in plan.plans:
        for name, planned in each.graphs.items():
            graph = parts[name] if name in parts else Translator(each, planned).run()
            model = _model(graph, name, settings)
            files[name] = f"{name}.onnx"
            onnx.save(model, str(directory / files[name]))
            log.info("%s: %d nodes", files[name], len(model.graph.node))

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, "writing weights")

    write_weights(plan, directory, report)
    seconds = {"write": time.perf_counter() - start}
    checked: dict[str, Any] = {}
    if target.check:
        start = time.perf_counter()
        for each in plan.plans:
            own = {name: file for name, file in files.items() if name in each.graphs}
            checked |= _checked(settings, each.program, directory, own, progress)
        seconds["check"] = time.perf_counter() - start
    part = "whole" if program is whole else "encoder"
    found = write_manifest(directory, plan, part, files, checked)
    return {**found, "seconds": seconds}


def _check_past(program: Program) -> None:
    """Raise ExportError for recurrences among what reads all tokens again."""
    if "logits" in program.outputs and plan_states(program).layers and not program.has_past:
        raise ExportError(
            "a pass gave recurrences to a program that was captured without a cache: their state "
            "would go on from token to token, and what else mixes tokens would not",
            hint="export the model without that pass",
        )


def _model(built: Graph, name: str, settings: Settings) -> onnx.ModelProto:
    graph = built.finish(name)
    functions = [function for _, function in built.functions.values()]
    imports = [helper.make_opsetid("", settings.opset)]
    if any(node.domain == CONTRIB for node in nodes_of(graph)):
        imports.append(helper.make_opsetid(CONTRIB, 1))
    return helper.make_model(
        graph,
        functions=functions,
        opset_imports=imports,
        ir_version=IR_VERSION.get(settings.opset, 13),
        producer_name="reroll",
        producer_version=reroll.__version__,
    )


def _checked(
    settings: Settings,
    program: Program,
    directory: Path,
    files: dict[str, str],
    progress: Progress | None,
) -> dict[str, Any]:
    # the graph computes in fp32 unless told otherwise, so the module it is compared with does, too
    program = retype(program, torch.float32) if program.dtype in HALVES else program
    module = program.to_module().eval()
    results: dict[str, Any] = {}
    measured = None
    if settings.precision != "fp32":
        measured = check.quality(directory / next(iter(files.values())), program, module)
    check.round_weights(module, program, settings)
    for kind, file in files.items():
        if kind in ("embed", "step", "head"):
            # these three only run together: see `scheduler`
            continue

        def report(done: int, total: int, kind: str = kind) -> None:
            if progress is not None:
                progress(done, total, f"checking {kind}")

        results[kind] = check.check_graph(
            directory / file, program, module, settings.precision, progress=report
        )
        if measured is not None:
            results[kind]["quality"] = measured
    return results
