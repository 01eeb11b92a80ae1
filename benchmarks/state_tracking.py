"""What a mixer's state can follow: one layer learns parity, swaps and permutations, or cannot.

`parity` counts ones modulo 2. `swaps` exchanges two of three items with each token, `permutations`
applies any of the six permutations of three items; asked for is the order after each token. A state
that only fades cannot do any of them for long, one that can flip what it holds does the first two,
one that can rotate does all (Grazzi et al., 2024, arXiv 2411.12537; Siems et al., 2025, arXiv
2502.10297). Each mixer is trained on short sequences and scored, on the last quarter of them, on
longer ones.

    python -m benchmarks.state_tracking [--steps N] [--tasks parity,swaps] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reroll.mixers import Mixer, make

MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {}),
    "gla": ("gla", {}),
    "deltanet, beta to 1": ("deltanet", {}),
    "deltanet, beta to 2": ("deltanet", {"negative": True}),
    "deltaproduct, beta to 2": ("deltaproduct", {}),
}
HEADS, SIZE, WIDTH = 4, 8, 32
ORDERS = list(permutations(range(3)))


def batch(task: str, rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [rows, length + 1], the first of which says that a sequence begins, and answers."""
    if task == "parity":
        tokens = torch.randint(2, (rows, length), generator=generator)
        answers, begin = tokens.cumsum(1) % 2, 2
    else:
        # token i applies ORDERS[i]; the odd ones among them are swaps
        odd = [i for i, p in enumerate(ORDERS) if sum(p[j] == j for j in range(3)) == 1]
        allowed = torch.tensor(odd if task == "swaps" else range(6))
        tokens = allowed[torch.randint(len(allowed), (rows, length), generator=generator)]
        after = {p: i for i, p in enumerate(ORDERS)}
        table = torch.tensor(
            [[after[tuple(p[j] for j in step)] for step in ORDERS] for p in ORDERS]
        )
        state, found = torch.zeros(rows, dtype=torch.long), []
        for t in range(length):
            state = table[state, tokens[:, t]]
            found.append(state)
        answers, begin = torch.stack(found, 1), 6
    return torch.cat([torch.full((rows, 1), begin), tokens], 1), answers


class Layer(nn.Module):
    """Embedding, one mixer, a small MLP, answers."""

    def __init__(self, mixer: Mixer, classes: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.gates = mixer.gates(SIZE, SIZE)
        self.embed = nn.Embedding(7, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE)
        self.raw = nn.ModuleList()
        for gate in self.gates:
            made = nn.Linear(WIDTH, HEADS * math.prod(gate.shape))
            if gate.role == "decay" and gate.inverse is not None:
                # to begin with, half of the state is left after about 70 tokens
                nn.init.constant_(made.bias, gate.inverse(-0.01))
            self.raw.append(made)
        self.norm = nn.RMSNorm(HEADS * SIZE)
        self.head = nn.Sequential(
            nn.Linear(HEADS * SIZE, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, classes)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        gates = [
            gate.activation(raw(x).unflatten(-1, (HEADS, *gate.shape)).transpose(1, 2))
            for gate, raw in zip(self.gates, self.raw, strict=True)
        ]
        out, _ = self.mixer.chunk(q, k, v, gates)
        answers: Tensor = self.head(self.norm(out.flatten(2)))[:, 1:]
        return answers


def train(task: str, name: str, steps: int, length: int, seed: int) -> dict[str, float]:
    """The share of right answers at the length of training and at four times that."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    mixer, options = MIXERS[name]
    model = Layer(make(mixer, {"chunk_size": 32, **options}), 2 if task == "parity" else 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    start = time.thread_time()
    for step in range(steps):
        # short sequences first
        now = min(length, 4 + length * 2 * step // steps)
        tokens, answers = batch(task, 64, now, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    scores = {"seconds": time.thread_time() - start}
    for each in (length, 4 * length):
        tokens, answers = batch(task, 256, each, generator)
        with torch.no_grad():
            right = model(tokens).argmax(-1) == answers
        scores[f"at {each}"] = right[:, -each // 4 :].float().mean().item()
    return scores


def main() -> None:
    """Print one row for each mixer and task."""
    parser = argparse.ArgumentParser(description="what a state can follow")
    parser.add_argument("--tasks", default="parity,swaps,permutations")
    parser.add_argument("--mixers", default=";".join(MIXERS))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--length", type=int, default=31)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for task in args.tasks.split(","):
        for name in args.mixers.split(";"):
            for seed in range(args.seeds):
                row = {"task": task, "mixer": name, "seed": seed}
                row |= train(task, name, args.steps, args.length, seed)
                shown = "  ".join(f"{k} {v:.2f}" for k, v in row.items() if k.startswith("at"))
                print(f"{task:13s} {name:24s} {shown}  ({row['seconds']:.0f} s)", flush=True)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
