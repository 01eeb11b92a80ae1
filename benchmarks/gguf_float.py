"""The weights of a quantised GGUF file once more, in floats or in blocks of 8 bits.

    python -m benchmarks.gguf_float QUANTISED.gguf OUT.gguf [--type F32|F16|Q8_0] [--context N]

llama.cpp then has the weights that transformers has after dequantising the same file, in a
precision that an export has too. Tokenizer and hyperparameters are copied as they are, and so is
the order of the rows of queries and keys, which in GGUF files is llama.cpp's. Vectors stay in fp32.
Without a type nothing but the longest context changes, beyond which llama.cpp's server takes no
prompt.
"""

from __future__ import annotations

import gguf

from benchmarks.harness import parse_options


def write(source: str, out: str, kind: str, context: int) -> None:
    """Write every tensor of `source` to `out`, matrices as `kind`."""
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


def main() -> None:
    """Write the file."""
    options = parse_options(__doc__, "files", type="", context=0)
    source, out = options.files
    write(source, out, options.type, options.context)


if __name__ == "__main__":
    main()
