"""transformers' Trainer on a lowered model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import reroll
from tests import captured, tiny

pytestmark = pytest.mark.usefixtures("captured_once")

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


def test_label_smoothing_of_an_encoder_decoder(tmp_path: Any) -> None:
    options = {"label_smoothing_factor": 0.1, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **options)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = "</s>"
    rows = [{"input_ids": IDS[0].tolist(), "labels": IDS[n, : 4 + n].tolist()} for n in (0, 1)]
    losses = []
    for model in (captured.model("t5"), captured.captured("t5").to_module()):
        # the collator makes the decoder's tokens of the labels, by a method of the model
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, model)
        trainer = transformers.Trainer(model=model, args=arguments, data_collator=collator)
        batch = collator(rows)
        assert (batch["labels"] == -100).any()
        losses.append(trainer.compute_loss(model, dict(batch)))
    torch.testing.assert_close(losses[1], losses[0])


def test_what_an_answer_is_compared_with_reaches_the_loss(tmp_path: Any) -> None:
    config = transformers.BertConfig(**captured.TEXT, intermediate_size=64)
    model = transformers.BertForQuestionAnswering(config).eval()
    rows = [
        {"input_ids": row, "start_positions": torch.tensor(1), "end_positions": torch.tensor(3)}
        for row in IDS
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, label_names=[]
    )
    found = []
    for each in (model, reroll.capture(model).to_module()):
        trainer = transformers.Trainer(model=each, args=arguments, eval_dataset=rows)
        batch = next(iter(trainer.get_eval_dataloader()))
        found.append(trainer.compute_loss(each, batch))
    torch.testing.assert_close(found[1], found[0])


def test_columns_that_are_not_read_are_refused_and_not_dropped() -> None:
    model = captured.captured("gpt2").to_module()
    trainer = transformers.Trainer(
        model=model, args=transformers.TrainingArguments(report_to=[], use_cpu=True)
    )
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "token_type_ids", "pixel_values"} <= set(trainer._signature_columns)
