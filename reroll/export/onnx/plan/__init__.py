"""Plan an export: all that is decided before the first node is written.

`make_plan` builds a frozen `Plan` from a Program and settings; `emit` reads it.

    settings.py   precision and opset, and the dtypes that follow
    parts.py      the part of a Program that is exported, and the inputs that a graph computes
    segments.py   which trips of a depth loop become one ONNX Loop, and what runs after an exit
    states.py     states as inputs and outputs
    reading.py    in which form each argument of a node reads a weight
    weights.py    stored forms, initialisers, and the layout of the weight file;
                  quantise.py has the forms of integers
    graphs.py     the plan of one graph, and the three of a host that schedules
    record.py     the whole plan
"""
