"""Lower the ops of a graph to ONNX operators, one file for each family of them."""

from reroll.export.onnx.ops import (  # noqa: F401 - each registers its lowerings
    aten,
    attention,
    complex_numbers,
    convolutions,
    exits,
    experts,
    idioms,
    indexing,
    making,
    masks,
    mixers,
    pointwise,
    recurrence,
    reductions,
    shapes,
    sorting,
)
