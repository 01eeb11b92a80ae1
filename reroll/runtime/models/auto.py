"""The lowered models by transformers' auto classes, which import them at first use."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

import transformers

from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.program import Program

# module and class name of the lowered model by auto class
MODELS = {
    "AutoModel": ("encoders", "RerollModel"),
    "AutoModelForCausalLM": ("causal_lm", "RerollForCausalLM"),
    "AutoModelForImageTextToText": ("causal_lm", "RerollForConditionalGeneration"),
    "AutoModelForMaskedLM": ("encoders", "RerollForMaskedLM"),
    "AutoModelForSequenceClassification": ("encoders", "RerollForSequenceClassification"),
    "AutoModelForTokenClassification": ("encoders", "RerollForTokenClassification"),
    "AutoModelForQuestionAnswering": ("encoders", "RerollForQuestionAnswering"),
    "AutoModelForImageClassification": ("encoders", "RerollForImageClassification"),
    "AutoModelForSeq2SeqLM": ("seq2seq", "RerollForSeq2SeqLM"),
    "AutoModelForSpeechSeq2Seq": ("seq2seq", "RerollForSpeechSeq2Seq"),
}


# the class of a language model without its head, which keeps a cache as it did with one
_DECODER = ("decoder", "RerollDecoderModel")


def model_class(program: Program) -> Any:
    """Return the lowered model class that runs a Program."""
    module, name = MODELS.get(program.origin.auto_class, MODELS["AutoModel"])
    if name == "RerollModel" and _continues_text(program):
        module, name = _DECODER
    return _imported(module, name)


def _continues_text(program: Program) -> bool:
    data = [i.name for i in program.inputs if i.role == "data"]
    return data == ["input_ids"] and program.has_past and bool(plan_states(program).layers)


def _imported(module: str, name: str) -> Any:
    return getattr(import_module(f"reroll.runtime.models.{module}"), name)


@cache
def register_models(config: Any) -> None:
    """Register the lowered models with transformers' auto classes, once, under their config."""
    from transformers.models.auto import modeling_auto

    # transformers imports itself a second time to read its own files, under the same name
    packages = (transformers, sys.modules["transformers"])

    for auto_class, (_, name) in MODELS.items():
        mapping = getattr(modeling_auto, auto_class)._model_mapping
        model = _LazyModel(auto_class)
        mapping.register(config, model, exist_ok=True)
        # transformers' server looks there for the class that a configuration names
        for package in packages:
            setattr(package, name, model)
        # Trainer and pipelines use class names, for example to know whether labels are shifted;
        # lm-eval takes every type that stands among the encoder-decoders for one of them
        other = "_seq2seq" if auto_class == "AutoModelForSeq2SeqLM" else ""
        mapping._model_mapping.setdefault(config.model_type + other, name)


class _LazyModel:
    """Placeholder of a lowered model class, which is imported when it is first used."""

    def __init__(self, auto_class: str) -> None:
        self._auto = auto_class
        self.__name__ = MODELS[auto_class][1]

    def __getattr__(self, name: str) -> Any:
        return getattr(_imported(*MODELS[self._auto]), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _imported(*MODELS[self._auto])(*args, **kwargs)
