"""TPTT (arXiv 2506.17671), from its package, on the tokens and measures of `benchmarks.recovery`.

Its LiZA puts a delta rule on each attention's own projections and mixes both outputs; adapters on
q, k, v and o then learn the cross-entropy of the text while the share of the delta rule rises, as
its callback does. The softmax attention stays whole, so the state still grows with the context.

    pip install tptt      # into an environment beside reroll's; it is no dependency of reroll
    python -m benchmarks.recovery_tptt --tokens 500k --work out/recovery

`benchmarks.recovery` with the same `--work` and `--tokens` then has the row in its table. With
`--train-only` it says what so many tokens take, and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from tptt import LiZACallback, get_tptt_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.recovery import add_options, measured
from reroll.evaluate.tokenizing import plain_ids, special_ids
from reroll.recover.data import make_corpus, take

# its published training: rank 8, learning rate 5e-4, the delta rule's share from 0.01 to 0.5
RANK, ALPHA, RATE, SHARES = 8, 16, 5e-4, (0.01, 0.5)


def main() -> None:
    """Train, measure, and keep the measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.set_defaults(batch=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    mixed, _ = get_tptt_model(base, base.config, operator_mode="delta_rule", mag_weight=SHARES[0])
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    model = get_peft_model(mixed, config).train()
    steps = max(round(options.tokens / (options.length * options.batch)), 1)
    tokens = steps * options.length * options.batch
    callback = LiZACallback(model, "gradual", *SHARES, transition_step=max(steps // 4, 1))
    corpus = make_corpus(
        options.data, lambda text: plain_ids(tokenizer, text), length=options.length,
        tokens=tokens, held_rows=8, pack="join",
        before=special_ids(tokenizer)[0], end=tokenizer.eos_token_id, seed=options.seed,
    )  # fmt: skip
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=RATE, weight_decay=0.0)
    start = time.perf_counter()
    for step in range(steps):
        rows = take(corpus.train, step * options.batch, options.batch).data
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        callback.on_step_end(None, SimpleNamespace(global_step=step + 1), None)
        if step % 10 == 9:
            left = (steps - step - 1) * (time.perf_counter() - start) / (step + 1) / 60
            print(f"  tptt: step {step + 1}, loss {loss.item():.4g}, {left:.0f} minutes left")
    seconds = round(time.perf_counter() - start)
    print(f"  tptt: {tokens:,} tokens in {seconds} seconds")
    if options.train_only:
        return
    trained = model.merge_and_unload().eval()
    file = options.work / f"tptt-{options.tokens}.json"
    found = measured(trained, options, file)
    file.write_text(json.dumps({**found, "tokens": tokens, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
