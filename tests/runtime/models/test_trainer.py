"""transformers' Trainer on a lowered model."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests import captured

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def test_label_smoothing_shifts_the_labels(tmp_path: Any) -> None:
    original = captured.model("llama")
    options = {"label_smoothing_factor": 0.1, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options)
    losses = []
    for model in (original, captured.captured("llama").to_module()):
        trainer = transformers.Trainer(model=model, args=arguments)
        losses.append(trainer.compute_loss(model, {"input_ids": IDS, "labels": IDS.clone()}))
    torch.testing.assert_close(losses[1], losses[0])
