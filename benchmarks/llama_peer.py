"""llama.cpp beside the exports of `benchmarks.onnx_speed`, in an environment of its own.

    python benchmarks/llama_peer.py MODEL.gguf --context 1024 --steps 16 --prompt 504,1463

Needs `xllamacpp` (llama.cpp and its server, prebuilt) and nothing of reroll. The last line printed
is JSON: the 32 likeliest tokens after the prompt, and the seconds of a token behind the context.

How long a step takes does not depend on what the cache holds. So a long context is not computed:
the keys and values of a short prompt are saved in the server's file, repeated in it, and restored.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

GREEDY = 32
# the prompt whose keys and values are repeated
SHORT = 128
# the layout of saved slots that `repeated` knows: "ggsq", version 4
KNOWN = (0x67677371, 4)


def serve(options: argparse.Namespace, folder: str) -> Any:
    """A server in this process."""
    p = xllamacpp.CommonParams()
    p.model.path = options.model
    p.n_ctx, p.n_parallel = options.context + 2 * SHORT, 1
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = options.threads
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.cache.upper()}")
    p.cache_type_k = p.cache_type_v = kind
    # on a CPU the other way is slower, and keeps values by rows
    p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.slot_save_path, p.endpoint_slots = f"{folder}/", True
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

    magic, version, _, _, form, n = words(6)
    if (magic, version, form) != (*KNOWN, 1):
        raise SystemExit(f"llama.cpp saves slots in a layout that is not known: {magic, version}")
    tokens, (media, streams, cells) = words(n), words(3)
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
        kind, row, high = words(3)
        out += [struct.pack("<3i", kind, row, high), piece(n * row) * times]
    for _ in range(layers):
        kind, size, columns = words(3)
        out.append(struct.pack("<3i", kind, size, columns))
        out += [piece(n * size) * times for _ in range(columns)]
    if at != len(saved):
        raise SystemExit(f"llama.cpp's saved slot has {len(saved) - at} bytes that are not known")
    return b"".join(out)


def step(server: Any, folder: Path, context: int, steps: int) -> dict[str, float]:
    """Seconds of one token behind `context` tokens, of the processor and of the clock."""
    short = [1000 + i for i in range(SHORT)]
    complete(server, short, 1)
    slot(server, "save", "short")
    (folder / "long").write_bytes(repeated((folder / "short").read_bytes(), context // SHORT))
    slot(server, "restore", "long")

    def seconds(count: int) -> tuple[float, float]:
        start = time.process_time(), time.perf_counter()
        found = complete(server, short * (context // SHORT) + [7], count)
        end = time.process_time(), time.perf_counter()
        if found["timings"]["prompt_n"] != 1:
            raise SystemExit("llama.cpp computed the context again instead of restoring it")
        return end[0] - start[0], end[1] - start[1]

    seconds(2)
    # the request itself, with the prompt's last token, is in both
    pairs = zip(seconds(1), seconds(1 + steps), strict=True)
    processor, clock = ((all_ - one) / steps for one, all_ in pairs)
    return {"processor": processor, "clock": clock}


def main() -> None:
    """Print what is found."""
    # this environment has no torch, so not the harness either
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--prompt", type=lambda text: [int(word) for word in text.split(",")])
    for name in ("threads", "context", "steps"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--cache", default="f32", help="what keys and values are kept in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = serve(options, folder)
        answer = complete(server, options.prompt, GREEDY, logprobs=1)["choices"][0]
        found: dict[str, Any] = {"greedy": [t["id"] for t in answer["logprobs"]["content"]]}
        print(json.dumps(found | step(server, Path(folder), options.context, options.steps)))


if __name__ == "__main__":
    main()
