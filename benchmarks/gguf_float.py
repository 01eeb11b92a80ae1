"""The weights of a quantised GGUF file once more, in floats or in blocks of 8 bits.

    python -m benchmarks.gguf_float QUANTISED.gguf OUT.gguf [--type F32|F16|Q8_0] [--context N]

llama.cpp then has the weights that transformers has after dequantising the same file, in a
precision that an export has too. Tokenizer and hyperparameters are copied as they are, and so is
the order of the rows of queries and keys, which in GGUF files is llama.cpp's. Vectors stay in fp32.
Without a type nothing but the longest context changes, beyond which llama.cpp's server takes no
prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf


def write(
    source: Path, out: Path, kind: gguf.GGMLQuantizationType | None, context: int | None
) -> None:
    """Write every tensor of `source` to `out`, matrices as `kind`."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        # the writer makes these itself
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        if context and name == f"{architecture}.context_length":
            value = context
        writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        into = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, into), raw_dtype=into)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description="a GGUF file's weights in another precision")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("F32", "F16", "Q8_0"))
    parser.add_argument("--context", type=int, help="the longest context that the file allows")
    options = parser.parse_args()
    kind = gguf.GGMLQuantizationType[options.type] if options.type else None
    write(options.source, options.out, kind, options.context)


if __name__ == "__main__":
    main()
