"""llama.cpp beside the exports of `benchmarks/onnx_speed.py`, in an environment of its own.

    python benchmarks/llama_peer.py MODEL.gguf --context 1024 --steps 16 --prompt 504,1463

Needs `xllamacpp` (llama.cpp and its server, prebuilt) and nothing of reroll. The last line printed
is JSON: the 32 likeliest tokens after the prompt, and the seconds of a token behind the context.

A long context takes much longer to compute than the steps behind it. So it is computed once: the
server's file of it is kept in `--work`, and restored.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

GREEDY = 32


def serve(options: argparse.Namespace, folder: str) -> Any:
    """A server in this process."""
    p = xllamacpp.CommonParams()
    p.model.path = options.model
    p.n_ctx, p.n_parallel = options.context + 200, 1
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


def step(server: Any, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one token behind a context, of the processor and of the clock."""
    ids = [1000 + i % 100 for i in range(options.context)]
    name = f"{Path(options.model).stem}-{options.cache}-{options.context}"
    if (folder / name).exists():
        slot(server, "restore", name)
    else:
        complete(server, ids, 1)
        slot(server, "save", name)

    def seconds(count: int) -> tuple[float, float]:
        start = time.process_time(), time.perf_counter()
        found = complete(server, [*ids, 7], count)
        end = time.process_time(), time.perf_counter()
        if found["timings"]["prompt_n"] != 1:
            raise SystemExit("llama.cpp computed the context again instead of restoring it")
        return end[0] - start[0], end[1] - start[1]

    seconds(2)
    # the request itself, with the prompt's last token, is in both
    pairs = zip(seconds(1), seconds(1 + options.steps), strict=True)
    processor, clock = ((all_ - one) / options.steps for one, all_ in pairs)
    return {"processor": processor, "clock": clock}


def main() -> None:
    """Print what is found."""
    # this environment has no torch, so not the harness either
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--prompt", type=lambda text: [int(word) for word in text.split(",")])
    for name in ("threads", "context", "steps"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--work", default="build/onnx", help="where computed contexts are kept")
    parser.add_argument("--cache", default="f32", help="what keys and values are kept in")
    options = parser.parse_args()
    folder = Path(options.work).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    server = serve(options, str(folder))
    answer = complete(server, options.prompt, GREEDY, logprobs=1)["choices"][0]
    found: dict[str, Any] = {"greedy": [t["id"] for t in answer["logprobs"]["content"]]}
    print(json.dumps(found | step(server, folder, options)))


if __name__ == "__main__":
    main()
