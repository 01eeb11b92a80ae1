"""The Program that a model class runs: the saved one, its layers alone, or with a classifier.

As in transformers, a language model's directory also loads as the layers below the head
(AutoModel), and as a classifier of sequences whose weights are drawn at random
(AutoModelForSequenceClassification), for rewards for example.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from reroll.errors import UsageError
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.parts import SCORE, last_hidden_state, with_classifier, without_head
from reroll.rewrite.ir.program import Program
from reroll.runtime.models.auto import MODELS

log = logging.getLogger(__name__)

_LANGUAGE = {"AutoModelForCausalLM", "AutoModelForImageTextToText"}
# what a configuration says of a classifier
_LABELS = ("id2label", "label2id", "problem_type", "pad_token_id")


def program_for(class_name: str, program: Program, config: Any, where: str) -> Program:
    """Return the Program that a class of lowered models runs, made of a saved one.

    Raises UsageError if the class does not fit it.
    """
    auto_class = program.origin.auto_class
    fitting = MODELS.get(auto_class, MODELS["AutoModel"])[1]
    # a model that reads pictures can be loaded as a language model, too
    reads_text = class_name == "RerollForCausalLM" and fitting == "RerollForConditionalGeneration"
    if class_name in (fitting, "RerollPreTrainedModel", "RerollDecoderModel") or reads_text:
        return program
    if class_name == "RerollModel":
        return without_head(program)
    if class_name == "RerollForSequenceClassification" and auto_class in _LANGUAGE:
        return _classifier(program, config)
    raise UsageError(
        f"{class_name} does not run this model",
        where=where,
        hint=f"use {auto_class}.from_pretrained",
    )


def _classifier(program: Program, config: Any) -> Program:
    """Put a classifier with random weights on a language model's layers."""
    width = shape(last_hidden_state(program))[-1]
    spread = float(getattr(config, "initializer_range", 0.02))
    weight = torch.randn(config.num_labels, width, dtype=torch.float32) * spread
    log.warning("%s is new, with random weights: train it before you use it", SCORE)
    program = with_classifier(program, weight.to(program.dtype))
    labels = {name: getattr(config, name, None) for name in _LABELS}
    origin = replace(program.origin, config={**program.origin.config, **labels})
    return replace(program, origin=origin)
