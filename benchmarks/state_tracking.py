"""What a mixer's state can follow: one layer learns a task from data, or cannot."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Row, Table
from reroll.mixers import Mixer, make

ORDERS = torch.tensor(list(permutations(range(3))))
HEADS, SIZE, WIDTH = 4, 8, 32
LENGTH = 31


def classes(task: str) -> int:
    """How many answers a task has."""
    return 2 if task == "parity" else len(ORDERS)


def batch(
    task: str, words: list[int], rows: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Tokens [rows, length + 1], the first of which says that a sequence begins, and answers."""
    allowed = torch.tensor(words)
    tokens = allowed[torch.randint(len(allowed), (rows, length), generator=generator)]
    begin = torch.full((rows, 1), classes(task))
    if task == "parity":
        return torch.cat([begin, tokens], 1), tokens.cumsum(1) % 2
    state, states = ORDERS[0].expand(rows, 3), []
    for token in tokens.T:
        state = state.gather(1, ORDERS[token])
        states.append(state)
    same = (torch.stack(states, 1)[:, :, None] == ORDERS).all(-1)
    return torch.cat([begin, tokens], 1), same.long().argmax(-1)


class Layer(nn.Module):
    """Embedding, one mixer, a small MLP, answers."""

    def __init__(self, mixer: Mixer, classes: int) -> None:
        super().__init__()
        self.mixer, self.gates = mixer, mixer.gates(SIZE, SIZE)
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


def train(task: str, words: list[int], mixer: Mixer, steps: int) -> Row:
    """The share of right answers at the length of training and at four times that."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Layer(mixer, classes(task))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    start = time.thread_time()
    for step in range(steps):
        # short sequences first
        now = min(LENGTH, 4 + LENGTH * 2 * step // steps)
        tokens, answers = batch(task, words, 64, now, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    found = {"seconds": time.thread_time() - start}
    for length in (LENGTH, 4 * LENGTH):
        tokens, answers = batch(task, words, 256, length, generator)
        with torch.no_grad():
            right = model(tokens).argmax(-1) == answers
        found[f"at {length}"] = right[:, -length // 4 :].float().mean().item()
    return found


def measure(table: Table, options: Namespace) -> None:
    """Add one row for each task and mixer."""
    for case in table.missing(
        {"task": t, "mixer": m} for t in options.tasks for m in options.mixers
    ):
        name, given = options.mixers[case["mixer"]]
        mixer = make(name, {"chunk_size": 32, **given})
        table.add(case | train(case["task"], options.words[case["task"]], mixer, options.steps))
