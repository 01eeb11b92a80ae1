"""The weights of a quantised GGUF file once more, in floats or in blocks of 8 bits."""

from __future__ import annotations

from argparse import Namespace

import gguf

from benchmarks.harness import Table


def write(table: Table, options: Namespace) -> None:
    """Write every tensor of one file to another, matrices as `--type`; nothing is measured."""
    (source, out), kind, context = options.name[1:], options.type, options.context
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        # the writer makes these itself
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        longest = context and name == f"{architecture}.context_length"
        writer.add_key_value(name, context if longest else field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        data, into = tensor.data, tensor.tensor_type
        if kind:
            values = gguf.dequantize(data, into)
            into = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
            data = gguf.quantize(values, into)
        writer.add_tensor(tensor.name, data, raw_dtype=into)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
