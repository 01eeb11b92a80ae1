"""llama.cpp beside the exports of `benchmarks.onnx_speed`, in an environment of its own.

    python benchmarks/llama_peer.py MODEL.gguf --folder DIR [--threads 1] [--cache f32]

Needs `xllamacpp` (llama.cpp and its server, prebuilt) and nothing of reroll. Every line of the
input asks something, and is answered by one line of JSON:

    {"greedy": [ids], "count": n}    the n most likely tokens after these
    {"context": n, "steps": k}       seconds of a decoded token behind n tokens: processor, clock

How long a step takes does not depend on what the cache holds. So a long context is not computed:
the keys and values of a short prompt are saved in the server's file, repeated in it, and restored.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

# the prompt whose keys and values are repeated
SHORT = 128
# the layout of saved slots that `repeated` knows: "ggsq", version 4
KNOWN = (0x67677371, 4)


def serve(options: argparse.Namespace) -> Any:
    """A server in this process."""
    p = xllamacpp.CommonParams()
    p.model.path = str(options.model)
    p.n_ctx, p.n_parallel = options.context, 1
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = options.threads
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.cache.upper()}")
    p.cache_type_k = p.cache_type_v = kind
    # on a CPU the other way is slower, and keeps values by rows
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.slot_save_path, p.endpoint_slots = f"{options.folder}/", True
    p.fit_params, p.cache_ram_mib, p.n_ctx_checkpoints = False, 0, 0
    p.verbosity = 0
    return xllamacpp.Server(p)


def complete(server: Any, ids: list[int], count: int, **more: Any) -> dict[str, Any]:
    """The greedy continuation, with what is known of the prompt left in the cache."""
    request = {"prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    found: dict[str, Any] = server.handle_completions(request | {"cache_prompt": True} | more)
    if "error" in found:
        raise SystemExit(f"llama.cpp: {found['error']}")
    return found


def greedy(server: Any, ids: list[int], count: int) -> list[int]:
    """The `count` most likely tokens after `ids`."""
    found = complete(server, ids, count, logprobs=1)
    return [token["id"] for token in found["choices"][0]["logprobs"]["content"]]


def slot(server: Any, action: str, name: str) -> None:
    """Save or restore what the cache holds."""
    request = urllib.request.Request(
        f"{server.listening_address}/slots/0?action={action}",
        data=json.dumps({"filename": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        answer.read()


def repeated(saved: bytes, times: int) -> bytes:
    """A saved slot of n tokens at positions 0, 1, ... as one of `times` x n tokens."""
    at = 0

    def words(count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}i", piece(4 * count))

    def piece(size: int) -> bytes:
        nonlocal at
        at += size
        return saved[at - size : at]

    head = words(3)
    _, form, n = words(3)
    if head[:2] != KNOWN or form != 1:
        raise SystemExit(f"llama.cpp saves slots in a layout that is not known here: {head[:2]}")
    tokens, (media,) = words(n), words(1)
    streams, cells = words(2)
    words(3 * cells)  # position, number of sequences, the sequence
    by_columns, layers, *rest = words(4)
    if (media, streams, cells, by_columns, *rest) != (0, 1, n, 1, 0, 0):
        raise SystemExit("llama.cpp saved something else than keys, and values by columns")
    total = times * n
    out = [struct.pack("<6i", *KNOWN, 4 + total, -1, form, total)]
    out += [struct.pack(f"<{n}i", *tokens) * times, struct.pack("<3i", 0, 1, total)]
    out += [struct.pack("<3i", position, 1, 0) for position in range(total)]
    out.append(struct.pack("<4i", 1, layers, 0, 0))
    for _ in range(layers):
        kind, row, _ = words(3)
        out += [struct.pack("<iq", kind, row), piece(n * row) * times]
    for _ in range(layers):
        kind, size, columns = words(3)
        out.append(struct.pack("<3i", kind, size, columns))
        out += [piece(n * size) * times for _ in range(columns)]
    if at != len(saved):
        raise SystemExit(f"llama.cpp's saved slot has {len(saved) - at} bytes that are not known")
    return b"".join(out)


def step(server: Any, folder: Path, context: int, steps: int) -> tuple[float, float]:
    """Seconds of one token behind `context` tokens, of the processor and of the clock."""
    short = [1000 + i for i in range(SHORT)]
    complete(server, short, 1)
    slot(server, "save", "short")
    (folder / "long").write_bytes(repeated((folder / "short").read_bytes(), context // SHORT))
    slot(server, "restore", "long")
    prompt = short * (context // SHORT) + [7]

    def seconds(count: int) -> tuple[float, float]:
        start = time.process_time(), time.perf_counter()
        found = complete(server, prompt, count)
        end = time.process_time(), time.perf_counter()
        if found["timings"]["prompt_n"] != 1:
            raise SystemExit("llama.cpp computed the context again instead of restoring it")
        return end[0] - start[0], end[1] - start[1]

    seconds(2)
    # the request itself, with the prompt's last token, is in both
    one, all_ = seconds(1), seconds(1 + steps)
    (folder / "long").unlink()
    return (all_[0] - one[0]) / steps, (all_[1] - one[1]) / steps


def main() -> None:
    """Answer lines until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default="f32", help="what keys and values are kept in")
    parser.add_argument("--context", type=int, default=33024)
    options = parser.parse_args()
    server = serve(options)
    for line in sys.stdin:
        asked = json.loads(line)
        if "greedy" in asked:
            answer: Any = greedy(server, asked["greedy"], asked["count"])
        else:
            answer = step(server, options.folder, asked["context"], asked["steps"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
