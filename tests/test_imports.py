"""The package's imports: no module imports itself through others."""

from __future__ import annotations

import grimp

# the calls of a Program that go up
UP = {
    ("reroll.rewrite.ir.program", "reroll.runtime.lowering.lower"),
    ("reroll.rewrite.ir.program", "reroll.export.huggingface"),
    ("reroll.rewrite.ir.program", "reroll._api"),
}


def test_no_import_closes_a_circle() -> None:
    graph = grimp.build_graph("reroll", exclude_type_checking_imports=True)
    # imports inside of functions are in the graph, too
    imports = {
        module: {
            other
            for other in graph.find_modules_directly_imported_by(module)
            if (module, other) not in UP
        }
        for module in graph.modules
    }
    while leaves := {module for module, others in imports.items() if not others}:
        imports = {m: others - leaves for m, others in imports.items() if m not in leaves}
    assert not imports, f"in a circle, or importing one: {sorted(imports)}"


def test_those_that_go_up_are_all() -> None:
    graph = grimp.build_graph("reroll", exclude_type_checking_imports=True)
    assert all(other in graph.find_modules_directly_imported_by(module) for module, other in UP)
